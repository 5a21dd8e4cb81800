"""ReviewKD: knowledge distillation by review."""
