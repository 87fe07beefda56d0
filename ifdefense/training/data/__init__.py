"""What networks are trained on: solids, surfaces and clouds, where they come from, and their cache."""
