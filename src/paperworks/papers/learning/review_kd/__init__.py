"""ReviewKD (Chen et al. 2021): deep levels of a small network are taught by shallow levels of a large one."""
