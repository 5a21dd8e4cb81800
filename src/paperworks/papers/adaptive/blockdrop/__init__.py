"""BlockDrop (Wu et al. 2018): a policy network looks at the image once and drops blocks of a residual network."""
