"""Labelled clouds of the benchmark, in a nested order."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from attacks import random_targets
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.shapes.procedural import make_dataset


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledClouds:
    """Clouds with labels and fixed random targets."""

    name: str
    points: Tensor
    labels: Tensor
    targets: Tensor
    classes: tuple[str, ...]

    def block(self, number: int, size: int) -> LabelledClouds:
        """Clouds ``[number * size, (number + 1) * size)``."""
        rows = slice(number * size, (number + 1) * size)
        return dataclasses.replace(
            self, points=self.points[rows], labels=self.labels[rows], targets=self.targets[rows]
        )


def load_clouds(
    name: str, *, clouds: int | None = None, seed: int = 0, split: str = "test", root: str | None = None
) -> LabelledClouds:
    """Stand-in: procedural clouds only."""
    whole = make_dataset(-(-(clouds or 400) // 16), seed=4_000_000 + seed)
    per = len(whole.points) // len(whole.classes)
    order = torch.arange(len(whole.points)).reshape(-1, per).T.flatten()[:clouds]
    labels = torch.from_numpy(whole.labels)
    targets = random_targets(labels, len(whole.classes), seed)
    points = to_unit_sphere(torch.from_numpy(whole.points))
    return LabelledClouds(name, points[order], labels[order], targets[order], whole.classes)
