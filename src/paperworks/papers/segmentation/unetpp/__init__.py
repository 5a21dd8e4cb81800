"""UNet++ (Zhou et al. 2018, 2020): nested, densely connected skips."""
