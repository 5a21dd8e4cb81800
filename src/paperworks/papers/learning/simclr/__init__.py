"""SimCLR (Chen et al. 2020): two augmentations of an image agree, among those of a large batch."""
