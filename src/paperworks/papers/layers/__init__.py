"""Layers: parts that take a place in networks of other papers."""
