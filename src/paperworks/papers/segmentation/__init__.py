"""Segmentation papers."""
