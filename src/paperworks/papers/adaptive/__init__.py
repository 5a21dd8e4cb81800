"""Adaptive inference: networks that decide for each image what is computed."""
