"""Insight: why a network answers as it does."""
