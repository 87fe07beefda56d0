"""Shape-invariant attack: steps in the tangent planes."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from attacks.base import Ball, Norm, ThreatModel
from attacks.functional.losses import hinge
from attacks.oracle import Oracle
from attacks.settings import NonNegativeFloat, PositiveInt, Range
from ifdefense.geometry.normals import estimated_normals


@dataclass(frozen=True)
class SIAdv(Ball):
    """Shape-invariant attack: iterated gradient steps in the tangent plane of each point.

    Huang et al., CVPR 2022, `arXiv:2203.04041 <https://arxiv.org/abs/2203.04041>`_, the white-box attack.
    Steps go along ``g - <g, n> n`` with a norm of ``step * sqrt(3 N)`` over the cloud; normals n are
    re-estimated at every step. Examples that have reached their goal have no gradient and are not moved.

    Differs from the public code in the budget: it clamps each *coordinate* of the shift to +-0.16
    (``norm="linf"`` here), so that a point may move by 0.277; the default here limits the *length* of each
    point's shift to 0.16, which is stricter. The first normals are also estimated, not taken from the data.

    Attributes:
        epsilon: budget in ``norm`` (published: 0.16 in ``"linf"``).
        iterations: steps (published: 50).
        step: length of a step per coordinate (published: 0.007).
        kappa: margin of the hinge in logits (published: 0).
        neighbours: points per estimated normal, at least 3 (published: 20).
        norm: norm of the budget.

    Examples:
        >>> attack = attacks.SIAdv(iterations=2, neighbours=8)
        >>> result = attack(classifier, points, labels)
        >>> result.points.shape
        torch.Size([2, 64, 3])
    """

    epsilon: NonNegativeFloat = 0.16
    iterations: PositiveInt = 50
    step: NonNegativeFloat = 0.007
    kappa: NonNegativeFloat = 0.0
    neighbours: Annotated[int, Range(3)] = 20
    norm: Norm = "point-l2"

    @property
    def threat(self) -> ThreatModel:
        """White-box shifts along the surface."""
        return ThreatModel("white-box", "both", "shift", self.norm, self.epsilon)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Descends along the surface; returns the last iterate."""
        loss = functools.partial(hinge, kappa=self.kappa)
        length = self.step * math.sqrt(3 * points.shape[1])
        tiny = torch.finfo(points.dtype).tiny
        attacked = points.clone()
        for _ in range(self.iterations):
            _, gradient = oracle.gradient(attacked, loss)
            rows = gradient.flatten(1).any(1).nonzero().squeeze(1)  # successful examples are not moved
            if len(rows) == 0:
                continue
            here, gradient = attacked[rows], gradient[rows]
            normals = estimated_normals(here, self.neighbours)
            tangent = gradient - (gradient * normals).sum(2, keepdim=True) * normals
            size = tangent.flatten(1).norm(dim=1)[:, None, None]
            attacked[rows] = self.constrain(here - length * tangent / size.clamp_min(tiny), points[rows])
        return attacked, torch.full_like(oracle.queries, self.iterations)
