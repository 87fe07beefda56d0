"""Gradients with and without statistical outlier removal, taken together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.base import Ball, Oracle, ThreatModel
from attacks.defence_aware.adaptive import selected
from attacks.functional.losses import cross_entropy
from ifdefense.geometry.points import knn


def far_from_neighbours(points: Tensor, k: int = 10, sigmas: float = 1.0) -> Tensor:
    """``(B, N)`` mask of the points that statistical outlier removal keeps.

    A point stays when its mean distance to ``k`` neighbours is at most ``mean + sigmas * std`` over its
    cloud. The distances are not squared and the deviation is that of the whole population, as in JGBA;
    `ifdefense.stages.outliers.statistical_outlier_removal` is that of DUP-Net.
    """
    squared, _ = knn(points, points, min(k + 1, points.shape[1]))
    value = squared[..., 1:].sqrt().mean(2)
    limit = value.mean(1, keepdim=True) + sigmas * value.std(1, correction=0, keepdim=True)
    return value <= limit * (1 + 1e-5)  # on a regular grid all values are the mean, up to rounding


@dataclass(frozen=True)
class JGBA(Ball):
    """Joint gradient based attack: fools a classifier with and without outlier removal.

    Ma et al., 2020, "Efficient Joint Gradient Based Attack Against SOR Defense for 3D Point Cloud
    Classification", ACM MM, `doi:10.1145/3394171.3413875 <https://doi.org/10.1145/3394171.3413875>`_.

    Every step moves each point a fixed length against the mean of two gradients of the cross-entropy: that
    of the cloud, and that of the points which outlier removal leaves of it, an exact gradient as it is a
    choice among the points.

    Differs from the public code, which limits each *step* to ``epsilon`` and so reaches 0.4: here the whole
    displacement stays within ``epsilon``. There the coordinates are clipped to [-1, 1], here not. Classifiers
    see as many points as without outlier removal, those that stay in turn again, which is no difference for
    a maximum over points.

    Attributes:
        epsilon: largest displacement of a point (published: 0.1).
        iterations: steps (published: 40).
        step: length of a point's step (published: 0.01).
        outliers: the removal that is aimed at, a mask of the points that stay (published: 10 neighbours, 1
            standard deviation).

    Raises:
        ValueError: if a length is negative or there is no iteration.
    """

    epsilon: float = 0.1
    iterations: int = 40
    step: float = 0.01
    outliers: Callable[[Tensor], Tensor] = far_from_neighbours

    def __post_init__(self) -> None:
        if self.epsilon < 0 or self.step < 0:
            raise ValueError(f"a budget must not be negative, got epsilon={self.epsilon}, step={self.step}")
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")

    @property
    def threat(self) -> ThreatModel:
        """White box, with the knowledge of the outlier removal; shifts of single points."""
        return ThreatModel("white-box", "both", "shift", "point-l2", self.epsilon)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Descends along the joint gradient; the last iterate is the result."""
        attacked = points
        tiny = torch.finfo(points.dtype).tiny
        for _ in range(self.iterations):
            _, bare = oracle.gradient(attacked, cross_entropy)
            joint = (bare + self._through_removal(oracle, attacked)) / 2
            unit = joint / joint.norm(dim=2, keepdim=True).clamp_min(tiny)
            attacked = self.constrain(attacked - self.step * unit, points)
        return attacked, torch.full_like(oracle.queries, self.iterations)

    def _through_removal(self, oracle: Oracle, points: Tensor) -> Tensor:
        """``(B, N, 3)`` gradient of the loss after outlier removal; 0 for points that it takes away."""
        mask = self.outliers(points)
        with torch.enable_grad():
            source = points.detach().requires_grad_()
            left = selected(source, mask)
            _, gradient = oracle.gradient(left, cross_entropy)
            (routed,) = torch.autograd.grad(left, source, gradient)
        return routed
