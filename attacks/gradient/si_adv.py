"""Moving points along the surface that they lie on."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.base import Ball, Oracle, ThreatModel
from attacks.functional.losses import hinge
from ifdefense.geometry.normals import estimated_normals


@dataclass(frozen=True)
class SIAdv(Ball):
    """Shape-invariant attack: iterated gradient steps in the tangent plane of every point.

    Huang et al., CVPR 2022, `arXiv:2203.04041 <https://arxiv.org/abs/2203.04041>`_, the white-box attack.

    The paper turns each point's frame so that its third axis is the normal n, and takes a gradient step in
    the first two; that is the step along ``g - <g, n> n``. All points of a cloud share one step length, which
    is ``step * sqrt(3 N)`` over all points together. The normals are estimated anew from the cloud of each
    step.

    Differs from the public code in that the first normals are estimated as well, not taken from the data set,
    and in that batches are attacked at once. As there, an example that has reached its goal with the margin
    ``kappa`` has no gradient any more and stays.

    Attributes:
        epsilon: largest displacement of a point (published: 0.16).
        iterations: steps (published: 50).
        step: length of a step a coordinate (published: 0.007).
        kappa: margin of the hinge in logits (published: 0).
        neighbours: points that a normal is estimated from (published: 20).

    Raises:
        ValueError: if a number is out of range.
    """

    epsilon: float = 0.16
    iterations: int = 50
    step: float = 0.007
    kappa: float = 0.0
    neighbours: int = 20

    def __post_init__(self) -> None:
        if self.epsilon < 0 or self.step < 0 or self.kappa < 0:
            raise ValueError(f"epsilon, step and kappa must not be negative: {self}")
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")
        if self.neighbours < 3:
            raise ValueError(f"a plane needs at least 3 neighbours, got {self.neighbours}")

    @property
    def threat(self) -> ThreatModel:
        """White box, shifts of single points."""
        return ThreatModel("white-box", "both", "shift", "point-l2", self.epsilon)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Descends along the surface; the last iterate is the result."""
        loss = functools.partial(hinge, kappa=self.kappa)
        length = self.step * math.sqrt(3 * points.shape[1])
        tiny = torch.finfo(points.dtype).tiny
        attacked = points.clone()
        for _ in range(self.iterations):
            _, gradient = oracle.gradient(attacked, loss)
            rows = gradient.flatten(1).any(1).nonzero().squeeze(1)  # those who stay need no normals
            if len(rows) == 0:
                continue
            here, gradient = attacked[rows], gradient[rows]
            normals = estimated_normals(here, self.neighbours)
            tangent = gradient - (gradient * normals).sum(2, keepdim=True) * normals
            size = tangent.flatten(1).norm(dim=1)[:, None, None]
            attacked[rows] = self.constrain(here - length * tangent / size.clamp_min(tiny), points[rows])
        return attacked, torch.full_like(oracle.queries, self.iterations)
