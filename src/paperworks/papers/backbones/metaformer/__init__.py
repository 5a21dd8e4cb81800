"""MetaFormer (Yu et al. 2022): what a Transformer's block is without naming its token mixer; with pooling in that place, PoolFormer."""
