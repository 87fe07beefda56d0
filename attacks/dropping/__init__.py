"""Dropping points."""
