"""MR-Net."""
