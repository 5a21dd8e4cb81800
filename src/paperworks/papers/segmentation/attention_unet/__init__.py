"""Attention U-Net (Oktay et al. 2018): additive gates on the skips."""
