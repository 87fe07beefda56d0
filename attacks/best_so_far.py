"""Best result of an attack so far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attacks.oracle import Rows


class BestSoFar:
    """Keeps, per example, the tensors of highest rank, then of lowest value, then the first.

    Args:
        like: ``(B, ...)`` tensor of the batch, for its length, dtype and device.
    """

    def __init__(self, like: Tensor) -> None:
        self.kept: list[Tensor] = []
        """Best tensors, each ``(B, ...)``, clouds first."""
        self.rank = torch.zeros(len(like), dtype=torch.int64, device=like.device)
        """``(B,)`` their rank, 0 if there is none."""
        self.value = like.new_full((len(like),), torch.inf)
        """``(B,)`` their value, infinite if there is none."""

    def see(
        self,
        tensors: Sequence[Tensor],
        rank: Tensor,
        value: Tensor | None = None,
        rows: Rows = slice(None),
    ) -> None:
        """Copies improved results.

        Args:
            tensors: ``(b, ...)`` each, of the examples ``rows``; as many in every call.
            rank: ``(b,)`` ranks; 0 is never kept.
            value: ``(b,)`` values; all equal by default.
            rows: the examples.
        """
        if not self.kept:
            self.kept = [new.new_zeros(len(self.rank), *new.shape[1:]) for new in tensors]
        had = self.rank[rows]
        value = torch.zeros_like(self.value[rows]) if value is None else value
        better = (rank > had) | ((rank == had) & (rank > 0) & (value < self.value[rows]))
        chosen = better.nonzero().squeeze(1)  # computed once, as it synchronises a GPU
        which = torch.arange(len(self.rank), device=chosen.device)[rows][chosen]
        for kept, new in zip([self.rank, self.value, *self.kept], [rank, value, *tensors], strict=True):
            kept[which] = new[chosen]

    def clouds(self, otherwise: Tensor) -> Tensor:
        """``(B, N, 3)`` best clouds, or ``otherwise`` where there are none."""
        return torch.where((self.rank > 0)[:, None, None], self.kept[0], otherwise)
