"""VQ-VAE (van den Oord et al. 2017): a codebook in the middle, and a PixelCNN over its indices."""
