"""Papers on faces."""
