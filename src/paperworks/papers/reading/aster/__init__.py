"""ASTER (Shi et al. 2018): text is straightened by a thin-plate spline and read by attention."""
