"""Trained runs become files that run elsewhere, each with a parity check."""
