"""Readers: text in images."""
