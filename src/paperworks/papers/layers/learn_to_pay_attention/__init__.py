"""Learn to Pay Attention (Jetley et al. 2018): a classifier that sees attended local features, and nothing else."""
