"""Papers about shapes: contours, meshes, volumes, points."""
