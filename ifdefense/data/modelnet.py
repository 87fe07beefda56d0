"""ModelNet40 as clouds, and a validation set held out from its training set."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ifdefense.data.cloudset import CloudSet
from ifdefense.data.layouts import load_named
from ifdefense.data.parts import Part

Split = Literal["train", "validation", "test"]


def load_modelnet40(
    root: str | Path | None = None, split: Split = "train", num_points: int = 1024, *, up: str | None = None
) -> CloudSet:
    """ModelNet40's clouds of a split, from any layout that `ifdefense.data.layouts` knows.

    Args:
        root: folder of ModelNet40 or its parent with ``modelnet40/``; by default ``IFDEFENSE_DATA``.
        split: ``"test"`` is the official one; `holdout` splits the official training set into ``"train"`` and
            ``"validation"``.
        num_points: points per cloud.
        up: up axis of the source, or ``"source"``; see `ifdefense.data.layouts.load_part`.

    Returns:
        Clouds with z up.

    Raises:
        DataError: if there is no ModelNet40 in a known layout or a file is unusable.
        ValueError: if the split is unknown.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"no split {split!r}; there are train, validation and test")
    part: Part = "test" if split == "test" else "train"
    clouds = load_named("modelnet40", root, part, num_points, up=up)
    if split == "test":
        return clouds
    held_out = holdout(clouds.labels)
    return clouds[held_out if split == "validation" else ~held_out]


def holdout(labels: NDArray[np.integer], fraction: float = 0.1, seed: int = 0) -> NDArray[np.bool_]:
    """Marks examples held out for validation, the same share of every class.

    Args:
        labels: ``(S,)`` class labels.
        fraction: share of each class to hold out, at least one example for classes of two or more.
        seed: seed of the choice.

    Returns:
        ``(S,)`` mask, ``True`` for validation.
    """
    rng = np.random.default_rng(seed)
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = max(1, round(fraction * len(members))) if len(members) > 1 else 0
        mask[rng.permutation(members)[:count]] = True
    return mask
