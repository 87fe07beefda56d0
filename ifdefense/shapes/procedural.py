"""Procedural data set: solid CAD-like objects of 16 classes, without downloads.

Shapes are signed distance functions (`ifdefense.shapes.sdf`) with exact occupancy, surface points and
normals.
"""

from __future__ import annotations

import zlib
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ifdefense.data.cloudset import CloudSet
from ifdefense.shapes.objects import BUILDERS
from ifdefense.shapes.sdf import Solid

CLASSES: tuple[str, ...] = tuple(sorted(BUILDERS))
"""Names of the classes by label."""

Points = TypeVar("Points", torch.Tensor, NDArray[np.floating])


class Shape:
    """A solid in the unit-cube frame: centred on its bounding box, longest side 1, z up, facing -y.

    Args:
        name: name of the example.
        label: index into `CLASSES`.
        solid: the solid in any frame.

    Examples:
        >>> shape = make_shape(CLASSES[0], np.random.default_rng(0))
        >>> bool(shape.sdf(np.full((1, 3), 2.0))[0] > 0)  # outside
        True
    """

    def __init__(self, name: str, label: int, solid: Solid) -> None:
        self.name, self.label = name, label
        self._solid = solid
        low, high = solid.bounds()
        self._centre, self._side = 0.5 * (low + high), float((high - low).max())
        self.extent: NDArray[np.float64] = (high - low) / self._side
        """Sides of the bounding box, ``(3,)``."""

    def __repr__(self) -> str:
        return f"Shape({self.name!r}, label={self.label})"

    def sdf(self, points: Points) -> Points:
        """Signed distance, negative inside.

        The sign is exact. The distance is 1-Lipschitz, never exceeds the true one in magnitude, and is exact
        outside near the surface.

        Args:
            points: ``(..., 3)`` NumPy array or tensor of any float dtype, unit-cube frame.

        Returns:
            ``(...)`` of the same kind, dtype and device.
        """
        if isinstance(points, torch.Tensor):
            found = self.sdf(points.detach().cpu().numpy())
            return torch.as_tensor(found, dtype=points.dtype, device=points.device)
        columns = points.reshape(-1, 3).T * self._side + self._centre.astype(points.dtype)[:, None]
        return (self._solid.distance(columns) / self._side).reshape(points.shape[:-1])

    def sample_surface(
        self, count: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Samples the surface uniformly by area.

        Args:
            count: number of points.
            rng: source of randomness.

        Returns:
            ``(count, 3)`` points in the unit-cube frame and ``(count, 3)`` outward unit normals, float32.
        """
        points, normals = self._solid.sample(count, rng)
        points = (points - self._centre[:, None]) / self._side
        return points.T.astype(np.float32, order="C"), normals.T.astype(np.float32, order="C")


def make_shape(class_name: str, rng: np.random.Generator, name: str | None = None) -> Shape:
    """Draws a shape of a class.

    Args:
        class_name: one of `CLASSES`.
        rng: source of randomness.
        name: name of the shape; by default the name of the class.

    Raises:
        ValueError: if there is no such class.

    Examples:
        >>> shape = make_shape(CLASSES[3], np.random.default_rng(0))
        >>> shape.label, shape.extent.shape
        (3, (3,))
    """
    if class_name not in BUILDERS:
        raise ValueError(f"no procedural class {class_name!r}; the classes are {', '.join(CLASSES)}")
    return Shape(name or class_name, CLASSES.index(class_name), Solid(BUILDERS[class_name](rng)))


def make_shapes(num_per_class: int, seed: int = 0) -> list[Shape]:
    """Draws shapes of every class, in the order of `CLASSES`.

    A shape depends only on the seed, its class and its index, so larger sets contain smaller ones.

    Args:
        num_per_class: number of shapes of each class.
        seed: random seed; sets of different seeds share no shapes.

    Examples:
        >>> len(make_shapes(num_per_class=1)) == len(CLASSES)
        True
    """
    return [
        make_shape(name, _rng(seed, name, number), f"{name}_{number:04d}")
        for name in CLASSES
        for number in range(num_per_class)
    ]


def make_dataset(num_per_class: int, num_points: int = 1024, seed: int = 0) -> CloudSet:
    """Draws shapes of every class and samples their surfaces.

    Args:
        num_per_class: number of shapes of each class.
        num_points: points per cloud.
        seed: random seed of shapes and points.

    Returns:
        ``(num_per_class * len(CLASSES), num_points, 3)`` clouds in the unit-cube frame, ordered by class.

    Examples:
        >>> clouds = make_dataset(num_per_class=1, num_points=64)
        >>> clouds.points.shape[1:]
        (64, 3)
    """
    shapes = make_shapes(num_per_class, seed)
    clouds = [shape.sample_surface(num_points, _rng(seed, shape.name, 1))[0] for shape in shapes]
    return CloudSet(
        points=np.stack(clouds) if clouds else np.zeros((0, num_points, 3), np.float32),
        labels=np.array([shape.label for shape in shapes], dtype=np.int64),
        names=np.array([shape.name for shape in shapes], dtype=np.str_),
        classes=CLASSES,
    )


def _rng(seed: int, name: str, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode()), number])
