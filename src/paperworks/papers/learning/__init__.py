"""Papers on learning: without labels, from other networks, with few labels."""
