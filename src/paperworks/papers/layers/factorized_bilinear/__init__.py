"""Factorized Bilinear Networks (Li et al. 2017): a linear layer with low-rank quadratic terms."""
