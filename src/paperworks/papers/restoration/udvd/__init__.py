"""UDVD (Sheth et al. 2021): films are denoised by a network that learns from the noisy film alone."""
