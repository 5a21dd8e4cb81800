"""TernaryNet (Heinrich et al. 2018): weights and activations of -1, 0 and 1, convolutions of bits."""
