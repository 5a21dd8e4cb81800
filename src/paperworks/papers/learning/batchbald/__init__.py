"""BatchBALD (Kirsch et al. 2019): which images to label next, as a batch that tells most together."""
