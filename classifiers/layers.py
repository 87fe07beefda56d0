"""Exact shared linear layers with batch norm and pooling over the points.

* Every batch norm is folded into the layer before it, in PointNet in training too: the statistics of a linear
  layer's output follow from the mean and the covariance of its *input*, so no second pass over the
  activations is needed.
* A layer followed by a maximum over the points is never materialised: `max_pooled_linear`
  keeps the maximum and its position instead of the ``(B, N, K)`` activations.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ifdefense.geometry.gathering import segments, together

P = ParamSpec("P")
T = TypeVar("T")


def check_points(points: Tensor) -> None:
    """Checks that points are ``(B, N, 3)`` with at least one point.

    Raises:
        ValueError: naming the shape.
    """
    if points.ndim != 3 or points.shape[-1] != 3 or points.shape[1] == 0:
        raise ValueError(f"expected points of shape (B, N, 3), got {tuple(points.shape)}")


def separate_aliases(_: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Copies tensors with several names, because safetensors refuses shared memory."""
    del metadata
    seen: set[int] = set()
    for name, value in state.items():
        if name.startswith(prefix) and isinstance(value, Tensor):
            if value.data_ptr() in seen:
                state[name] = value.detach().clone()
            seen.add(value.data_ptr())


def layer_lists(inputs: int, channels: Sequence[int]) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Convolutions of width 1 and their batch norms."""
    widths = [inputs, *channels]
    convolutions = [nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(widths)]
    return nn.ModuleList(convolutions), nn.ModuleList([nn.BatchNorm2d(b) for b in channels])


_BLOCK = 32  # columns per block: a vectorised maximum over blocks, then a search inside the best one


def added_product(bias: Tensor, a: Tensor, b: Tensor, alpha: float = 1) -> Tensor:
    """``bias + alpha a @ b`` of two matrices, or of two batches of them."""
    add = torch.addmm if b.ndim == 2 else torch.baddbmm
    return add(bias, a.expand(*b.shape[:-2], -1, -1), b, alpha=alpha)


def max_with_index(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of each row of ``(..., N)`` scores and its first index, faster than ``Tensor.max`` on a CPU."""
    columns = scores.shape[-1]
    whole = columns - columns % _BLOCK
    if whole == 0:
        return scores.max(-1)
    blocks = scores[..., :whole].unflatten(-1, (-1, _BLOCK))
    best, block = blocks.amax(-1).max(-1)
    row = torch.arange(block.numel(), device=scores.device)
    inner = blocks.flatten(0, -3)[row, block.flatten()].argmax(1).view(block.shape)
    index = block * _BLOCK + inner
    if whole == columns:
        return best, index
    tail, tail_index = scores[..., whole:].max(-1)
    later = tail > best
    return torch.where(later, tail, best), torch.where(later, tail_index + whole, index)


class _MaxPooledLinear(torch.autograd.Function):
    """``y[b, k] = max_n <x[b, n], w[k]>``, with the gradient at the maximal points."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, search: torch.dtype | None) -> Tensor:
        pooled = x.new_empty(len(x), len(weight))
        index = torch.empty(pooled.shape, dtype=torch.long, device=x.device)
        searched, by = (x, weight) if search is None else (x.to(search), weight.to(search))
        for part in together(len(x), x.shape[1] * len(weight), x.device):
            # Maxima in bfloat16 are several times slower than in float32 including the conversion.
            best, index[part] = max_with_index((by @ searched[part].mT).to(x.dtype))
            if search is not None:
                best = (x[part].take_along_dim(index[part].unsqueeze(-1), -2) * weight).sum(-1)
            pooled[part] = best
        ctx.save_for_backward(x, weight, index)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, index = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0] and x.device.type == "cpu":
            grad_x = torch.zeros_like(x)
            for cloud in range(len(x)):
                grad_x[cloud].index_add_(0, index[cloud], grad[cloud, :, None] * weight)
        elif ctx.needs_input_grad[0]:
            # Sums in a fixed order, because `index_add_` on CUDA is not deterministic.
            start = torch.arange(len(x), device=x.device).unsqueeze(1) * x.shape[1]
            order, bounds = segments((index + start).flatten(), len(x) * x.shape[1])
            grad_x = F.embedding_bag(
                order % len(weight),
                weight,
                bounds,
                mode="sum",
                per_sample_weights=grad.flatten().index_select(0, order),
            ).view(x.shape)
        if ctx.needs_input_grad[1]:
            start = torch.arange(len(x), device=x.device).unsqueeze(1) * x.shape[1]
            # A weighted sum of B critical points for every channel, without gathering them.
            grad_weight = F.embedding_bag(
                (index + start).T.contiguous(),
                x.flatten(0, 1),
                mode="sum",
                per_sample_weights=grad.T.contiguous(),
            )
        return grad_x, grad_weight, None


def in_float32(function: Callable[P, T]) -> Callable[P, T]:
    """A function of tensors that computes in float32 under autocast, where its parts would mix dtypes."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **options: P.kwargs) -> T:
        kind = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        if not torch.is_autocast_enabled(kind):
            return function(*args, **options)
        full = (arg.float() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)
        with torch.autocast(kind, enabled=False):
            return function(*full, **options)  # type: ignore[arg-type]

    return wrapped


