"""Targets of targeted attacks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from attacks.base import check_tensor
from ifdefense.arguments import MAX_SEED, integer


def random_targets(labels: Tensor, num_classes: int, seed: int = 0) -> Tensor:
    """Uniform random classes other than the labels, as in the published protocol.

    ``(labels + default_rng(seed).integers(1, num_classes, B)) % num_classes``. Draw the targets of a whole
    data set at once: they depend on the position in the array.

    Args:
        labels: ``(B,)`` true classes.
        num_classes: number of classes, at least 2.
        seed: seed of the draw.

    Returns:
        ``(B,)`` int64, on the labels' device.

    Raises:
        TypeError: if the labels are not a tensor or the seed is not an integer.
        ValueError: if there are fewer than 2 classes or the seed is negative.

    Examples:
        >>> targets = attacks.random_targets(labels, num_classes=4)
        >>> bool((targets != labels).all())
        True
    """
    check_tensor("labels", labels)
    if num_classes < 2:
        raise ValueError(f"a target other than the label needs at least 2 classes, got {num_classes}")
    offset = torch.from_numpy(
        np.random.default_rng(integer("seed", seed, 0, MAX_SEED)).integers(1, num_classes, len(labels))
    )
    return (labels.long() + offset.to(labels.device)) % num_classes
