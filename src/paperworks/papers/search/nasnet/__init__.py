"""ConvNeXt (Liu et al. 2022): a ResNet modernised step by step, without attention."""
