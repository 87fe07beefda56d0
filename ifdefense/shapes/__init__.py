"""Procedural solids with exact signed distances."""
