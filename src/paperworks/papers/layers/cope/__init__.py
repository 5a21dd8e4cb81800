"""CoPE (Golovneva et al. 2024): positions count what the context says counts."""
