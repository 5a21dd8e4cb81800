"""Inception-v4 and Inception-ResNet (Szegedy et al. 2017), with the Inception modules from v1 on."""
