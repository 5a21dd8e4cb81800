"""Faster R-CNN (Ren et al. 2015): region proposals from a small network on the detector's own features."""
