"""Grad-CAM (Selvaraju et al. 2017): where a class is seen, from the gradient of its score."""
