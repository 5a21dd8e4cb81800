"""GCNet (Cao et al. 2019): one attention map for all queries, and the blocks that it descends from."""
