"""Transformer (Vaswani et al. 2017): sequence to sequence by attention alone."""
