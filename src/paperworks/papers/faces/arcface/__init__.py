"""ArcFace (Deng et al. 2019): a margin on the angle to the class's centre."""
