"""Labelled sets of point clouds and of meshes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ifdefense.geometry.mesh import Mesh


@dataclass(frozen=True, eq=False)
class CloudSet:
    """Labelled clouds of one size.

    Attributes:
        points: ``(S, N, 3)`` float32, in the source's centre and unit.
        labels: ``(S,)`` int64 index into ``classes``.
        names: ``(S,)`` str, the name of each example, unique in its source.
        classes: name of each class.
        targets: ``(S,)`` int64, class that a targeted attack aims at, if the source defines it.
        up: up axis, one of `ifdefense.geometry.axes.AXES`; ``None`` if unknown.
        turned_from: up axis of the source, if the clouds have been rotated.

    Raises:
        ValueError: if the shapes of the arrays do not match or a label is out of range.
    """

    points: NDArray[np.float32]
    labels: NDArray[np.int64]
    names: NDArray[np.str_]
    classes: tuple[str, ...]
    targets: NDArray[np.int64] | None = None
    up: str | None = None
    turned_from: str | None = None

    def __post_init__(self) -> None:
        if self.points.ndim != 3 or self.points.shape[2] != 3:
            raise ValueError(f"points must be (S, N, 3), got {self.points.shape}")
        for field, values in (("labels", self.labels), ("names", self.names), ("targets", self.targets)):
            if values is not None and values.shape != (len(self.points),):
                raise ValueError(f"{field} must be ({len(self.points)},), one a cloud, got {values.shape}")
        for field, values in (("label", self.labels), ("target", self.targets)):
            if (
                values is not None
                and len(values)
                and not 0 <= values.min() <= values.max() < len(self.classes)
            ):
                wrong = int(np.flatnonzero((values < 0) | (values >= len(self.classes)))[0])
                raise ValueError(
                    f"cloud {wrong}: {field} {values[wrong]} is not among {len(self.classes)} classes"
                )

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: slice | NDArray[np.integer] | NDArray[np.bool_]) -> CloudSet:
        """Selects clouds by a slice, a mask or an array of indices."""
        return dataclasses.replace(
            self,
            points=self.points[index],
            labels=self.labels[index],
            names=self.names[index],
            targets=None if self.targets is None else self.targets[index],
        )


@dataclass(frozen=True, eq=False)
class MeshSet:
    """Labelled meshes.

    Attributes:
        meshes: one mesh per example, in the frame of the source.
        labels: ``(S,)`` int64 index into ``classes``.
        names: ``(S,)`` str, the name of each example.
        classes: name of each class.
    """

    meshes: tuple[Mesh, ...]
    labels: NDArray[np.int64]
    names: NDArray[np.str_]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.meshes)
