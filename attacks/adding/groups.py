"""Base of adding clusters and adding objects."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.adding.critical import critical_points, seed_clusters
from attacks.base import ThreatModel
from attacks.optimised.carlini_wagner import CarliniWagner
from attacks.oracle import Oracle
from attacks.settings import NonNegativeFloat, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class AddGroups(CarliniWagner):
    """Base of attacks that add groups of points at clusters of critical points.

    Attributes:
        num: groups to add (published: 3).
        size: points per group.
        chamfer_weight: weight of the Chamfer distance of the added points.
        critical: critical points to cluster, at most all (published: 128).
        radius: radius of DBSCAN in units of the cloud (published: 0.2).
        least: points of a dense neighbourhood (published: 3).
    """

    first_weight: PositiveFloat = 5.0
    searches: PositiveInt = 5
    num: PositiveInt = 3
    size: PositiveInt = 32
    chamfer_weight: NonNegativeFloat = 0.1
    critical: PositiveInt = 128
    radius: NonNegativeFloat = 0.2
    least: PositiveInt = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.critical < self.num:
            raise ValueError(f"critical must be at least num, got {self.critical} and {self.num}")

    @property
    def threat(self) -> ThreatModel:
        """White-box, targeted or untargeted, ``num`` groups of ``size`` points."""
        return ThreatModel("white-box", "both", "add", count=self.num * self.size)

    def seeds(
        self, oracle: Oracle, points: Tensor, size: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """``(B, K, 3)`` critical points and ``(B, num, K)`` masks of the groups, see `seed_clusters`."""
        critical = critical_points(oracle, points, min(self.critical, points.shape[1]))
        return critical, seed_clusters(critical, self.num, size, self.radius, self.least, generator)
