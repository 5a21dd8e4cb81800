"""Generative papers."""
