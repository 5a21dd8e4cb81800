"""Relations: which things belong together, in tables, documents and graphs."""
