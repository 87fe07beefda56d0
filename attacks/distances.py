"""Distances between an attacked cloud and the clean one, point by point: ``(B, N, 3)`` twice to ``(B,)``."""

from __future__ import annotations

import torch
from torch import Tensor


def l2(points: Tensor, clean: Tensor) -> Tensor:
    """Norm of the displacements of all points together."""
    size: Tensor = torch.linalg.vector_norm((points - clean).flatten(1), dim=1)
    return size


def point_l2(points: Tensor, clean: Tensor) -> Tensor:
    """Largest displacement of a point."""
    sizes: Tensor = torch.linalg.vector_norm(points - clean, dim=2)
    return sizes.amax(1)


def linf(points: Tensor, clean: Tensor) -> Tensor:
    """Largest change of a coordinate."""
    return (points - clean).abs().flatten(1).amax(1)
