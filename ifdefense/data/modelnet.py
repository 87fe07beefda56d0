"""ModelNet40 as clouds, and the validation set that is held out of its train shards."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def holdout(labels: NDArray[np.integer], fraction: float = 0.1, seed: int = 0) -> NDArray[np.bool_]:
    """Marks the examples that are held out for validation, the same share of every class.

    Args:
        labels: ``(S,)`` class labels.
        fraction: share of each class to hold out, at least one example of a class with two or more.
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
