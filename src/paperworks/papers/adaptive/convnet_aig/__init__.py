"""ConvNet-AIG (Veit and Belongie 2018): each residual block has a gate that decides for each image whether it is computed."""
