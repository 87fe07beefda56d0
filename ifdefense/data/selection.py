"""Random subsets and orders of labelled sets."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def stratified(labels: NDArray[np.integer], count: int, seed: int = 0) -> NDArray[np.int64]:
    """Ascending indices of random examples, stratified by class with largest remainders.

    Args:
        labels: ``(S,)`` classes.
        count: examples to choose.
        seed: seed of the choice.

    Raises:
        ValueError: if there are fewer examples than ``count``.
    """
    if not 0 < count <= len(labels):
        raise ValueError(f"cannot choose {count} of {len(labels)} examples")
    classes, sizes = np.unique(labels, return_counts=True)
    share = sizes * count / len(labels)
    take = np.floor(share).astype(int)
    take[np.argsort(take - share, kind="stable")[: count - take.sum()]] += 1
    rng = np.random.default_rng(seed)
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:number]
        for label, number in zip(classes, take, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def nested_order(labels: NDArray[np.integer], seed: int = 0) -> NDArray[np.int64]:
    """Random order of all examples in which every prefix is nearly in proportion to the classes.

    Unlike with `stratified`, a smaller choice is the start of a larger one. Examples are sorted by
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
