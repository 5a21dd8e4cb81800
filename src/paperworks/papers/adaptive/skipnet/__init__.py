"""SkipNet (Wang et al. 2018): gates that decide block after block whether to skip, trained by supervision and then by reinforcement."""
