"""Measurements of our own research: parts of the purifiers, labels, solvers, meshes and kinds of input."""
