"""Exact, memory-efficient layers on neighbourhoods of points.

The first layer on an edge from a centre ``i`` to a neighbour ``j`` is a linear function of ``i`` plus one of
``j``. It is computed once per point and its *result* gathered per edge: with k neighbours this takes 1/k of
the products, and the ``(B, S, k, C)`` edge features are never materialised.
"""

from __future__ import annotations

from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from classifiers.layers import activated, affine, folded, in_float32, normalised
from ifdefense.geometry.gathering import first_maximum, neighbour_max, numbers_per_block
from ifdefense.geometry.points import farthest_point_sampling, gather


@runtime_checkable
class Sized(Protocol):
    """A network with neighbourhoods that depend on the number of points per cloud."""

    def sized_for(self, points: int) -> None:
        """Scales the neighbourhoods to the number of points: all at 1,024."""


def in_part(count: int, part: float) -> int:
    """A share of ``count``, at least 8 (or all if fewer)."""
    return max(min(count, 8), round(count * part))


def centres_of(points: Tensor, count: int) -> Tensor:
    """At most ``count`` farthest points of ``(B, N, 3)``, differentiable in their positions."""
    if points.shape[1] <= count:
        return points
    return gather(points, farthest_point_sampling(points.detach(), count))


def rows_of(values: Tensor, index: Tensor) -> Tensor:
    """Rows ``(B, ..., K)`` of ``(B, N, K)`` values at ``(B, ...)`` indices."""
    return F.embedding(_flat(index, values.shape[1]), values.flatten(0, 1))


def _flat(index: Tensor, size: int) -> Tensor:
    """Indices into each of B sets of ``size`` as indices into all of them."""
    start = torch.arange(0, len(index) * size, size, device=index.device)
    return index + start.view(-1, *[1] * (index.ndim - 1))


class _GroupMaxLinear(torch.autograd.Function):
    """``y[m, c] = max_j <x[m, j], w[c]>``, with the gradient at the maximal row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        size, channels = x.shape[1], len(weight)
        best = x.new_empty(len(x), channels)
        index = torch.empty(len(x), channels, dtype=torch.uint8, device=x.device)
        groups = max(1, numbers_per_block(x.device) // (size * channels))
        transposed = weight.T
        for start in range(0, len(x), groups):
            part = x[start : start + groups]
            scores = (part.flatten(0, 1) @ transposed).unflatten(0, part.shape[:2])
            best[start : start + groups], index[start : start + groups] = first_maximum(scores)
        ctx.save_for_backward(x, weight, index)
        return best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight, index = ctx.saved_tensors
        groups, size = x.shape[:2]
        start = torch.arange(0, groups * size, size, device=x.device).unsqueeze(1)
        row = index + start  # (M, K)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            # The gradient of a row is a sum over the few channels with their maximum there.
            order = _argsort(index)
            count = torch.bincount(row.flatten(), minlength=groups * size)
            grad_x = F.embedding_bag(
                order.flatten(),
                weight,
                count.cumsum(0) - count,
                mode="sum",
                per_sample_weights=grad.gather(1, order).flatten(),
            ).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = F.embedding_bag(
                row.T.contiguous(), x.flatten(0, 1), mode="sum", per_sample_weights=grad.T.contiguous()
            )
        return grad_x, grad_weight


def _argsort(values: Tensor) -> Tensor:
    """Order of each row of uint8 values."""
    if values.device.type == "cpu":  # NumPy uses a radix sort
        return torch.from_numpy(values.numpy().argsort(axis=1, kind="stable"))
    return values.argsort(1)


@in_float32
def group_max_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Maximum over each group of a shared linear layer, without the layer's activations.

    Args:
        x: ``(B, S, k, C)`` features of S groups per cloud with k members each, k at most 255.
        weight: ``(K, C)`` weights.

    Returns:
        ``(B, S, K)``, equal to ``(x @ weight.T).amax(2)``. In a tie, the first member gets the gradient.
    """
    groups = x.flatten(0, 1).contiguous()
    result = _GroupMaxLinear.apply(groups, weight)  # type: ignore[no-untyped-call]
    return cast(Tensor, result).view(*x.shape[:2], -1)


def group_pooled(x: Tensor, layer: nn.Module, norm: nn.Module) -> Tensor:
    """`shared` and the maximum over each group: ``(B, S, k, C)`` to ``(B, S, K)``."""
    weight, bias = folded(layer, norm, x)
    return (group_max_linear(x, weight) + bias).relu_()


def batched_neighbour_max(values: Tensor, index: Tensor) -> Tensor:
    """Maximum of ``(B, N, K)`` values over the ``(B, S, k)`` neighbours, k at most 255: ``(B, S, K)``."""
    flat = _flat(index, values.shape[1]).flatten(0, 1)
    return neighbour_max(values.flatten(0, 1), flat).view(*index.shape[:2], -1)


@in_float32
def _edge_statistics(of: Tensor, at: Tensor, index: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of ``of[index] + at`` over all edges, from sums over neighbours."""
    flat = _flat(index, of.shape[1]).flatten(0, 1)
    of, at = of.flatten(0, 1), at.flatten(0, 1)
    size = flat.shape[1]
    count = torch.bincount(flat.flatten(), minlength=len(of)).to(of).unsqueeze(1)
    centre_of, centre_at = of.detach().mean(0), at.detach().mean(0)  # centred, against cancellation
    of, at = of - centre_of, at - centre_at
    sums = F.embedding_bag(flat, of, mode="sum")
    edges = flat.numel()
    mean = (sums.sum(0) + size * at.sum(0)) / edges
    square = ((count * of * of).sum(0) + 2 * (at * sums).sum(0) + size * (at * at).sum(0)) / edges
    return mean + centre_of + centre_at, (square - mean * mean).clamp_min(0), edges


def edge(of: Tensor, at: Tensor, index: Tensor, bias: Tensor | None, norm: nn.Module) -> Tensor:
    """First layer on edges, its batch norm and ReLU.

    Args:
        of: ``(B, N, K)``, the part of the layer that depends on the neighbour.
        at: ``(B, S, K)``, the part that depends on the centre.
        index: ``(B, S, k)`` neighbours of each centre.
        bias: ``(K,)`` bias of the layer.
        norm: its batch norm.

    Returns:
        ``(B, S, k, K)``: ``relu(norm(of[index] + at + bias))``.
    """
    if bias is None:
        bias = of.new_zeros(of.shape[2])
    if norm.training and not isinstance(norm, nn.Identity):
        return normalised(rows_of(of, index).add_((at + bias).unsqueeze(2)), norm, 0.0)
    scale, shift = affine(norm, bias, lambda: _edge_statistics(of, at, index))
    if scale is not None:
        of, at = of * scale, at * scale
    return rows_of(of, index).add_((at + shift).unsqueeze(2)).relu_()


def edge_max(of: Tensor, at: Tensor, index: Tensor, norm: nn.Module, slope: float) -> Tensor:
    """`edge` with leaky ReLU and the maximum over the neighbours, ``(B, S, K)``, without the edges.

    Batch norm and leaky ReLU are monotone in each channel, so the maximum can be taken before them once the
    values are multiplied by the scale.
    """
    scale, shift = affine(norm, of.new_zeros(of.shape[2]), lambda: _edge_statistics(of, at, index))
    if scale is not None:
        of, at = of * scale, at * scale
    return activated(batched_neighbour_max(of, index) + (at + shift), slope)
