"""Agent Attention (Han et al. 2024): few agents between queries and keys make softmax attention linear in the number of tokens."""
