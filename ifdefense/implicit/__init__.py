"""Implicit functions conditioned on point clouds."""
