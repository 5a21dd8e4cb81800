"""Video: networks that tell what happens in a film."""
