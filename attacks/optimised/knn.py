"""The kNN attack: shifts without outliers."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attacks.base import Ball, ThreatModel
from attacks.functional import distances, projections
from attacks.functional.losses import hinge
from attacks.functional.noise import shared_noise
from attacks.oracle import Oracle
from attacks.settings import FiniteFloat, NonNegativeFloat, PositiveFloat, PositiveInt
from ifdefense.geometry.normals import given_normals, outward_normals
from ifdefense.geometry.points import directed_chamfer


@dataclass(frozen=True)
class KNN(Ball):
    """Shifts points without making outliers.

    Tsai et al., 2020, `doi:10.1609/aaai.v34i01.5443 <https://doi.org/10.1609/aaai.v34i01.5443>`_, with the
    settings of IF-Defense, `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_. Adam minimises
    ``hinge(logits) + N (chamfer_weight * chamfer + knn_weight * smoothness)`` with the one-sided squared
    Chamfer distance and `distances.knn_smoothness`; after each step, inward shifts are projected onto the
    tangent plane if normals are known, and all shifts onto the budget. Returns the last iterate.

    Differs from IF-Defense's code, which multiplies a shift elementwise by a tangent vector instead of
    projecting it onto the plane; and all clouds of a batch share their noise.

    Attributes:
        kappa: margin of the hinge in logits (published: 15).
        epsilon: longest shift of a point (published: 0.1).
        chamfer_weight: weight of the Chamfer distance (published: 5).
        knn_weight: weight of the smoothness (published: 3).
        k: neighbours (published: 5).
        alpha: outlier threshold in standard deviations (published: 1.05).
        iterations: steps of Adam (published: 2500).
        rate: learning rate of Adam (published: 1e-3).
        noise: standard deviation of the noise at the start (published: 1e-7).
        project: whether inward shifts are projected; by default if there are normals, as published. With
            ``True`` and no normals, `outward_normals` are estimated, which greatly reduces the success.
        normals: ``(B, N, 3)`` outward unit normals of the attacked batch.

    Raises:
        ValueError: if a setting is out of range, or the normals do not match the clouds.

    Examples:
        >>> attack = attacks.KNN(iterations=3)
        >>> result = attack(classifier, points, labels)
        >>> result.points.shape
        torch.Size([2, 64, 3])
    """

    kappa: NonNegativeFloat = 15.0
    epsilon: NonNegativeFloat = 0.1
    chamfer_weight: NonNegativeFloat = 5.0
    knn_weight: NonNegativeFloat = 3.0
    k: PositiveInt = 5
    alpha: FiniteFloat = 1.05
    iterations: PositiveInt = 2500
    rate: PositiveFloat = 1e-3
    noise: NonNegativeFloat = 1e-7
    project: bool | None = None
    normals: Tensor | None = field(default=None, compare=False)

    @property
    def threat(self) -> ThreatModel:
        """White-box, targeted or untargeted shifts of points."""
        return ThreatModel("white-box", "both", "shift", "point-l2", self.epsilon)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Descends from the clean clouds."""
        normals = self._normals(points)
        loss = functools.partial(hinge, kappa=self.kappa)
        attacked = points + self.noise * shared_noise(points, generator)
        adam = torch.optim.Adam([attacked], lr=self.rate)
        for _ in range(self.iterations):
            _, gradient = oracle.gradient(attacked, loss)
            attacked.grad = gradient + self._pull(attacked, points)
            adam.step()
            shift = attacked - points
            if normals is not None:
                shift = outside(shift, normals)
            attacked.copy_(points + projections.point_l2(shift, self.epsilon))
        return attacked, torch.full_like(oracle.queries, self.iterations)

    def _pull(self, attacked: Tensor, points: Tensor) -> Tensor:
        """Gradient of the distance."""
        with torch.enable_grad():
            variable = attacked.detach().requires_grad_()
            distance = self.chamfer_weight * directed_chamfer(variable, points)
            distance = distance + self.knn_weight * distances.knn_smoothness(variable, self.k, self.alpha)
            (gradient,) = torch.autograd.grad(points.shape[1] * distance.sum(), variable)
        return gradient

    def _normals(self, points: Tensor) -> Tensor | None:
        """Normals to project with, if any."""
        if self.normals is not None and self.project is not False:
            return given_normals(self.normals, points)
        return outward_normals(points) if self.project else None


def outside(shift: Tensor, normals: Tensor) -> Tensor:
    """Shifts ``(B, N, 3)`` without their component against the outward unit normals."""
    inwards = (shift * normals).sum(2, keepdim=True).clamp_max(0)
    return shift - inwards * normals
