"""Accuracies with bootstrap errors, paired differences between defences, and the worst case per cloud.

Results are ``(D, S)`` booleans: whether each of S clouds is classified correctly, in each of D draws of a
random defence. Draws are averaged per cloud before resampling, because the draws of one cloud are no
independent sample. Resampling is seeded, so equal results give equal errors.

A plain bootstrap of a sample without any variation has no width, as if 20 of 20 clouds were a certainty. All
resampling here therefore takes place among the clouds and two imagined ones with opposite outcomes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

RESAMPLES = 2000
"""Bootstrap samples."""

_PART = 200  # samples per block, which bounds the memory for many clouds


def accuracy(right: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy with its errors, in %.

    Args:
        right: ``(D, S)`` or ``(S,)`` whether clouds are classified correctly.
        labels: ``(S,)`` classes.

    Returns:
        ``accuracy``, the mean over draws and clouds; ``error``, its bootstrap standard error over clouds;
        ``class_mean``, the mean over classes of their accuracies; ``spread``, the standard deviation of the
        accuracy over draws, 0 for one draw.

    Raises:
        ValueError: if there are no clouds, or the shapes do not match.
    """
    rates = _draws(right).double()
    if labels.shape != rates.shape[1:]:
        raise ValueError(f"{tuple(labels.shape)} labels for {rates.shape[1]} clouds")
    mean = rates.mean(0)
    number = labels.to(mean.device).long()
    sums = mean.new_zeros(int(number.max()) + 1).index_add_(0, number, mean)
    sizes = torch.bincount(number)
    present = sizes > 0
    draws = rates.mean(1)
    return {
        "accuracy": 100 * float(mean.mean()),
        "error": 100 * float(_resampled(mean, (0.0, 1.0)).std()),
        "class_mean": 100 * float((sums[present] / sizes[present]).mean()),
        "spread": 100 * float(draws.std()) if len(draws) > 1 else 0.0,
    }


def paired(a: Tensor, b: Tensor) -> dict[str, float]:
    """Difference ``a - b`` of two accuracies on the same clouds, in %, with its bootstrap 95% interval.

    Args:
        a: ``(D, S)`` or ``(S,)`` whether clouds are classified correctly.
        b: the same for the other defence, on the same clouds; the number of draws may differ.

    Returns:
        ``difference``, ``low`` and ``high``. One defence is ahead if 0 is outside of the interval.

    Raises:
        ValueError: if there are no clouds, or the numbers of clouds differ.
    """
    first, second = _draws(a).double().mean(0), _draws(b).double().mean(0)
    if len(first) != len(second):
        raise ValueError(f"a paired difference needs the same clouds, got {len(first)} and {len(second)}")
    change = first - second.to(first.device)
    ends = _resampled(change, (-1.0, 1.0)).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    plain = float(change.mean())
    return {
        "difference": 100 * plain,
        "low": 100 * min(plain, float(ends[0])),
        "high": 100 * max(plain, float(ends[1])),
    }


def worst(results: Sequence[Tensor]) -> Tensor:
    """``(D, S)`` whether clouds are classified correctly in every result, draw by draw.

    Args:
        results: ``(D, S)`` or ``(S,)`` each, of the same clouds. Results of one draw, as of a deterministic
            defence, count for all draws of the others.

    Raises:
        ValueError: if there are no results, the numbers of clouds differ, or those of draws (other than 1).
    """
    parts = [_draws(result) for result in results]
    if not parts:
        raise ValueError("the worst case needs at least one result")
    if len({part.shape[1] for part in parts}) > 1:
        raise ValueError(f"the worst case needs the same clouds, got {[part.shape[1] for part in parts]}")
    draws = {len(part) for part in parts} - {1}
    if len(draws) > 1:
        raise ValueError(f"the worst case needs the same number of draws, got {sorted(draws)}")
    total = torch.ones(max(draws, default=1), parts[0].shape[1], dtype=torch.bool, device=parts[0].device)
    for part in parts:
        total = total & part.to(total.device)
    return total


def packed(right: Tensor) -> list[str]:
    """One string per draw with ``"1"`` for a correctly classified cloud and ``"0"`` for another."""
    return ["".join("01"[value] for value in draw) for draw in _draws(right).tolist()]


def unpacked(right: Sequence[str]) -> Tensor:
    """``(D, S)`` booleans of `packed` strings."""
    return torch.tensor([[value == "1" for value in draw] for draw in right], dtype=torch.bool)


def _draws(right: Tensor) -> Tensor:
    """``(D, S)`` booleans."""
    right = right if right.ndim == 2 else right[None]
    if right.ndim != 2 or 0 in right.shape:
        raise ValueError(f"expected (draws, clouds) with at least one cloud, got {tuple(right.shape)}")
    return right.bool()


def _resampled(values: Tensor, imagined: tuple[float, float]) -> Tensor:
    """Means of bootstrap samples of ``(S,)`` values and two imagined ones, ``(RESAMPLES,)``, on the CPU."""
    values = torch.cat([values.cpu(), values.new_tensor(imagined, device="cpu")])
    means = [values[part].mean(1) for part in _choices(len(values)).split(_PART)]
    return torch.cat(means)


@functools.lru_cache(maxsize=4)
def _choices(count: int) -> Tensor:
    """``(RESAMPLES, count)`` indices of clouds, the same in every call, so that figures can be compared."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(count, (RESAMPLES, count), generator=generator, dtype=torch.int32)
