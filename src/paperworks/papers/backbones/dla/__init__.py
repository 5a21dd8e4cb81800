"""Deep Layer Aggregation (Yu et al. 2018): trees of blocks whose nodes merge shallow and deep layers."""
