"""Octave convolution (Chen et al. 2019): part of the channels live at half the resolution."""
