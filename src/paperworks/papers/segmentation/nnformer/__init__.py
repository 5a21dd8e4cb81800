"""nnFormer (Zhou et al. 2021): volume attention and convolution in turns, skips that are asked."""
