"""ViT (Dosovitskiy et al. 2021): a plain Transformer over image patches."""
