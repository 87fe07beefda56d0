"""Planted anomalies: points of spikes, bumps, blobs and bridges, as added by attacks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

KINDS = ("spike", "bump", "blob", "bridge")
"""Kinds of planted anomalies."""

TRIES = 64
"""Number of positions tried per anomaly."""


def plant(
    dense: Floats, kind: str, size: float, count: int, rng: np.random.Generator, step: float = 0.01
) -> Floats | None:
    """Samples an anomaly on a surface.

    Spikes are cones half as wide as high, bumps are hemispheres, blobs are balls floating near the surface,
    and bridges are bars between two points of the surface across free space.

    Args:
        dense: ``(D, 3)`` samples of the surface, unit-cube frame.
        kind: one of `KINDS`.
        size: height of a spike, diameter of a bump or a blob, length of a bridge.
        count: number of points.
        rng: source of randomness.
        step: spacing of the samples.

    Returns:
        ``(count, 3)`` points, ``None`` if no suitable position was found.

    Raises:
        ValueError: an unknown kind, or a size that is not positive.

    Examples:
        >>> from ifdefense.shapes.procedural import make_dataset
        >>> dense = make_dataset(num_per_class=1, num_points=512).points[0]
        >>> plant(dense, "blob", 0.1, 20, np.random.default_rng(0)).shape
        (20, 3)
    """
    from scipy.spatial import cKDTree

    if kind not in KINDS:
        raise ValueError(f"unknown kind of anomaly {kind!r}; there are {', '.join(KINDS)}")
    if not size > 0:
        raise ValueError(f"size must be positive, got {size}")
    tree = cKDTree(dense)

    def free(points: Doubles) -> Doubles:
        return np.asarray(tree.query(points)[0])

    if kind == "bridge":
        return _bridge(dense, tree, free, size, count, rng)
    middle = (dense.min(0) + dense.max(0)) / 2
    for start in rng.choice(len(dense), TRIES):
        foot = dense[start].astype(np.float64)
        near = dense[tree.query(foot, 32)[1]].astype(np.float64)
        normal = np.linalg.svd(near - near.mean(0))[2][2]
        if normal @ (foot - middle) < 0:
            normal = -normal
        gap = size / 2 + rng.uniform(0.04, 0.12)
        reach = {"spike": size, "bump": size / 2, "blob": gap}[kind]
        # No other part of the surface may be near, so that the anomaly is in free space.
        if free(foot + reach * normal) < 0.8 * reach:
            continue
        if kind == "spike":
            return np.asarray(_cone(foot, normal, size, size / 4, count, rng), np.float32)
        ball = _unit(rng.normal(size=(count, 3))) * size / 2
        if kind == "bump":
            ball -= np.minimum(ball @ normal, 0)[:, None] * 2 * normal
            return np.asarray(foot + ball, np.float32)
        return np.asarray(foot + gap * normal + ball, np.float32)
    return None


def _bridge(
    dense: Floats,
    tree: object,
    free: Callable[[Doubles], Doubles],
    size: float,
    count: int,
    rng: np.random.Generator,
) -> Floats | None:
    """A bar of length about ``size`` and radius 0.02 between two points of the surface."""
    for start in rng.choice(len(dense), TRIES):
        a = dense[start].astype(np.float64)
        length = np.linalg.norm(dense - a, axis=1)
        ends = np.flatnonzero(abs(length - size) < 0.1 * size)
        if not len(ends):
            continue
        b = dense[rng.choice(ends, min(16, len(ends)))].astype(np.float64)
        clear = free((a + b) / 2) > 0.35 * size
        clear &= free(0.75 * a + 0.25 * b) > 0.15 * size
        clear &= free(0.25 * a + 0.75 * b) > 0.15 * size
        if clear.any():
            b = b[clear][0]
            axis = (b - a) / np.linalg.norm(b - a)
            around = rng.normal(size=(count, 3))
            around = _unit(around - (around @ axis)[:, None] * axis) * 0.02
            return np.asarray(a + rng.random((count, 1)) * (b - a) + around, np.float32)
    return None


def _cone(
    foot: Doubles, axis: Doubles, height: float, radius: float, count: int, rng: np.random.Generator
) -> Doubles:
    """Points on the lateral surface of a cone."""
    share = np.sqrt(rng.random((count, 1)))  # fraction of the distance from the apex
    around = rng.normal(size=(count, 3))
    around = _unit(around - (around @ axis)[:, None] * axis)
    return foot + (1 - share) * height * axis + share * max(radius, 0.02) * around


def _unit(vectors: Doubles) -> Doubles:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9))
