"""Detectors: boxes around objects."""
