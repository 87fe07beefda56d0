"""Dropping the points that a classifier relies on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.base import Attack, Oracle, ThreatModel
from attacks.losses import cross_entropy


@dataclass(frozen=True)
class SaliencyDrop(Attack):
    """Drops the most salient points, a few a round.

    Zheng et al., 2019, `arXiv:1812.01687 <https://arxiv.org/abs/1812.01687>`_.

    A point x counts as dropped when it is moved to the centre c of its cloud, where it cannot be told from
    the inside. With the loss L of the true class and r = |x - c|, the gain of doing so is to first order,
    equation (8) with alpha as its scale, ``-r^alpha <x - c, dL/dx>``; the points with the largest gain go.
    The centre is the median.

    Attributes:
        num: points to drop (published: 100 and 200).
        per_round: points a round; the saliency is computed anew for every round (published: 5).
        alpha: exponent of the radius (published: 1).

    Raises:
        ValueError: if the numbers are not positive.
    """

    num: int = 200
    per_round: int = 5
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.num < 1 or self.per_round < 1:
            raise ValueError(f"num and per_round must be at least 1, got {self.num} and {self.per_round}")

    @property
    def threat(self) -> ThreatModel:
        """White box, untargeted, drops ``num`` points."""
        return ThreatModel("white-box", "untargeted", "drop", count=self.num)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Drops points round by round; the others keep their order."""
        if points.shape[1] <= self.num:
            raise ValueError(f"cannot drop {self.num} points from clouds of {points.shape[1]}")
        rounds = -(-self.num // self.per_round)
        for dropped in range(0, self.num, self.per_round):
            kept = points.shape[1] - min(self.per_round, self.num - dropped)
            _, gradient = oracle.gradient(points, cross_entropy)
            offset = points - points.median(1, keepdim=True).values
            # The attacker's loss is minus L, so this is the gain itself.
            gain = offset.norm(dim=2) ** self.alpha * (offset * gradient).sum(2)
            index = gain.topk(kept, 1, largest=False, sorted=False).indices.sort(1).values
            points = points.gather(1, index.unsqueeze(2).expand(-1, -1, 3))
        return points, torch.full_like(oracle.queries, rounds)
