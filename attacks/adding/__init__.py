"""Adding points, clusters and objects."""
