"""The nearest success of each example over the iterates of an attack."""

from __future__ import annotations

import torch
from torch import Tensor


class Nearest:
    """Keeps, for each example, the nearest cloud of the best rank seen so far.

    Args:
        points: ``(B, N, 3)`` clean clouds.
    """

    def __init__(self, points: Tensor) -> None:
        self.points = points.clone()
        self.rank = torch.zeros(len(points), dtype=torch.int64, device=points.device)
        """``(B,)`` rank of what is kept, 0 while nothing is."""
        self.size = points.new_full((len(points),), torch.inf)
        """``(B,)`` size of what is kept."""

    def see(self, points: Tensor, size: Tensor, rank: Tensor, rows: Tensor | slice = slice(None)) -> None:
        """Takes clouds that are of a higher rank than what is kept, or of its rank and nearer.

        Args:
            points: ``(b, N, 3)`` attacked clouds.
            size: ``(b,)`` sizes of their change.
            rank: ``(b,)`` how well they do, 0 for a failure.
            rows: examples that they stand for.
        """
        had = self.rank[rows]
        better = (rank > had) | ((rank == had) & (rank > 0) & (size < self.size[rows]))
        which = torch.arange(len(self.size), device=better.device)[rows][better]
        self.points[which], self.size[which], self.rank[which] = points[better], size[better], rank[better]

    def result(self, last: Tensor) -> Tensor:
        """``(B, N, 3)`` what is kept, and the last iterate of an example without any success."""
        return torch.where((self.rank > 0)[:, None, None], self.points, last)
