"""Attacks that drop points."""
