"""Geometry-aware shifts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attacks.base import ThreatModel
from attacks.functional import distances
from attacks.functional.losses import cross_entropy
from attacks.functional.noise import shared_noise
from attacks.optimised.carlini_wagner import CarliniWagner, SearchSpace
from attacks.oracle import Oracle, Rows
from attacks.settings import NonNegativeFloat, PositiveInt, PositiveOrInfinite
from ifdefense.geometry.normals import estimated_normals, given_normals
from ifdefense.geometry.points import gather, nearest_neighbour


@dataclass(frozen=True)
class GeoA3(CarliniWagner):
    """Smallest geometry-aware shift: keeps the surface and its curvature.

    Wen et al., 2020, `arXiv:1912.11171 <https://arxiv.org/abs/1912.11171>`_. Minimises
    ``loss(logits) + weight * (chamfer + hausdorff_weight * hausdorff + curvature_weight * curvature)``, see
    `CarliniWagner`, with the two-sided Chamfer and one-sided Hausdorff distance (both squared) and
    `distances.curvature_difference`.

    Differs from the authors' code: an iterate is compared by its own distance, not that of its predecessor;
    success of a search is per example, not that of the last example of the batch; all clouds of a batch share
    their noise.

    Attributes:
        misclassification: the loss (published: cross-entropy; the paper compares both).
        hausdorff_weight: weight of the Hausdorff distance (published: 0.1).
        curvature_weight: weight of the curvature difference (published: 1).
        k: neighbours of the curvature (published: 16).
        normals: ``(B, N, 3)`` unit normals of the attacked batch, of either sign; estimated by default.

    Examples:
        >>> attack = attacks.GeoA3(searches=1, iterations=2, k=8)
        >>> result = attack(classifier, points, labels)
        >>> result.points.shape
        torch.Size([2, 64, 3])
    """

    nearer_only: ClassVar[bool] = False

    largest_weight: PositiveOrInfinite = math.inf
    noise: NonNegativeFloat = 1e-3
    misclassification: Literal["cross-entropy", "hinge"] = "cross-entropy"
    hausdorff_weight: NonNegativeFloat = 0.1
    curvature_weight: NonNegativeFloat = 1.0
    k: PositiveInt = 16
    normals: Tensor | None = field(default=None, compare=False)

    @property
    def threat(self) -> ThreatModel:
        """White-box, targeted or untargeted, smallest change of the geometry."""
        return ThreatModel("white-box", "both", "shift")

    @property
    def loss(self) -> Callable[[Tensor, Tensor, bool], Tensor]:
        """Cross-entropy or hinge."""
        return cross_entropy if self.misclassification == "cross-entropy" else super().loss

    def space(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> SearchSpace:
        """Varies the clouds."""
        normals = estimated_normals(points) if self.normals is None else given_normals(self.normals, points)
        curvature = distances.curvature(points, normals, self.k)
        # One neighbour search serves all three distances.
        expected = torch.cat([normals, curvature.unsqueeze(2)], 2)

        def distance(_: list[Tensor], clouds: Tensor, rows: Rows) -> Tensor:
            there, index = nearest_neighbour(clouds, points[rows])
            back = nearest_neighbour(points[rows], clouds)[0]
            taken = gather(expected[rows], index)
            bent = distances.curvature(clouds, taken[..., :3], self.k) - taken[..., 3]
            return (
                there.mean(1)
                + back.mean(1)
                + self.hausdorff_weight * there.amax(1)
                + self.curvature_weight * bent.square().mean(1)
            )

        return SearchSpace(
            start=lambda generator: [points + self.noise * shared_noise(points, generator)],
            clouds=lambda variables, _: variables[0],
            distance=distance,
        )
