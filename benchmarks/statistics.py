"""Statistics of predictions (stand-in for the skeleton)."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(right: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy of ``(D, S)`` booleans with error, class mean and spread over draws, in %."""
    values = 100 * right.float()
    each = values.mean(0)
    classes = torch.stack([each[labels == label].mean() for label in labels.unique()])
    spread = values.mean(1).std(correction=0)
    return {
        "accuracy": round(float(each.mean()), 2),
        "error": round(float(each.std(correction=0)) / len(each) ** 0.5, 2),
        "class_mean": round(float(classes.mean()), 2),
        "spread": round(float(spread), 2),
    }


def paired(first: Tensor, second: Tensor) -> dict[str, float]:
    """Difference of two accuracies on the same clouds, with its 95% interval, in %."""
    each = 100 * (first.float().mean(0) - second.float().mean(0))
    middle, half = float(each.mean()), 1.96 * float(each.std(correction=0)) / len(each) ** 0.5
    return {"difference": round(middle, 2), "low": round(middle - half, 2), "high": round(middle + half, 2)}


def worst(rights: list[Tensor]) -> Tensor:
    """``(D, S)`` whether a cloud is right in all of them."""
    return torch.stack(rights).all(0)
