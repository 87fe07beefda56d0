"""Smooth deformations at rough parts of a surface."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from attacks.base import Ball, ThreatModel
from attacks.functional import distances
from attacks.functional.losses import cross_entropy, hinge
from attacks.functional.selection import saliency
from attacks.optimised.carlini_wagner import Search, SearchSpace
from attacks.oracle import Oracle, Rows
from attacks.settings import NonNegativeFloat, PositiveFloat, PositiveInt, Range
from ifdefense.geometry.normals import estimated_normals
from ifdefense.geometry.points import (
    directed_chamfer,
    farthest_point_sampling,
    gather,
    knn,
    squared_distances,
)


def deformed(points: Tensor, centres: Tensor, shift: Tensor, sigma: Tensor) -> Tensor:
    """Moves points by the mean shift of the centres, weighted by Gaussians of the distance.

    ``x + sum_j w_j(x) p_j / sum_j w_j(x)`` with ``w_j(x) = exp(-|x - c_j|^2 / (2 sigma_j^2))``, points x
    ``(B, N, 3)``, centres c and shifts p ``(B, C, 3)``, widths sigma ``(B, C)``.
    """
    exponent = -squared_distances(points, centres) / (2 * sigma * sigma).unsqueeze(1)
    return points + exponent.softmax(2) @ shift


def _unit_range(values: Tensor) -> Tensor:
    """Rows ``(B, N)`` scaled to [0, 1]."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    return (values - low) / (high - low + 1e-7)


@dataclass(frozen=True)
class HiTADV(Ball):
    """Hide in thicket: smooth deformations around rough, salient centres.

    Lou et al., CVPR 2024, `arXiv:2403.05247 <https://arxiv.org/abs/2403.05247>`_. In each of ``candidates``
    regions from farthest-point sampling, the point of highest score, variation of the curvature plus a little
    saliency, is a candidate; the best ``centres`` are used. Adam minimises the hinge plus a weight times
    ``(|shifts| + |1 - widths|) / centres``, the cosine between widths and curvature and a one-sided Chamfer
    distance, with the search of `CarliniWagner`. Returns the success of smallest
    ``|shifts| + |1 - widths|``.

    Differs from the public code: Gaussians of the squared distance; scores and sizes per cloud, not over the
    batch; estimated normals; all clouds of a batch share their starts.

    Attributes:
        epsilon: largest change of a coordinate (published: 0.55).
        kappa: margin of the hinge in logits (published: 30).
        centres: centres of the deformation (published: 192).
        candidates: regions (published: 256), at most one per point.
        smallest: smallest width of a Gaussian (published: 0.1).
        largest: largest width (published: 1.2).
        neighbours: neighbours of the curvature and the regions, at least 2 (published: 16).
        first_weight: weight of the deformation in the first search (published: 10).
        largest_weight: upper end of the bisection (published: 80).
        chamfer: weight of the Chamfer distance (published: 1e-4).
        searches: steps of the bisection (published: 10).
        iterations: steps of Adam per search (published: 100).
        rate: learning rate of Adam, times 5 for shifts and 3 for widths (published: 1e-2).

    Examples:
        >>> attack = attacks.HiTADV(centres=8, candidates=16, searches=1, iterations=2)
        >>> result = attack(classifier, points, labels)
        >>> result.points.shape
        torch.Size([2, 64, 3])
    """

    epsilon: NonNegativeFloat = 0.55
    kappa: NonNegativeFloat = 30.0
    centres: PositiveInt = 192
    candidates: PositiveInt = 256
    smallest: PositiveFloat = 0.1
    largest: PositiveFloat = 1.2
    neighbours: Annotated[int, Range(2)] = 16
    first_weight: PositiveFloat = 10.0
    largest_weight: PositiveFloat = 80.0
    chamfer: NonNegativeFloat = 1e-4
    searches: PositiveInt = 10
    iterations: PositiveInt = 100
    rate: PositiveFloat = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        for low, high in (
            ("centres", "candidates"),
            ("smallest", "largest"),
            ("first_weight", "largest_weight"),
        ):
            if getattr(self, low) > getattr(self, high):
                values = f"{getattr(self, low)} and {getattr(self, high)}"
                raise ValueError(f"{low} must not exceed {high}, got {values}")

    @property
    def threat(self) -> ThreatModel:
        """White-box, untargeted, smooth shifts."""
        return ThreatModel("white-box", "untargeted", "shift", "linf", self.epsilon)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Searches shifts and widths at the centres."""
        search = Search(
            functools.partial(hinge, kappa=self.kappa),
            self.first_weight,
            self.largest_weight,
            self.searches,
            self.iterations,
            self.rate,
            evaluated_only=True,
        )
        return search(self._space(oracle, points), oracle, points, generator)

    def _space(self, oracle: Oracle, points: Tensor) -> SearchSpace:
        """Shifts and widths at the centres."""
        centres, curvature = self._centres(oracle, points)
        batch, count = centres.shape[:2]
        rough = _unit_range(curvature)

        def start(generator: torch.Generator) -> list[Tensor]:
            draw = torch.rand(count, 4, generator=generator, dtype=points.dtype).to(points.device)
            shift = (self.epsilon * draw[:, :3]).repeat(batch, 1, 1)
            return [shift, (self.smallest + (self.largest - self.smallest) * draw[:, 3]).repeat(batch, 1)]

        def clouds(variables: list[Tensor], rows: Rows) -> Tensor:
            return deformed(points[rows], centres[rows], *variables)

        def size(variables: list[Tensor]) -> Tensor:
            return _size(variables[0], 0) + _size(variables[1], 1)

        def distance(variables: list[Tensor], clouds: Tensor, rows: Rows) -> Tensor:
            width = (variables[1] - self.smallest) / (self.largest - self.smallest + 1e-7)
            price = size(variables) + torch.cosine_similarity(rough[rows], width, dim=1)
            if self.chamfer:
                price = price + self.chamfer * directed_chamfer(clouds, points[rows])
            return price

        def limit(variables: list[Tensor]) -> None:
            variables[0].clamp_(-self.epsilon, self.epsilon)
            variables[1].clamp_(self.smallest, self.largest)

        return SearchSpace(start, clouds, distance, size, rates=(5, 3), limit=limit)

    def _centres(self, oracle: Oracle, points: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, C, 3)`` centres and the ``(B, C)`` curvature there."""
        candidates = min(self.candidates, points.shape[1])
        _, gradient = oracle.gradient(points, cross_entropy)
        k = min(self.neighbours, points.shape[1] - 1)
        curvature = distances.curvature(points, estimated_normals(points, k + 1), k)
        rough = distances.spread(points, curvature, k)
        score = 0.001 * _unit_range(saliency(points, gradient)) + _unit_range(rough)
        regions = gather(points, farthest_point_sampling(points, candidates))
        members = knn(regions, points, min(self.neighbours + 1, points.shape[1]))[1]  # (B, regions, k)
        top = gather(score.unsqueeze(2), members).squeeze(3).max(2)
        index = members.gather(2, top.indices.unsqueeze(2)).squeeze(2)
        chosen = index.gather(1, top.values.topk(min(self.centres, candidates), 1).indices)
        return gather(points, chosen), curvature.gather(1, chosen)


def _size(values: Tensor, rest: float) -> Tensor:
    """``(B,)`` norm of ``values - rest`` divided by the number of centres; its gradient is 0 at 0."""
    squared = (values - rest).flatten(1).square().sum(1)
    return squared.clamp_min(torch.finfo(values.dtype).tiny).sqrt() / values.shape[1]
