"""SSD (Liu et al. 2016): one pass over default boxes on feature maps of several resolutions."""
