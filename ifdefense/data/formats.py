"""Reads and writes single files of clouds and meshes."""

from __future__ import annotations

from .packed import load_packed_meshes

__all__ = ["load_packed_meshes"]
