"""Dropping salient points, random points or random regions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.base import Attack, ThreatModel
from attacks.functional.losses import cross_entropy
from attacks.functional.selection import saliency
from attacks.oracle import Oracle
from attacks.settings import FiniteFloat, PositiveInt
from ifdefense.geometry import points as operations


@dataclass(frozen=True)
class SaliencyDrop(Attack):
    """Drops the most salient points, a few per round.

    Zheng et al., 2019, `arXiv:1812.01687 <https://arxiv.org/abs/1812.01687>`_, see
    `attacks.functional.selection.saliency`.

    Attributes:
        num: points to drop (published: 100 and 200).
        per_round: points per computation of the saliency (published: 5).
        alpha: exponent of the radius (published: 1).

    Examples:
        >>> attack = attacks.SaliencyDrop(num=16, per_round=8)
        >>> result = attack(classifier, points, labels)
        >>> result.points.shape
        torch.Size([2, 48, 3])
    """

    num: PositiveInt = 200
    per_round: PositiveInt = 5
    alpha: FiniteFloat = 1.0

    @property
    def threat(self) -> ThreatModel:
        """White-box, untargeted."""
        return ThreatModel("white-box", "untargeted", "drop", count=self.num)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Drops points in rounds; the others keep their order."""
        _check_enough(points, self.num)
        rounds = -(-self.num // self.per_round)
        for dropped in range(0, self.num, self.per_round):
            kept = points.shape[1] - min(self.per_round, self.num - dropped)
            _, gradient = oracle.gradient(points, cross_entropy)
            gain = saliency(points, gradient, self.alpha)
            index = gain.topk(kept, 1, largest=False, sorted=False).indices.sort(1).values
            points = points.gather(1, index.unsqueeze(2).expand(-1, -1, 3))
        return points, torch.full_like(oracle.queries, rounds)


@dataclass(frozen=True)
class RandomDrop(Attack):
    """Drops random points, the same indices in every cloud, without queries.

    The baseline of Zheng et al., 2019, `arXiv:1812.01687 <https://arxiv.org/abs/1812.01687>`_, section 5.

    Attributes:
        num: points to drop (published for the saliency drop: 100 and 200).

    Examples:
        >>> attack = attacks.RandomDrop(num=16)
        >>> result = attack(classifier, points, labels)
        >>> result.points.shape
        torch.Size([2, 48, 3])
    """

    num: PositiveInt = 200

    @property
    def threat(self) -> ThreatModel:
        """No knowledge, untargeted; "score-based" is the weakest option of a threat model."""
        return ThreatModel("score-based", "untargeted", "drop", count=self.num)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Drops points; the others keep their order."""
        _check_enough(points, self.num)
        left = torch.randperm(points.shape[1], generator=generator)[self.num :].sort().values
        return points[:, left.to(points.device)], torch.ones_like(oracle.queries)


@dataclass(frozen=True)
class LocalDrop(Attack):
    """Drops the neighbourhoods of a few random points, without queries.

    "Drop Local" of ModelNet-C, Ren et al., 2022, `arXiv:2202.03377 <https://arxiv.org/abs/2202.03377>`_.
    Differs in that the number of regions is given and their sizes are equal (both random there), and in that
    all clouds of a batch choose centres by the same indices.

    Attributes:
        num: points to drop (published: 100 to 500).
        clusters: regions (published: at most 8).

    Examples:
        >>> attack = attacks.LocalDrop(num=16, clusters=2)
        >>> result = attack(classifier, points, labels)
        >>> result.points.shape
        torch.Size([2, 48, 3])
    """

    num: PositiveInt = 200
    clusters: PositiveInt = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters > self.num:
            raise ValueError(f"clusters must not exceed num, got {self.clusters} and {self.num}")

    @property
    def threat(self) -> ThreatModel:
        """No knowledge, untargeted; "score-based" is the weakest option of a threat model."""
        return ThreatModel("score-based", "untargeted", "drop", count=self.num)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Drops regions one by one; the others keep their order."""
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
