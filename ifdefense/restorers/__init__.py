"""Restorers: from the field of an implicit function to points on its surface."""
