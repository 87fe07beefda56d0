"""Adding small clusters of points."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.adding.critical import critical_points, draw_members, seed_clusters
from attacks.base import Oracle, ThreatModel
from attacks.functional import distances
from attacks.optimised.carlini_wagner import CarliniWagner, Problem, shared_noise
from ifdefense.geometry.points import gather


@dataclass(frozen=True)
class AddCluster(CarliniWagner):
    """Adds a few tight clusters of points near the cloud.

    Xiang et al., 2019, `arXiv:1809.07016 <https://arxiv.org/abs/1809.07016>`_, with the settings of
    IF-Defense, `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_.

    Minimises ``hinge(logits) + weight * distance``, as `CarliniWagner` does; the distance is the sum of the
    clusters' diameters (not squared) plus ``chamfer_weight`` times the mean squared distance of the added
    points from the nearest original ones. Clusters start from the largest clusters, by DBSCAN, of the
    critical points, and come one after another, last in the returned clouds; the original points stay as
    they are.

    Differs from IF-Defense's code in that a cluster of too few points is repeated whole instead of drawn from
    with replacement, in that too few clusters, or none, are no error, and in that all clouds of a batch share
    their random numbers.

    Attributes:
        kappa: margin of the hinge in logits (published: 0).
        first_weight: weight of the distance in the first search (published: 5).
        largest_weight: upper end of the bisection (published: 30).
        searches: steps of the bisection (published: 5).
        iterations: steps of Adam a search (published: 500).
        rate: learning rate of Adam (published: 1e-2).
        noise: standard deviation of the noise each search starts from (published: 1e-7).
        polish: steps after the first success of a search (published: all that are left), see `CarliniWagner`.
        num: clusters to add (published: 3).
        size: points of a cluster (published: 32).
        chamfer_weight: weight of the Chamfer distance against the diameters (published: 0.1).
        critical: critical points to look for clusters in (published: 128); all if there are fewer.
        radius: radius of DBSCAN's neighbourhoods in units of the cloud (published: 0.2).
        least: points that make a neighbourhood dense (published: 3).

    Raises:
        ValueError: if a number is out of range.
    """

    first_weight: float = 5.0
    largest_weight: float = 30.0
    searches: int = 5
    num: int = 3
    size: int = 32
    chamfer_weight: float = 0.1
    critical: int = 128
    radius: float = 0.2
    least: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num < 1 or self.size < 1 or self.critical < self.num:
            raise ValueError(
                "num and size must be at least 1, and critical at least num, "
                f"got num={self.num}, size={self.size}, critical={self.critical}"
            )

    @property
    def threat(self) -> ThreatModel:
        """White box, targeted or untargeted, ``num`` clusters of ``size`` points."""
        return ThreatModel("white-box", "both", "add", count=self.num * self.size)

    def distance(self, added: Tensor, clean: Tensor) -> Tensor:
        """``(B,)`` spread of added clusters, and distance from clean clouds."""
        clusters = added.unflatten(1, (self.num, self.size))
        spread: Tensor = (
            distances.diameter(clusters.flatten(0, 1)).unflatten(0, (len(added), self.num)).sum(1)
        )
        return spread + self.chamfer_weight * distances.directed_chamfer(added, clean)

    def problem(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> Problem:
        """Varies the added points, from clusters of critical ones on."""
        critical = critical_points(oracle, points, min(self.critical, points.shape[1]))
        members = seed_clusters(critical, self.num, self.size, self.radius, self.least, generator)
        first = gather(critical, draw_members(members, self.size, generator)).flatten(1, 2)
        return Problem(
            start=lambda generator: [first + self.noise * shared_noise(first, generator)],
            clouds=lambda variables, rows: torch.cat([points[rows], variables[0]], 1),
            distance=lambda variables, _, rows: self.distance(variables[0], points[rows]),
        )
