"""The kNN attack: shifts without outliers, on or outside of the surface."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attacks.base import Ball, Oracle, ThreatModel
from attacks.functional import distances, projections
from attacks.functional.losses import hinge
from attacks.optimised.carlini_wagner import shared_noise
from ifdefense.geometry.normals import outward_normals


@dataclass(frozen=True)
class KNN(Ball):
    """Shifts points such that none stands out.

    Tsai et al., 2020, `Robust Adversarial Objects against Deep Learning Models
    <https://doi.org/10.1609/aaai.v34i01.5443>`_, with the settings of IF-Defense,
    `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_.

    Minimises with Adam ``hinge(logits) + N (chamfer_weight D + knn_weight S)``: D is the mean squared
    distance of the N attacked points from the nearest clean ones, and S is `distances.knn_smoothness`. After
    each step points that have moved inwards are brought back onto the tangent plane, and no point may be
    farther than ``epsilon`` from where it was. The last iterate is the result.

    Differs from IF-Defense's code in the projection: a shift is multiplied elementwise by a vector of the
    tangent plane there, where its projection onto the plane is meant; here, one that points inwards loses its
    inward component and nothing else. Normals are estimated where none are given, instead of leaving the
    projection out. All clouds of a batch start from the same noise.

    Attributes:
        kappa: margin of the hinge in logits (published: 15).
        epsilon: largest shift of a point (published: 0.1).
        chamfer_weight: weight of D (published: 5).
        knn_weight: weight of S (published: 3).
        k: neighbours of a point in S (published: 5).
        alpha: standard deviations above the mean from which on a point counts in S (published: 1.05).
        iterations: steps of Adam (published: 2500).
        rate: learning rate of Adam (published: 1e-3).
        noise: standard deviation of the noise to start from (published: 1e-7).
        project: whether points are kept from moving inwards (published: yes, where normals are known).
        normals: ``(B, N, 3)`` outward unit normals of the very batch that is attacked; by default
            `outward_normals`.

    Raises:
        ValueError: if a number is out of range, or normals do not fit the clouds.
    """

    kappa: float = 15.0
    epsilon: float = 0.1
    chamfer_weight: float = 5.0
    knn_weight: float = 3.0
    k: int = 5
    alpha: float = 1.05
    iterations: int = 2500
    rate: float = 1e-3
    noise: float = 1e-7
    project: bool = True
    normals: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.k < 1:
            raise ValueError(f"iterations and k must be at least 1, got {self.iterations} and {self.k}")
        if self.epsilon < 0:
            raise ValueError(f"a budget must not be negative, got epsilon={self.epsilon}")
        if min(self.kappa, self.noise, self.chamfer_weight, self.knn_weight) < 0 or self.rate <= 0:
            raise ValueError(f"kappa, weights, noise and rate must not be negative: {self}")

    @property
    def threat(self) -> ThreatModel:
        """White box, targeted or untargeted shifts of each point."""
        return ThreatModel("white-box", "both", "shift", "point-l2", self.epsilon)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Descends from the clean clouds."""
        normals = self._normals(points) if self.project else None
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
            distance = self.chamfer_weight * distances.directed_chamfer(variable, points)
            distance = distance + self.knn_weight * distances.knn_smoothness(variable, self.k, self.alpha)
            (gradient,) = torch.autograd.grad(points.shape[1] * distance.sum(), variable)
        return gradient

    def _normals(self, points: Tensor) -> Tensor:
        if self.normals is None:
            return outward_normals(points)
        if self.normals.shape != points.shape:
            given, clouds = tuple(self.normals.shape), tuple(points.shape)
            raise ValueError(f"normals of shape {given} do not fit clouds of shape {clouds}")
        return self.normals.to(points)


def outside(shift: Tensor, normals: Tensor) -> Tensor:
    """Nearest shifts that do not lead inwards: without what points against the normal.

    Args:
        shift: ``(B, N, 3)`` shifts.
        normals: ``(B, N, 3)`` outward unit normals.
    """
    inwards = (shift * normals).sum(2, keepdim=True).clamp_max(0)
    return shift - inwards * normals
