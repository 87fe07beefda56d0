"""Attacks that add points."""
