"""Deformable convolution (Dai et al. 2017): each sampling place of a filter moves by an offset that is read from the features."""
