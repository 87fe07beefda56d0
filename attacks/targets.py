"""The classes that targeted attacks aim at."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def random_targets(labels: Tensor, num_classes: int, seed: int = 0) -> Tensor:
    """A fixed random class for every example, never its own, as the published protocol asks.

    The draw is NumPy's ``default_rng(seed).integers(1, num_classes, B)``, added to the label modulo the
    number of classes: draw the targets of a whole data set at once, so that they do not depend on how it is
        cut into batches.

    Args:
        labels: ``(B,)`` true classes.
        num_classes: number of classes, at least 2.
        seed: seed of the draw.

    Returns:
        ``(B,)`` int64 classes on the labels' device.

    Raises:
        ValueError: if there is no other class to aim at.
    """
    if num_classes < 2:
        raise ValueError(f"a target other than the label needs at least 2 classes, got {num_classes}")
    offset = torch.from_numpy(np.random.default_rng(seed).integers(1, num_classes, len(labels)))
    return (labels.long() + offset.to(labels.device)) % num_classes
