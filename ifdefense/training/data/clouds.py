"""Clouds that classifiers and auto-encoders are trained on, in the unit sphere, and their sources."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ifdefense.data.cloudset import CloudSet
from ifdefense.data.errors import DataError
from ifdefense.data.formats.arrays import read_npz
from ifdefense.data.modelnet import load_modelnet40
from ifdefense.data.packed import require
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.provenance import digest
from ifdefense.shapes.procedural import make_dataset

NAMES = ("modelnet40", "procedural")


def training_sets(name: str) -> tuple[CloudSet, CloudSet]:
    """Training and validation clouds; none of a test set.

    Args:
        name: ``"modelnet40"`` (root from ``IFDEFENSE_DATA``), of whose training set both are parts, as
            `ifdefense.data.modelnet.holdout` cuts it; or ``"procedural"``, 300 and 30 clouds a class.

    Raises:
        ValueError: if there is no such set.
    """
    if name == "modelnet40":
        return load_modelnet40(split="train"), load_modelnet40(split="validation")
    if name == "procedural":
        return make_dataset(300, 1024, seed=1), make_dataset(30, 1024, seed=2)
    raise ValueError(f"there is no training set {name!r}; there are {', '.join(NAMES)}")


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingClouds:
    """Labelled clouds: ``(S, N, 3)`` float32 points in the unit sphere, and ``(S,)`` int64 labels."""

    points: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.points)

    @classmethod
    def of_arrays(cls, points: NDArray[Any], labels: NDArray[Any]) -> TrainingClouds:
        """Copies of clouds of any frame, normalised; the arrays may be read-only."""
        cloud = to_unit_sphere(torch.from_numpy(np.array(points, np.float32)))
        return cls(cloud, torch.from_numpy(np.array(labels, np.int64)))

    @classmethod
    def of_file(cls, path: Path) -> TrainingClouds:
        """Reads an npz with ``points`` ``(S, N, 3)`` in any frame and ``label`` ``(S,)``.

        Raises:
            DataError: if it holds no such arrays.
        """
        arrays = read_npz(path)
        require(arrays, ("points", "label"), path)
        points, labels = arrays["points"], arrays["label"]
        if points.ndim != 3 or points.shape[2] != 3 or labels.shape != points.shape[:1]:
            raise DataError(
                f"{path}: points must be (S, N, 3) and label (S,), got {points.shape}, {labels.shape}"
            )
        return cls.of_arrays(points, labels)

    def joined(self, other: TrainingClouds) -> TrainingClouds:
        """Both sets, this one first.

        Raises:
            DataError: if their clouds have different numbers of points.
        """
        if self.points.shape[1] != other.points.shape[1]:
            raise DataError(
                f"clouds of {self.points.shape[1]} and of {other.points.shape[1]} points cannot be joined"
            )
        return TrainingClouds(torch.cat([self.points, other.points]), torch.cat([self.labels, other.labels]))

    def first(self, count: int) -> TrainingClouds:
        """The first clouds, or all if there are fewer."""
        return TrainingClouds(self.points[:count], self.labels[:count])

    def digest(self) -> str:
        """Identifies the clouds in the settings of a run."""
        return digest(self.points, self.labels)


def load_training_clouds(name: str) -> tuple[TrainingClouds, TrainingClouds, int]:
    """Training clouds, validation clouds and the number of classes.

    Args:
        name: of the data set, as for `training_sets`.

    Raises:
        DataError: if the data is missing or cannot be used.
        ValueError: if there is no such data set.
    """
    train, validation = training_sets(name)
    return (
        TrainingClouds.of_arrays(train.points, train.labels),
        TrainingClouds.of_arrays(validation.points, validation.labels),
        len(train.classes),
    )
