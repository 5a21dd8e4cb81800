"""Pixel Transformer (Nguyen et al. 2024): a plain Transformer whose tokens are single pixels."""
