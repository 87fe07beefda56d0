"""Attacks that minimise a distance or a smoothness by optimisation."""
