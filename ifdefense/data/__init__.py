"""Data: readers of what people have, ModelNet40, corruption, and a procedural set that needs no download."""

from .cloudset import CloudSet

__all__ = ["CloudSet"]
