"""Bilinear CNNs (Lin et al. 2015): an image as the pooled products of two networks' features."""
