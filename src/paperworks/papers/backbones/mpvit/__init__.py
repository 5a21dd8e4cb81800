"""MPViT (Lee et al. 2022): every stage reads its map with patches of several sizes, each by a Transformer path of its own."""
