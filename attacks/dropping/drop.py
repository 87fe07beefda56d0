"""Dropping points: those that a classifier relies on, random ones, random regions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.base import Attack, Oracle, ThreatModel
from attacks.functional.losses import cross_entropy
from ifdefense.geometry import points as operations


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
        _check_enough(points, self.num)
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


@dataclass(frozen=True)
class RandomDrop(Attack):
    """Drops random points, the same indices in every cloud, and asks the model nothing.

    The baseline of Zheng et al., 2019, `arXiv:1812.01687 <https://arxiv.org/abs/1812.01687>`_, section 5.
    "Score-based" is the least knowledge that a threat model can state; the one query is the last check.

    Attributes:
        num: points to drop (published for the saliency drop: 100 and 200).

    Raises:
        ValueError: if the number is not positive.
    """

    num: int = 200

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"num must be at least 1, got {self.num}")

    @property
    def threat(self) -> ThreatModel:
        """No knowledge, untargeted, drops ``num`` points."""
        return ThreatModel("score-based", "untargeted", "drop", count=self.num)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Drops at once; the others keep their order."""
        _check_enough(points, self.num)
        left = torch.randperm(points.shape[1], generator=generator)[self.num :].sort().values
        return points[:, left.to(points.device)], torch.ones_like(oracle.queries)


@dataclass(frozen=True)
class LocalDrop(Attack):
    """Drops the neighbourhoods of a few random points, and asks the model nothing.

    "Drop Local" of ModelNet-C, Ren et al., 2022, `arXiv:2202.03377 <https://arxiv.org/abs/2202.03377>`_: one
    region after another, a random point that is left goes together with those that are nearest to it.

    Differs from ModelNet-C in that the number of regions is given, there it is random up to 8, and that all
    have the same size within a point, there their sizes are random too; and in that all clouds of a batch
    choose the same points by their index. "Score-based" is the least knowledge that a threat model can state.

    Attributes:
        num: points to drop (published: 100, 200, ... 500).
        clusters: regions (published: at most 8, 4 in the middle).

    Raises:
        ValueError: if the numbers are not positive, or there are more regions than points to drop.
    """

    num: int = 200
    clusters: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.clusters <= self.num:
            raise ValueError(f"clusters must lie in 1..num, got {self.clusters} for num {self.num}")

    @property
    def threat(self) -> ThreatModel:
        """No knowledge, untargeted, drops ``num`` points."""
        return ThreatModel("score-based", "untargeted", "drop", count=self.num)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Drops region by region; the others keep their order."""
        _check_enough(points, self.num)
        drawn = torch.rand(self.clusters, generator=generator, dtype=torch.float64).tolist()
        for cluster, share in enumerate(drawn):
            size = self.num // self.clusters + (cluster < self.num % self.clusters)
            centre = torch.full_like(oracle.queries, int(share * points.shape[1]))
            points = operations.split_neighbourhood(points, centre, size)[1]
        return points, torch.full_like(oracle.queries, self.clusters)


def _check_enough(points: Tensor, num: int) -> None:
    if points.shape[1] <= num:
        raise ValueError(f"cannot drop {num} points from clouds of {points.shape[1]}")
