"""SLAB (Guo et al. 2024): batch norm that takes over from layer norm during training, and linear attention with a ReLU."""
