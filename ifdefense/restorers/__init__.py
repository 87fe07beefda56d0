"""Restorers: from the field of an implicit function to points of its surface."""
