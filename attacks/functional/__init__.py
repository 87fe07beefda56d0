"""Plain functions: distances, losses, projections, selections, noise."""
