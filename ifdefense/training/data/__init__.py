"""Training data: solids, surfaces and clouds, their sources, and their cache."""
