"""The archive as a site that opens from the disk: cards, notes beside code, evidence and pictures, in English and Chinese."""
