"""Defends point-cloud classifiers by rebuilding the surface."""
