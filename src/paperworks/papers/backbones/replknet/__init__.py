"""RepLKNet (Ding et al. 2022): few, very large depthwise kernels instead of many small ones."""
