"""Optimisation of a distance, of smoothness or of transferability."""
