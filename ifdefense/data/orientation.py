"""Detection of the up axis of labelled clouds, for classes of ModelNet."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ifdefense.data.cloudset import CloudSet
from ifdefense.geometry.axes import AXES, turned

# fmt: off
TYPICAL = {
    "airplane": (-1.63, -0.04), "bathtub": (-0.85, -0.05), "bed": (-1.09, -0.08), "bench": (-0.66, 0.02),
    "bookshelf": (0.84, 0.00), "bottle": (1.10, -0.03), "bowl": (-0.89, 0.00), "car": (-0.84, -0.11),
    "chair": (0.38, -0.02), "cone": (0.15, -0.16), "cup": (0.19, 0.01), "curtain": (1.67, 0.01),
    "desk": (-0.42, 0.12), "door": (1.85, 0.00), "dresser": (0.37, 0.00), "flower_pot": (0.40, 0.02),
    "glass_box": (-0.53, 0.02), "guitar": (-2.29, 0.05), "keyboard": (-2.40, 0.01), "lamp": (0.80, 0.10),
    "laptop": (-0.30, -0.20), "mantel": (0.14, 0.00), "monitor": (0.66, 0.00), "night_stand": (0.15, 0.03),
    "person": (1.35, 0.04), "piano": (-0.32, -0.01), "plant": (0.49, -0.02), "radio": (-0.34, -0.01),
    "range_hood": (0.01, -0.17), "sink": (-0.79, 0.04), "sofa": (-0.82, -0.08), "stairs": (0.21, 0.00),
    "stool": (0.61, 0.10), "table": (-0.77, 0.28), "tent": (-0.68, -0.08), "toilet": (0.37, -0.01),
    "tv_stand": (-0.35, 0.00), "vase": (0.57, -0.02), "wardrobe": (0.77, 0.00), "xbox": (0.73, 0.01),
}
# fmt: on
"""Medians of the `_traits` of each class, over ModelNet40's training clouds without the validation set."""

SPREAD = (0.37, 0.05)
"""Typical deviation of each trait within a class."""

WORST = 3.0
"""Limit on the deviations of a trait, so that unusual and corrupted clouds do not dominate."""

FEWEST = 20
"""Smallest number of clouds for a decision."""

MOST = 200
"""Largest number of clouds examined, evenly spread over the set."""

MARGIN = 0.5
"""Deviations per cloud by which another axis must fit better than the expected one."""


def looks_up(clouds: CloudSet, expected: str) -> str | None:
    """Detects an up axis that clearly differs from the expected one.

    Compares the ratio of height to width, and the height of the mean over the middle, with typical values of
    each class. Both depend only on the up axis, not on the direction that objects face.

    Args:
        clouds: labelled clouds, in the frame of their source.
        expected: the axis that should point up.

    Returns:
        The other axis, or ``None`` if the expected one fits, the result is unclear, there are fewer than
        `FEWEST` clouds, or a class is not in ModelNet40.
    """
    if len(clouds) < FEWEST or not set(clouds.classes) <= TYPICAL.keys():
        return None
    taken = np.linspace(0, len(clouds) - 1, min(len(clouds), MOST)).astype(int)
    typical = np.array([TYPICAL[clouds.classes[label]] for label in clouds.labels[taken]])
    misfit = {}
    for axis in AXES:
        away = np.abs(_traits(turned(clouds.points[taken], axis)) - typical) / SPREAD
        misfit[axis] = float(np.minimum(away, WORST).sum(1).mean())
    best = min(misfit, key=misfit.__getitem__)
    return best if misfit[expected] - misfit[best] > MARGIN else None


def _traits(points: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logarithm of height over width, and height of the mean over the middle, of ``(S, N, 3)``; z up.

    Extents are those of 90% of the points, for robustness to outliers.
    """
    low, high = np.percentile(points, (5, 95), axis=1)
    extent = np.maximum(high - low, 1e-9)
    tall = np.log(extent[:, 2]) - np.log(extent[:, 0] * extent[:, 1]) / 2
    above = (points[:, :, 2].mean(1) - (low + high)[:, 2] / 2) / extent[:, 2]
    return np.stack([tall, above], 1)
