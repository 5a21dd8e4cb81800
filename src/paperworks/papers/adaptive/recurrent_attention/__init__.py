"""Recurrent models of visual attention (Mnih et al. 2014): a network that looks at an image through a few glimpses."""
