"""Spheres whose radius depends on a cloud, and the gradient of that radius, for the tests of restorers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ifdefense.purifiers.surface import SurfacePurifier

Sphere = tuple[Tensor, Tensor]
"""Centre ``(3,)`` and radius ``()``."""


def clouds() -> list[Tensor]:
    """Two random clouds in the unit cube."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(size, 3, generator=generator) - 0.5 for size in (100, 60)]


def spheres(clouds: Sequence[Tensor]) -> list[Sphere]:
    """A sphere around the mean of each cloud, of 0.6 times the mean distance of its points from there."""
    means = [cloud.mean(0) for cloud in clouds]
    return [(m, 0.6 * (c - m).norm(dim=1).mean()) for c, m in zip(clouds, means, strict=True)]


def slopes_of_the_radius(purifier: SurfacePurifier) -> tuple[float, float]:
    """Derivative of the mean distance of purified points from their mean, by gradients and by differences.

    The inner points of the first of `clouds` move away from its mean; the outer ones hold the frame.
    """
    points = clouds()[0].double().requires_grad_()
    inside = (points.detach().abs() < 0.45).all(1)

    def spread(points: Tensor) -> Tensor:
        out = purifier([points], 400)[0]
        mean: Tensor = (out - out.mean(0)).norm(dim=1).mean()
        return mean

    (slope,) = torch.autograd.grad(spread(points), points)
    direction = torch.where(inside[:, None], points.detach() - points.detach().mean(0), 0)
    with torch.no_grad():
        numeric = (spread(points + 1e-2 * direction) - spread(points - 1e-2 * direction)) / 2e-2
    return float((slope * direction).sum()), float(numeric)
