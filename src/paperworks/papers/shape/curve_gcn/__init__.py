"""Curve-GCN (Ling and others 2019)."""
