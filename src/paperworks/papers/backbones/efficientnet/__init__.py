"""EfficientNet (Tan and Le 2019): depth, width and resolution grow together."""
