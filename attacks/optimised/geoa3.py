"""GeoA3: shifts that keep the geometry."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attacks.base import Oracle, ThreatModel
from attacks.functional import distances
from attacks.functional.losses import cross_entropy
from attacks.optimised.carlini_wagner import CarliniWagner, Problem, Rows, shared_noise
from ifdefense.geometry.normals import estimated_normals
from ifdefense.geometry.points import gather


@dataclass(frozen=True)
class GeoA3(CarliniWagner):
    """Shifts points such that the surface stays where it was and bends as it did.

    Wen et al., 2020, `arXiv:1912.11171 <https://arxiv.org/abs/1912.11171>`_, with the settings of the
    authors' code.

    Minimises ``loss(logits) + weight * distance``, as `CarliniWagner` does; the distance is the two-sided
    Chamfer distance, plus ``hausdorff_weight`` times the one-sided Hausdorff distance (both squared), plus
    ``curvature_weight`` times `distances.curvature_difference`. Nothing is clipped.

    Differs from the authors' code in that an iterate is judged by its own distance, not by that of the
    iterate before, in that a search has succeeded if any iterate has, whatever the last example of the batch
    does, in that normals are estimated where none are given, and in that all clouds of a batch start from the
    same noise.

    Attributes:
        kappa: margin of the hinge in logits (published: 0).
        first_weight: weight of the distance in the first search (published: 10).
        largest_weight: upper end of the bisection (published: none).
        searches: steps of the bisection (published: 10).
        iterations: steps of Adam a search (published: 500).
        rate: learning rate of Adam (published: 1e-2).
        noise: standard deviation of the noise each search starts from (published: 1e-3).
        polish: steps after the first success of a search (published: all that are left), see `CarliniWagner`.
        misclassification: the loss (published: cross-entropy; the paper compares both).
        hausdorff_weight: weight of the Hausdorff distance (published: 0.1).
        curvature_weight: weight of the difference in curvature (published: 1).
        k: neighbours that the curvature is taken from (published: 16).
        normals: ``(B, N, 3)`` unit normals, of either sign, of the very batch that is attacked; by default
            those of principal components.

    Raises:
        ValueError: if a number is out of range, or normals do not fit the clouds.
    """

    nearer_only: ClassVar[bool] = False

    largest_weight: float = math.inf
    noise: float = 1e-3
    misclassification: Literal["cross-entropy", "hinge"] = "cross-entropy"
    hausdorff_weight: float = 0.1
    curvature_weight: float = 1.0
    k: int = 16
    normals: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.misclassification not in ("cross-entropy", "hinge"):
            raise ValueError(
                f"unknown misclassification {self.misclassification!r}; there are: cross-entropy, hinge"
            )
        if min(self.hausdorff_weight, self.curvature_weight) < 0 or self.k < 1:
            raise ValueError(f"weights must not be negative and k at least 1: {self}")

    @property
    def threat(self) -> ThreatModel:
        """White box, targeted or untargeted, the smallest change of the geometry."""
        return ThreatModel("white-box", "both", "shift")

    @property
    def loss(self) -> Callable[[Tensor, Tensor, bool], Tensor]:
        """Cross-entropy or hinge."""
        return cross_entropy if self.misclassification == "cross-entropy" else super().loss

    def problem(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> Problem:
        """Varies the clouds themselves."""
        if self.normals is not None and self.normals.shape != points.shape:
            given, clean = tuple(self.normals.shape), tuple(points.shape)
            raise ValueError(f"normals of shape {given} do not fit clouds of shape {clean}")
        normals = estimated_normals(points) if self.normals is None else self.normals.to(points)
        curvature = distances.curvature(points, normals, self.k)
        # What a point takes from its nearest clean one: one search serves all three distances.
        expected = torch.cat([normals, curvature.unsqueeze(2)], 2)

        def distance(_: list[Tensor], clouds: Tensor, rows: Rows) -> Tensor:
            there, index = distances.nearest(clouds, points[rows])
            back = distances.nearest(points[rows], clouds)[0]
            taken = gather(expected[rows], index)
            bent = distances.curvature(clouds, taken[..., :3], self.k) - taken[..., 3]
            return (
                there.mean(1)
                + back.mean(1)
                + self.hausdorff_weight * there.amax(1)
                + self.curvature_weight * bent.square().mean(1)
            )

        return Problem(
            start=lambda generator: [points + self.noise * shared_noise(points, generator)],
            clouds=lambda variables, _: variables[0],
            distance=distance,
        )
