"""PointNet: an MLP shared by the points, max-pooling, and a small head.

Tensor names and shapes are those of `yanx27/Pointnet_Pointnet2_pytorch
<https://github.com/yanx27/Pointnet_Pointnet2_pytorch>`_, whose checkpoints load; the output is logits, not
their log-softmax. Two things are computed differently, both exact:

* Every batch norm is folded into the layer before it, in training too: the statistics of a linear layer's
  output follow from the mean and the covariance of its *input*, so that no second pass over the activations
  is needed.
* The layers from 128 to 1,024 channels are used only through their maximum over the points.
  `max_pooled_linear` keeps that maximum and its position instead of the ``(B, N, 1024)`` activations; the
  gradient reaches at most 1,024 points per cloud, so the backward pass is cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ifdefense.geometry.gathering import segments, together

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
    """``y[b, k] = max_n <x[b, n], w[k]>``, with the gradient at the points that reach the maximum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, search: torch.dtype | None) -> Tensor:
        pooled = x.new_empty(len(x), len(weight))
        index = torch.empty(pooled.shape, dtype=torch.long, device=x.device)
        searched, by = (x, weight) if search is None else (x.to(search), weight.to(search))
        for part in together(len(x), x.shape[1] * len(weight), x.device):
            # Maxima of bfloat16 are several times slower than those of float32, also counting the conversion.
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
            # Sums in a fixed order: those of `index_add_` on CUDA vary from run to run.
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


def max_pooled_linear(x: Tensor, weight: Tensor, search: torch.dtype | None = None) -> Tensor:
    """Maximum over the points of a shared linear layer, without the layer's activations.

    Args:
        x: ``(B, N, C)`` features.
        weight: ``(K, C)`` weights.
        search: dtype in which the largest point is searched, ``None`` for that of ``x``. With
            ``torch.bfloat16``, at half the time, that point is the largest only up to rounding; the value at
            it is exact.

    Returns:
        ``(B, K)``, equal to ``(x @ weight.T).amax(1)``. Where several points tie, the first takes the
        gradient.
    """
    return cast(Tensor, _MaxPooledLinear.apply(x.contiguous(), weight, search))  # type: ignore[no-untyped-call]


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
    """Scale and shift per channel by which a layer's bias and its batch norm change the layer's product.

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
    """Weight and bias of the linear map that ``layer`` followed by ``norm`` is on the batch ``x``.

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


def _shared(x: Tensor, layer: nn.Module, norm: nn.Module) -> Tensor:
    """A layer shared by the points, batch norm and ReLU: ``(B, N, C)`` to ``(B, N, K)``."""
    return F.linear(x, *folded(layer, norm, x)).relu_()


def _pooled(x: Tensor, layer: nn.Module, norm: nn.Module, search: torch.dtype | None) -> Tensor:
    """A shared layer, batch norm and the maximum over the points: ``(B, N, C)`` to ``(B, K)``."""
    weight, bias = folded(layer, norm, x)
    return max_pooled_linear(x, weight, search) + bias


class Alignment(nn.Module):
    """Predicts a ``channels x channels`` matrix from the features of a cloud (Spatial Transformer, "T-net").

    Args:
        channels: channels C of the input features.

    Shapes: ``(B, N, C)`` to ``(B, C, C)``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.search: torch.dtype | None = None
        self.conv1 = nn.Conv1d(channels, 64, 1)
        self.conv2 = nn.Conv1d(64, 128, 1)
        self.conv3 = nn.Conv1d(128, 1024, 1)
        self.fc1 = nn.Linear(1024, 512)
        self.fc2 = nn.Linear(512, 256)
        self.fc3 = nn.Linear(256, channels * channels)
        self.bn1 = nn.BatchNorm1d(64)
        self.bn2 = nn.BatchNorm1d(128)
        self.bn3 = nn.BatchNorm1d(1024)
        self.bn4 = nn.BatchNorm1d(512)
        self.bn5 = nn.BatchNorm1d(256)

    def norm_pairs(self) -> list[tuple[str, str]]:
        """Layers and the batch norms that follow them, for `classifiers.fold`."""
        return [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("fc1", "bn4"), ("fc2", "bn5")]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the ``(B, C, C)`` matrices for ``(B, N, C)`` features."""
        x = _shared(x, self.conv1, self.bn1)
        x = _shared(x, self.conv2, self.bn2)
        x = _pooled(x, self.conv3, self.bn3, self.search).relu()
        x = self.bn4(self.fc1(x)).relu()
        x = self.bn5(self.fc2(x)).relu()
        matrix = self.fc3(x).unflatten(1, (self.channels, self.channels))
        return cast(Tensor, matrix + torch.eye(self.channels, dtype=x.dtype, device=x.device))