@in_float32
def max_pooled_linear(x: Tensor, weight: Tensor, search: torch.dtype | None = None) -> Tensor:
    """Maximum over the points of a shared linear layer, without the layer's activations.

    Args:
        x: ``(B, N, C)`` features.
        weight: ``(K, C)`` weights.
        search: dtype for finding the largest point, ``None`` for that of ``x``. ``torch.bfloat16`` takes half
            the time; the point is then the largest only up to rounding, its value is exact.

    Returns:
        ``(B, K)``, equal to ``(x @ weight.T).amax(1)``. In a tie, the first point gets the gradient.
    """
    return cast(Tensor, _MaxPooledLinear.apply(x.contiguous(), weight, search))  # type: ignore[no-untyped-call]


@in_float32
def _batch_statistics(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of ``x @ weight.T`` over all points, and the number of points."""
    rows = x.flatten(0, -2)
    centre = rows.sum(0) / len(rows)  # not mean(0), whose gradient divides every row
    covariance = rows.T @ rows / len(rows) - torch.outer(centre, centre)
    variance = ((weight @ covariance) * weight).sum(1).clamp_min(0)
    return weight @ centre, variance, len(rows)


def affine(
    norm: nn.Module, bias: Tensor, statistics: Callable[[], tuple[Tensor, Tensor, int]]
) -> tuple[Tensor | None, Tensor]:
    """Scale and shift per channel equivalent to a layer's bias and batch norm.

    In training the batch statistics are used, differentiably, and the running ones are updated as in
    `torch.nn.BatchNorm1d`; in evaluation the running ones are used.

    Args:
        norm: batch norm of K channels, or `torch.nn.Identity` if it is folded already.
        bias: ``(K,)`` bias of the layer before it.
        statistics: returns mean and biased variance of the product, and the number of rows; only called in
            training.

    Returns:
        ``(K,)`` scale, ``None`` for 1, and ``(K,)`` shift.
    """
    if isinstance(norm, nn.Identity):
        return None, bias
    norm = cast(nn.BatchNorm1d, norm)
    running_mean, running_var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    if not norm.training:
        scale = norm.weight * torch.rsqrt(running_var + norm.eps)
        return scale, norm.bias + (bias - running_mean) * scale
    mean, variance, count = statistics()
    with torch.no_grad():
        momentum = cast(float, norm.momentum)
        running_mean.lerp_(mean + bias, momentum)
        running_var.lerp_(variance * (count / max(count - 1, 1)), momentum)
        cast(Tensor, norm.num_batches_tracked).add_(1)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return scale, norm.bias - mean * scale  # the layer's bias cancels


def folded(layer: nn.Module, norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the linear map equal to ``layer`` and ``norm`` on the batch ``x``.

    Args:
        layer: linear layer, or convolution of width 1, from C to K channels.
        norm: its batch norm, see `affine`.
        x: ``(B, ..., C)`` input of the layer.

    Returns:
        ``(K, C)`` and ``(K,)``.
    """
    layer = cast(nn.Linear, layer)
    weight = layer.weight.flatten(1)
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias
    scale, shift = affine(norm, bias, lambda: _batch_statistics(x, weight))
    return weight if scale is None else weight * scale.unsqueeze(1), shift


def activated(x: Tensor, slope: float = 0.0) -> Tensor:
    """ReLU, or leaky ReLU for a ``slope`` other than 0; in place."""
    return F.leaky_relu_(x, slope) if slope else x.relu_()


def normalised(x: Tensor, norm: nn.Module, slope: float = 1.0) -> Tensor:
    """Batch norm in training, over all but the last axis of ``(..., K)`` values, and leaky ReLU."""
    norm = cast(nn.BatchNorm1d, norm)
    cast(Tensor, norm.num_batches_tracked).add_(1)
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # an image with the channels last
    rows = F.batch_norm(
        rows,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        True,
        cast(float, norm.momentum),
        norm.eps,
    )
    if slope != 1:
        rows = activated(rows, slope)  # before the views, which would cause a copy
    return rows.permute(0, 2, 3, 1).reshape(x.shape)


def linear(x: Tensor, layer: nn.Module, norm: nn.Module, slope: float = 1.0) -> Tensor:
    """Layer shared by the points, batch norm and leaky ReLU: ``(..., C)`` to ``(..., K)``.

    In evaluation the norm is folded into the layer.
    """
    if norm.training and not isinstance(norm, nn.Identity):
        layer = cast(nn.Linear, layer)
        return normalised(F.linear(x, layer.weight.flatten(1), layer.bias), norm, slope)
    y = F.linear(x, *folded(layer, norm, x))
    return y if slope == 1 else activated(y, slope)


def shared(x: Tensor, layer: nn.Module, norm: nn.Module, slope: float = 0.0) -> Tensor:
    """A layer shared by the points, batch norm and (leaky) ReLU: ``(..., C)`` to ``(..., K)``."""
    return linear(x, layer, norm, slope)


def pooled(x: Tensor, layer: nn.Module, norm: nn.Module, slope: float = 0.0) -> Tensor:
    """`shared` and the maximum over the points: ``(B, N, C)`` to ``(B, K)``, without the ``(B, N, K)``."""
    weight, bias = folded(layer, norm, x)
    return activated(max_pooled_linear(x, weight) + bias, slope)


class _MaxAndMean(torch.autograd.Function):
    """Maximum and mean over the points of ``leaky(x @ w.T + b)``, keeping only the signs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, slope: float) -> Tensor:
        batch, size, channels = len(x), x.shape[1], len(weight)
        result = x.new_empty(batch, 2 * channels)
        index = torch.empty(batch, channels, dtype=torch.int64, device=x.device)
        positive = torch.empty(batch, channels, size, dtype=torch.bool, device=x.device)
        for part in together(batch, size * channels, x.device):
            y = added_product(bias.unsqueeze(1), weight, x[part].mT)
            torch.gt(y, 0, out=positive[part])
            y = F.leaky_relu_(y, slope)
            result[part, ..., :channels], index[part] = max_with_index(y)
            result[part, ..., channels:] = y.mean(-1)
        ctx.save_for_backward(x, weight, index, positive)
        ctx.slope = slope
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, index, positive = ctx.saved_tensors
        of_max, of_mean = grad.chunk(2, 1)
        of_mean = of_mean / x.shape[1]
        grad_x, parameters = torch.empty_like(x), ctx.needs_input_grad[1]
        grad_weight = torch.zeros_like(weight) if parameters else None
        grad_bias = weight.new_zeros(len(weight)) if parameters else None
        for part in together(len(x), x.shape[1] * len(weight), x.device):
            g = of_mean[part].unsqueeze(-1).expand(positive[part].shape).clone()
            g.scatter_add_(-1, index[part].unsqueeze(-1), of_max[part].unsqueeze(-1))
            g = torch.where(positive[part], g, g * ctx.slope)
            torch.matmul(g.mT, weight, out=grad_x[part])
            if grad_weight is not None and grad_bias is not None:
                g = g.movedim(-2, 0).flatten(1)  # (K, N) of all these clouds
                grad_weight.addmm_(g, x[part].reshape(-1, x.shape[2]))
                grad_bias += g.sum(1)
        return grad_x, grad_weight, grad_bias, None


class _MaxAndMeanOf(torch.autograd.Function):
    """Maximum and mean over the middle axis; only the positions of the maxima are kept."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        best = y.amax(1)
        order = torch.arange(y.shape[1], 0, -1, dtype=torch.int32, device=y.device).unsqueeze(1)
        index = torch.empty(best.shape, dtype=torch.int64, device=y.device)
        for part in together(len(y), y[0].numel(), y.device):
            places = ((y[part] == best[part].unsqueeze(-2)) * order).amax(-2)
            index[part] = y.shape[1] - places  # the first of equals
        ctx.save_for_backward(index)
        ctx.size = y.shape[1]
        return torch.cat([best, y.mean(1)], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (index,) = ctx.saved_tensors
        of_max, of_mean = grad.chunk(2, 1)
        spread = (of_mean / ctx.size).unsqueeze(1).repeat(1, ctx.size, 1)
        return cast(Tensor, spread.scatter_add_(1, index.unsqueeze(1), of_max.unsqueeze(1)))


@in_float32
def max_and_mean_pooled(x: Tensor, layer: nn.Module, norm: nn.Module, slope: float) -> Tensor:
    """`shared`, then maximum and mean over the points, concatenated.

    Args:
        x: ``(B, N, C)`` features.
        layer: layer of K channels.
        norm: its batch norm.
        slope: negative slope of the leaky ReLU.

    Returns:
        ``(B, 2 K)``.
    """
    if norm.training and not isinstance(norm, nn.Identity):
        y = shared(x, layer, norm, slope)
        return cast(Tensor, _MaxAndMeanOf.apply(y))  # type: ignore[no-untyped-call]
    weight, bias = folded(layer, norm, x)
    return cast(Tensor, _MaxAndMean.apply(x.contiguous(), weight, bias, slope))  # type: ignore[no-untyped-call]
