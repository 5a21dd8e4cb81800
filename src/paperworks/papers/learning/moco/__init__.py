"""MoCo (He et al. 2020): a queue of keys from a slowly moving encoder."""
