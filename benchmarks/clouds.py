"""Labelled clouds of the benchmark, from every data set.

The order is nested: the first clouds of a seed are the same however many are asked for, and every prefix is
nearly in proportion to the classes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from attacks import random_targets
from ifdefense.arguments import integer
from ifdefense.console import meant
from ifdefense.data.cloudset import CloudSet
from ifdefense.data.errors import DataError
from ifdefense.data.formats.arrays import read_npz
from ifdefense.data.layouts import load_named, load_part
from ifdefense.data.modelnet import holdout
from ifdefense.data.parts import Part
from ifdefense.data.selection import nested_order
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.provenance import digest

Split = Literal["test", "validation"]

PROCEDURAL = "procedural"
PROCEDURAL_CLOUDS = 400
"""Procedural clouds unless told otherwise; any number can be made."""

HELD_OUT: dict[Split, int] = {"test": 1_000_000, "validation": 2_000_000}
"""First seeds of procedural clouds. Networks are trained on small seeds only."""

VARIANTS = {"modelnet40-c": "original", "scanobjectnn": "PB_T50_RS"}
"""Data sets with variants, chosen as ``NAME:VARIANT``, and the default."""

NAMES = (PROCEDURAL, "modelnet40", *VARIANTS)
"""Data sets by name; others by their path."""


@dataclass(frozen=True, eq=False)
class LabelledClouds:
    """Clouds with their classes and the targets of targeted attacks.

    Attributes:
        name: name or path of the data set.
        points: ``(S, N, 3)`` float32, z up, mean-centred and of largest norm 1.
        labels: ``(S,)`` int64.
        targets: ``(S,)`` int64, fixed random other classes.
        classes: names of the classes.
    """

    name: str
    points: Tensor
    labels: Tensor
    targets: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: slice) -> LabelledClouds:
        """Selects consecutive clouds."""
        return dataclasses.replace(
            self, points=self.points[index], labels=self.labels[index], targets=self.targets[index]
        )

    def block(self, number: int, size: int) -> LabelledClouds:
        """Clouds ``number * size`` to ``(number + 1) * size``; the last block may have fewer.

        Raises:
            ValueError: if there is no such block.
        """
        if not 0 <= number * size < len(self):
            raise ValueError(f"{len(self)} clouds have no block {number} of {size}")
        return self[number * size : (number + 1) * size]

    def digest(self) -> str:
        """Digest of the clouds, labels and targets."""
        return digest(self.points, self.labels, self.targets)


def load_clouds(
    name: str | Path = PROCEDURAL,
    *,
    clouds: int | None = None,
    seed: int = 0,
    split: Split = "test",
    root: str | Path | None = None,
    num_points: int = 1024,
) -> LabelledClouds:
    """Loads labelled clouds.

    Args:
        name: ``"procedural"``, ``"modelnet40"``, ``"modelnet40-c:gaussian_3"``, ``"scanobjectnn:OBJ_BG"``,
            or a folder or file that `ifdefense.data.load_part` reads.
        clouds: most clouds; by default all, or `PROCEDURAL_CLOUDS`.
        seed: seed of the order, the targets, and the procedural shapes.
        split: ``"test"``, or ``"validation"``, which is held out from the training part.
        root: folder of the named data set or its parent; by default ``IFDEFENSE_DATA``.
        num_points: points per cloud.

    Raises:
        DataError: if the data set is missing or unusable.
        ValueError: if a number is out of range or the split is unknown.
    """
    name = str(name)
    if split not in HELD_OUT:
        raise ValueError(f"no split {split!r}; there are {', '.join(HELD_OUT)}")
    seed = integer("seed", seed, 0)
    count = None if clouds is None else integer("clouds", clouds, 1)
    if name == PROCEDURAL:
        return _procedural(count or PROCEDURAL_CLOUDS, seed, split, num_points)
    whole = _stored(name, split, root, num_points)
    chosen = nested_order(whole.labels, seed)[:count]
    labels = torch.tensor(whole.labels)
    if whole.targets is None:
        targets = random_targets(labels, len(whole.classes), seed)
    else:
        targets = torch.tensor(whole.targets)
    points = to_unit_sphere(torch.from_numpy(whole.points[chosen]))
    return LabelledClouds(name, points, labels[chosen], targets[chosen], whole.classes)


def _stored(name: str, split: Split, root: str | Path | None, num_points: int) -> CloudSet:
    """All clouds of a split of a stored data set."""
    part: Part = "test" if split == "test" else "train"
    known, _, variant = name.partition(":")
    if known in (*VARIANTS, "modelnet40"):
        whole = load_named(known, root, part, num_points, variant=variant or VARIANTS.get(known))
    elif Path(name).exists():
        if Path(name).suffix.lower() == ".npz" and "about" in read_npz(Path(name)):
            raise DataError(f"{name} holds attacked clouds, not clean ones: give it with --attacked")
        whole = load_part(name, part, num_points)
    else:
        raise DataError(
            f"there is no data set, file or folder {name!r}{meant(known, NAMES)}; data sets are "
            f"{', '.join(NAMES)}"
        )
    return whole if split == "test" else whole[holdout(whole.labels)]


def _procedural(count: int, seed: int, split: Split, num_points: int) -> LabelledClouds:
    """Procedural clouds in rounds, each of one shape of every class in random order."""
    from ifdefense.shapes.procedural import CLASSES, make_dataset

    rounds = -(-count // len(CLASSES))
    made = make_dataset(rounds, num_points, HELD_OUT[split] + seed)
    rng = np.random.default_rng([seed, HELD_OUT[split]])
    rows = [rng.permutation(len(CLASSES)) * rounds + number for number in range(rounds)]
    order = np.concatenate(rows)[:count]
    labels = torch.from_numpy(made.labels[order])
    points = to_unit_sphere(torch.from_numpy(made.points[order]))
    return LabelledClouds(PROCEDURAL, points, labels, random_targets(labels, len(CLASSES), seed), CLASSES)
