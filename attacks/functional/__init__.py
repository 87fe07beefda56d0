"""Distances, losses and projections as plain functions."""
