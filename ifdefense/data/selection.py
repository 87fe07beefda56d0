"""Random orders of labelled sets."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def nested_order(labels: NDArray[np.integer], seed: int = 0) -> NDArray[np.int64]:
    """Random order of all examples in which every prefix is nearly in proportion to the classes.

    A smaller choice is therefore the start of a larger one. Examples are sorted by
    ``(r + u) / size``, r being the place in the shuffled class, u uniform in [0, 1) and size that of the
    class, so that the first n have each class to within one example of n times its share, on average.

    Args:
        labels: ``(S,)`` classes.
        seed: seed of the order.
    """
    rng = np.random.default_rng(seed)
    key = np.empty(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        key[members] = (np.arange(len(members)) + rng.random(len(members))) / len(members)
    return np.argsort(key, kind="stable")
