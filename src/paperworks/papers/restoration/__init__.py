"""Restoration: images and films without their noise."""
