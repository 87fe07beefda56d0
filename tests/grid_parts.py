"""A victim, defences and clouds for tests of the benchmark's grid; also named from its command line."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.clouds import LabelledClouds
from benchmarks.suite import Suite

CLASSES = tuple(f"class {number}" for number in range(16))


def clouds(count: int, size: int = 64) -> LabelledClouds:
    """Ellipsoids of 16 classes, which differ in how long they are."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % len(CLASSES)
    points = torch.nn.functional.normalize(torch.randn(count, size, 3, generator=generator), dim=2)
    length = 0.2 + 0.05 * labels[:, None]
    points = torch.stack([points[..., 0] * length, points[..., 1] * length, points[..., 2]], 2)
    targets = (labels + 1) % len(CLASSES)
    return LabelledClouds("ellipsoids", points, labels, targets, CLASSES)


class Length(nn.Module):
    """Classifies ellipsoids by the mean distance from their axis."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(100.0))
        self.register_buffer("centres", 0.78 * (0.2 + 0.05 * torch.arange(16)))

    def forward(self, points: Tensor) -> Tensor:
        width = points[..., :2].square().sum(2).add(1e-9).sqrt().mean(1, keepdim=True)
        return -self.scale * (width - self.centres).abs()


def halved(points: Tensor) -> Tensor:
    """Moves points half of the way to their nearest neighbour along the axis: a weak defence."""
    return points * torch.tensor([1.0, 1.0, 0.5])


halved.deterministic = True
halved.normalise = False


def noisy(points: Tensor) -> Tensor:
    """Adds noise."""
    return points + 0.02 * torch.randn_like(points)


noisy.normalise = False


def failing(points: Tensor) -> Tensor:
    """Fails on all but the two clouds on which it is tried."""
    if len(points) > 2:
        raise RuntimeError("out of luck")
    return points.clone()


failing.normalise = False


def deadly(points: Tensor) -> Tensor:
    """Ends the process, once, where a file named by the environment is missing."""
    path = os.environ["DEADLY"]
    if len(points) > 2 and not os.path.exists(path):
        open(path, "w").close()
        os._exit(9)
    return points.clone()


deadly.normalise = False


def small(attacks: Sequence[str] = ("apgd-linf",), clouds: int = 20) -> Suite:
    """A suite of few attacks."""
    return Suite("small", tuple(attacks), tuple(attacks), tuple(attacks), clouds, clouds, 2, 5, "quick")
