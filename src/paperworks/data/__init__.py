"""Folders on disk become samples: layouts, readers, packs, fingerprints, resampling."""
