"""The nearest success of each example over the iterates of an attack."""

from __future__ import annotations

import torch
from torch import Tensor

from attacks.base import Rows


class Nearest:
    """Keeps, per example, the cloud of highest rank, and among equals the nearest.

    Args:
        points: ``(B, N, 3)`` clean clouds.
    """

    def __init__(self, points: Tensor) -> None:
        self.points = points.clone()
        self.rank = torch.zeros(len(points), dtype=torch.int64, device=points.device)
        """``(B,)`` rank of the kept cloud, 0 if there is none."""
        self.size = points.new_full((len(points),), torch.inf)
        """``(B,)`` distance of the kept cloud."""

    def see(self, points: Tensor, size: Tensor, rank: Tensor, rows: Rows = slice(None)) -> Tensor:
        """Takes clouds ``(b, N, 3)`` of the examples ``rows`` with distances and ranks, 0 for failures.

        Returns:
            The indices of the examples whose cloud is kept from now on.
        """
        had = self.rank[rows]
        better = (rank > had) | ((rank == had) & (rank > 0) & (size < self.size[rows]))
        which = torch.arange(len(self.size), device=better.device)[rows][better]
        self.points[which], self.size[which], self.rank[which] = points[better], size[better], rank[better]
        return which

    def result(self, last: Tensor) -> Tensor:
        """``(B, N, 3)`` kept clouds, or ``last`` where there is none."""
        return torch.where((self.rank > 0)[:, None, None], self.points, last)
