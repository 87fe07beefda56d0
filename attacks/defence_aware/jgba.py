"""Joint gradients with and without outlier removal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.base import Ball, Norm, ThreatModel
from attacks.functional.losses import cross_entropy
from attacks.functional.selection import selected
from attacks.oracle import Oracle
from attacks.settings import NonNegativeFloat, PositiveInt
from ifdefense.geometry.points import knn


def far_from_neighbours(points: Tensor, k: int = 10, sigmas: float = 1.0) -> Tensor:
    """``(B, N)`` mask of points whose mean distance to ``k`` neighbours is at most ``mean + sigmas * std``.

    As in JGBA, of plain distances with the population's deviation; DUP-Net's filter is
    `ifdefense.stages.outliers.statistical_outlier_removal`.
    """
    squared, _ = knn(points, points, min(k + 1, points.shape[1]))
    value = squared[..., 1:].sqrt().mean(2)
    limit = value.mean(1, keepdim=True) + sigmas * value.std(1, correction=0, keepdim=True)
    return value <= limit * (1 + 1e-5)  # tolerance for regular grids, where all values equal the mean


@dataclass(frozen=True)
class JGBA(Ball):
    """Joint gradient based attack: fools a classifier with and without outlier removal.

    Ma et al., 2020, ACM MM, `doi:10.1145/3394171.3413875 <https://doi.org/10.1145/3394171.3413875>`_. Each
    step moves each point a fixed length against the mean of two gradients of the cross-entropy: of the cloud
    and of its points after outlier removal, which is exact because the removal only selects points.

    Differs from the public code, which limits each *step* to ``epsilon``, so that shifts reach 0.4, and clips
    coordinates to [-1, 1]. Here removed points are replaced by repeated ones.

    Attributes:
        epsilon: budget in ``norm`` (published: 0.1).
        iterations: steps (published: 40).
        step: length of a point's step (published: 0.01).
        outliers: mask of points to keep (published: 10 neighbours, 1 standard deviation).
        norm: norm of the budget (published: ``"point-l2"``).

    Examples:
        >>> attack = attacks.JGBA(iterations=2)
        >>> result = attack(classifier, points, labels)
        >>> result.points.shape
        torch.Size([2, 64, 3])
    """

    epsilon: NonNegativeFloat = 0.1
    iterations: PositiveInt = 40
    step: NonNegativeFloat = 0.01
    outliers: Callable[[Tensor], Tensor] = far_from_neighbours
    norm: Norm = "point-l2"

    @property
    def threat(self) -> ThreatModel:
        """White-box with the outlier removal; shifts of points."""
        return ThreatModel("white-box", "both", "shift", self.norm, self.epsilon)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Descends along the joint gradient; returns the last iterate."""
        attacked = points
        tiny = torch.finfo(points.dtype).tiny
        for _ in range(self.iterations):
            _, bare = oracle.gradient(attacked, cross_entropy)
            joint = (bare + self._through_removal(oracle, attacked)) / 2
            unit = joint / joint.norm(dim=2, keepdim=True).clamp_min(tiny)
            attacked = self.constrain(attacked - self.step * unit, points)
        return attacked, torch.full_like(oracle.queries, self.iterations)

    def _through_removal(self, oracle: Oracle, points: Tensor) -> Tensor:
        """``(B, N, 3)`` gradient of the loss after outlier removal, 0 for removed points."""
        mask = self.outliers(points)
        with torch.enable_grad():
            source = points.detach().requires_grad_()
            left = selected(source, mask)
            _, gradient = oracle.gradient(left, cross_entropy)
            (routed,) = torch.autograd.grad(left, source, gradient)
        return routed