class Encoder(nn.Module):
    """Points to one feature vector per cloud.

    Args:
        feature_transform: whether the 64 features of each point are aligned by a predicted matrix as well.

    Shapes: ``(B, N, 3)`` to ``(B, 1024)``, and the ``(B, 64, 64)`` feature alignment or ``None``.
    """

    def __init__(self, feature_transform: bool) -> None:
        super().__init__()
        self.search: torch.dtype | None = None
        self.stn = Alignment(3)
        self.conv1 = nn.Conv1d(3, 64, 1)
        self.conv2 = nn.Conv1d(64, 128, 1)
        self.conv3 = nn.Conv1d(128, 1024, 1)
        self.bn1 = nn.BatchNorm1d(64)
        self.bn2 = nn.BatchNorm1d(128)
        self.bn3 = nn.BatchNorm1d(1024)
        self.fstn = Alignment(64) if feature_transform else None

    def norm_pairs(self) -> list[tuple[str, str]]:
        """Layers and the batch norms that follow them, for `classifiers.fold`."""
        return [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")]

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns ``(B, 1024)`` features of ``(B, N, 3)`` points, and the feature alignment."""
        x = points @ self.stn(points)
        x = _shared(x, self.conv1, self.bn1)
        alignment = None
        if self.fstn is not None:
            alignment = self.fstn(x)
            x = x @ alignment
        x = _shared(x, self.conv2, self.bn2)
        return _pooled(x, self.conv3, self.bn3, self.search), alignment


class PointNet(nn.Module):
    """PointNet classifier (Qi et al., 2017, `arXiv:1612.00593 <https://arxiv.org/abs/1612.00593>`_).

    Args:
        num_classes: number of classes.
        feature_transform: whether the 64-channel features are aligned by a predicted matrix.
        dropout: dropout probability before the last layer.

    Shapes: ``(B, N, 3)`` points, mean-centred and of largest norm 1, to ``(B, num_classes)`` logits, for any
    N of at least 1.
    """

    def __init__(self, num_classes: int = 40, feature_transform: bool = True, dropout: float = 0.4) -> None:
        super().__init__()
        self.feat = Encoder(feature_transform)
        self.fc1 = nn.Linear(1024, 512)
        self.fc2 = nn.Linear(512, 256)
        self.fc3 = nn.Linear(256, num_classes)
        self.dropout = nn.Dropout(dropout)
        self.bn1 = nn.BatchNorm1d(512)
        self.bn2 = nn.BatchNorm1d(256)

    def norm_pairs(self) -> list[tuple[str, str]]:
        """Layers and the batch norms that follow them, for `classifiers.fold`."""
        return [("fc1", "bn1"), ("fc2", "bn2")]

    def search_in(self, dtype: torch.dtype | None) -> None:
        """Sets the dtype in which the largest points are searched, see `max_pooled_linear`."""
        for module in self.modules():
            if isinstance(module, (Alignment, Encoder)):
                module.search = dtype

    def forward(self, points: Tensor) -> Tensor:
        """Returns ``(B, num_classes)`` logits of ``(B, N, 3)`` points."""
        return self.with_alignment(points)[0]

    def with_alignment(self, points: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and the ``(B, 64, 64)`` feature alignment that training penalises, if there is one."""
        if points.ndim != 3 or points.shape[-1] != 3:
            raise ValueError(f"expected points of shape (B, N, 3), got {tuple(points.shape)}")
        x, alignment = self.feat(points)
        x = self.bn1(self.fc1(x)).relu()
        x = self.bn2(self.dropout(self.fc2(x))).relu()
        logits: Tensor = self.fc3(x)
        return logits, alignment


def orthogonality_penalty(matrices: Tensor) -> Tensor:
    """Mean distance of ``(B, C, C)`` matrices from orthogonal ones.

    ``mean ||A A^T - I||_F``, section 3 of the paper.
    """
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    distance: Tensor = torch.linalg.matrix_norm(matrices @ matrices.mT - identity)
    return distance.mean()
