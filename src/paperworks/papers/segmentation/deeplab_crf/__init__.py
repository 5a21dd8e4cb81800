"""DeepLab v1: the hole algorithm and the fully connected CRF."""
