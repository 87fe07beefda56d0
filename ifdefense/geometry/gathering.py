"""Functions of gathered rows with memory-efficient gradients, for training on a CPU.

Automatic differentiation stores every gathered row and adds up one gradient per row. Here a maximum stores
only the index of its row, and gradients of affine maps are sums over the positions at which a map was
evaluated.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def numbers_per_block(device: torch.device) -> int:
    """Number of values that a loop over blocks computes per step.

    A megabyte of float32 fits the cache of a CPU. On an accelerator, where every step costs a launch, 256
    megabytes bound the memory.
    """
    return 1 << 18 if device.type == "cpu" else 1 << 26


def together(clouds: int, numbers: int, device: torch.device) -> list[int | slice]:
    """Parts of a batch to loop over: one cloud on a CPU, as many as possible on an accelerator.

    The values of one cloud fit the cache of a CPU; on an accelerator, every step costs a launch.

    Args:
        clouds: size of the batch.
        numbers: number of values computed per cloud.
        device: device of the clouds.

    Returns:
        Indices into the first axis: integers, which remove it, or slices.
    """
    if device.type == "cpu":
        return list(range(clouds))
    size = max(1, numbers_per_block(device) // numbers)
    return [slice(start, start + size) for start in range(0, clouds, size)]


def segments(index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions ``(M,)`` sorted by their segment 0, ..., ``count - 1`` in an index, and the start of each.

    For `torch.nn.functional.embedding_bag`, which adds up the rows of a segment in their order.
    """
    ordered, order = index.sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(count, device=index.device))


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """``(S, C)`` sums to which the ``(M, C)`` rows are added at ``(M,)`` indices; differentiable.

    As `Tensor.index_add`, but deterministic: on CUDA its order of additions, and thus rounding, varies.
    """
    if total.device.type == "cpu":
        return total.index_add(0, index, rows)
    order, start = segments(index, len(total))
    return total + F.embedding_bag(order, rows, start, mode="sum")


def first_maximum(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum over the middle axis of ``(M, k, K)`` scores, k at most 255, and its first position as uint8.

    Both reductions are vectorised, unlike `Tensor.max` with an index.
    """
    best = scores.amax(1)
    size = scores.shape[1]
    weight = torch.arange(size, 0, -1, dtype=torch.uint8, device=scores.device).view(1, -1, 1)
    return best, size - ((scores == best.unsqueeze(1)) * weight).amax(1)


def _per_block(index: Tensor, channels: int) -> int:
    """Number of rows of ``(S, k)`` indices whose gathered rows fill a block."""
    return max(1, numbers_per_block(index.device) // (index.shape[1] * channels))


class _NeighbourMax(torch.autograd.Function):
    """``y[m, c] = max_j values[index[m, j], c]``, with the gradient assigned to the first maximal row."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor) -> Tensor:
        channels = values.shape[1]
        best = values.new_empty(len(index), channels)
        source = torch.empty(best.shape, dtype=torch.int64, device=values.device)
        groups = _per_block(index, channels)
        for start in range(0, len(index), groups):
            part = index[start : start + groups]
            best[start : start + groups], first = first_maximum(F.embedding(part, values))
            torch.gather(part, 1, first.long(), out=source[start : start + groups])
        ctx.save_for_backward(source)
        ctx.shape = values.shape
        return best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (source,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).scatter_add_(0, source, grad), None


def neighbour_max(values: Tensor, index: Tensor) -> Tensor:
    """Maximum over neighbours: ``(R, K)`` values, ``(S, k)`` indices, k at most 255 → ``(S, K)``.

    Differentiable once. If neighbours tie, the first one receives the gradient.
    """
    if not (torch.is_grad_enabled() and values.requires_grad):
        parts = index.split(_per_block(index, values.shape[1]))
        return torch.cat([F.embedding(part, values).amax(1) for part in parts])
    return cast(Tensor, _NeighbourMax.apply(values, index))  # type: ignore[no-untyped-call]


def affine_bags(maps: Tensor, index: Tensor, terms: Tensor) -> Tensor:
    """`affine_rows` without gradients, at ``(P, 4)`` terms: 1 and the three coordinates.

    An affine map is a weighted bag of four rows, each read once.
    """
    rows = 4 * index[:, None] + torch.arange(4, device=index.device)
    table = maps.reshape(4 * len(maps), -1)
    return F.embedding_bag(rows, table, per_sample_weights=terms, mode="sum").relu_()


class _AffineRows(torch.autograd.Function):
    """``relu(b + G x)`` by selected maps, differentiable in the maps."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, index: Tensor, terms: Tensor) -> Tensor:
        value = affine_bags(maps, index, terms)
        ctx.save_for_backward(index, terms, value)
        ctx.shape = maps.shape
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, terms, value = ctx.saved_tensors
        grad = grad * (value > 0)
        order = index.argsort()
        end = torch.bincount(index, minlength=ctx.shape[0]).cumsum(0)
        start = torch.cat([end.new_zeros(1), end[:-1]])
        columns = [
            F.embedding_bag(order, grad, start, mode="sum", per_sample_weights=weight)
            for weight in terms.index_select(0, order).t().contiguous()
        ]
        return torch.cat(columns, 1), None, None


def affine_rows(maps: Tensor, index: Tensor, relative: Tensor) -> Tensor:
    """``relu(b + G x)`` by selected maps: ``(R, 4 C)``, ``(P,)`` indices, ``(P, 3)`` → ``(P, C)``.

    Differentiable once in the maps; if the positions have a gradient, in both and any number of times.
    """
    if relative.requires_grad:
        picked = maps.index_select(0, index).unflatten(1, (4, -1))
        x, y, z = relative.split(1, 1)
        value = torch.addcmul(picked[:, 0], picked[:, 1], x)
        return torch.addcmul(torch.addcmul(value, picked[:, 2], y), picked[:, 3], z).relu()
    terms = torch.cat([torch.ones_like(relative[:, :1]), relative], 1)
    rows = _AffineRows.apply(maps.to(terms), index, terms)  # type: ignore[no-untyped-call]
    return cast(Tensor, rows)
