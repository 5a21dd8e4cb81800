"""Auto-Keras (Jin et al. 2019): Bayesian optimisation chooses how a trained network grows."""
