"""Distances between an attacked cloud and the clean one, ``(B, N, 3)`` twice to ``(B,)``, all differentiable.

Those of a shift compare point by point; those of sets take clouds of any two sizes, and ``directed`` ones
look from the attacked points to the clean ones only. Gradients are finite where points coincide. Of a
nearest neighbour only the choice is searched, without a gradient, so that no N x M matrix is kept for the
backward pass.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ifdefense.geometry.points import gather, knn, squared_distances


class _GlobalL2(torch.autograd.Function):
    """Norm of each example, whose gradient scales the shift by one number an example, and is 0 at 0."""

    @staticmethod
    def forward(ctx: Any, shift: Tensor) -> Tensor:
        size: Tensor = torch.linalg.vector_norm(shift.flatten(1), dim=1)
        ctx.save_for_backward(shift, size)
        return size

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        shift, size = ctx.saved_tensors
        scale = torch.where(size > 0, grad / size, 0)
        return cast(Tensor, scale[:, None, None] * shift)


def l2(points: Tensor, clean: Tensor) -> Tensor:
    """Norm of the displacements of all points together."""
    return cast(Tensor, _GlobalL2.apply(points - clean))  # type: ignore[no-untyped-call]


def point_l2(points: Tensor, clean: Tensor) -> Tensor:
    """Largest displacement of a point."""
    sizes: Tensor = torch.linalg.vector_norm(points - clean, dim=2)
    return sizes.amax(1)


def linf(points: Tensor, clean: Tensor) -> Tensor:
    """Largest change of a coordinate."""
    return (points - clean).abs().flatten(1).amax(1)


def nearest(points: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest clean point of every attacked one.

    Args:
        points: ``(B, N, 3)`` points.
        clean: ``(B, M, 3)`` points to choose from.

    Returns:
        ``(B, N)`` squared distances, differentiable in both clouds, and ``(B, N)`` indices into ``clean``.
    """
    with torch.no_grad():
        index = knn(points, clean, 1)[1].squeeze(2)
    return (points - gather(clean, index)).square().sum(2), index


def directed_chamfer(points: Tensor, clean: Tensor, *, squared: bool = True) -> Tensor:
    """Mean over ``points`` of the distance to the nearest point of ``clean``.

    Args:
        points: ``(B, N, 3)`` points.
        clean: ``(B, M, 3)`` points.
        squared: mean of squared distances, as in all published attacks, or of plain ones.
    """
    distance = nearest(points, clean)[0]
    return (distance if squared else _root(distance)).mean(1)


def chamfer(points: Tensor, clean: Tensor, *, squared: bool = True) -> Tensor:
    """Two-sided Chamfer distance: the sum, not the average, of the directed ones."""
    return directed_chamfer(points, clean, squared=squared) + directed_chamfer(clean, points, squared=squared)


def directed_hausdorff(points: Tensor, clean: Tensor, *, squared: bool = True) -> Tensor:
    """Largest distance of one of ``points`` from its nearest point of ``clean``.

    Args:
        points: ``(B, N, 3)`` points.
        clean: ``(B, M, 3)`` points.
        squared: the square of that distance, as in all published attacks, or itself.
    """
    distance = nearest(points, clean)[0].amax(1)
    return distance if squared else _root(distance)


def hausdorff(points: Tensor, clean: Tensor, *, squared: bool = True) -> Tensor:
    """Two-sided Hausdorff distance: the larger of the directed ones."""
    there = directed_hausdorff(points, clean, squared=squared)
    return torch.maximum(there, directed_hausdorff(clean, points, squared=squared))


def diameter(points: Tensor) -> Tensor:
    """Distance, not squared, of the farthest pair of points of each cloud: ``(B, N, 3)`` to ``(B,)``."""
    with torch.no_grad():
        pair = squared_distances(points, points).flatten(1).argmax(1)
    ends = gather(points, torch.stack([pair // points.shape[1], pair % points.shape[1]], 1))
    return _root((ends[:, 0] - ends[:, 1]).square().sum(1))


def knn_smoothness(points: Tensor, k: int = 5, alpha: float = 1.05) -> Tensor:
    """How far outliers stand off: the mean of ``d`` over all points, counting those with a large one only.

    Tsai et al., 2020, `Robust Adversarial Objects against Deep Learning Models
    <https://doi.org/10.1609/aaai.v34i01.5443>`_: ``d`` is a point's mean squared distance to its ``k``
    nearest neighbours, and large if above ``mean(d) + alpha * std(d)`` over its cloud. The threshold is a
    constant to the gradient.

    Args:
        points: ``(B, N, 3)`` points.
        k: neighbours, the point itself not counted (published: 5).
        alpha: standard deviations, with N - 1 in the denominator, above the mean (published: 1.05).

    Returns:
        ``(B,)``, in squared units of the input.
    """
    neighbours = gather(points, _neighbours(points, k))  # (B, N, k, 3)
    distance = (neighbours - points.unsqueeze(2)).square().sum(3).mean(2)
    fixed = distance.detach()
    threshold = fixed.mean(1, keepdim=True) + alpha * fixed.std(1, keepdim=True)
    return (distance * (fixed > threshold)).mean(1)


def curvature(points: Tensor, normals: Tensor, k: int = 16) -> Tensor:
    """Local curvature: how steeply the neighbours of a point stand on its tangent plane.

    Wen et al., 2020, `arXiv:1912.11171 <https://arxiv.org/abs/1912.11171>`_: the mean over the
    ``k`` nearest neighbours q of a point p with normal n of ``|<(q - p) / |q - p|, n>|``; a neighbour at the
    same place counts 0.

    Args:
        points: ``(B, N, 3)`` points.
        normals: ``(B, N, 3)`` unit normals; their signs do not matter.
        k: neighbours, the point itself not counted.

    Returns:
        ``(B, N)`` sines between 0 and 1.
    """
    offset = gather(points, _neighbours(points, k)) - points.unsqueeze(2)  # (B, N, k, 3)
    length = _root(offset.square().sum(3))
    height = (offset * normals.unsqueeze(2)).sum(3).abs()
    return (height / torch.where(length > 0, length, 1)).mean(2)


def curvature_difference(points: Tensor, clean: Tensor, normals: Tensor, k: int = 16) -> Tensor:
    """Mean squared difference between a point's `curvature` and that of its nearest clean point.

    Wen et al., 2020, `arXiv:1912.11171 <https://arxiv.org/abs/1912.11171>`_; an attacked point takes the
    normal of its nearest clean point.

    Args:
        points: ``(B, N, 3)`` attacked points.
        clean: ``(B, M, 3)`` clean points.
        normals: ``(B, M, 3)`` unit normals of the clean points.
        k: neighbours (published: 16).
    """
    index = nearest(points, clean)[1]
    expected = gather(curvature(clean, normals, k).unsqueeze(2), index).squeeze(2)
    return (curvature(points, gather(normals, index), k) - expected).square().mean(1)


def _neighbours(points: Tensor, k: int) -> Tensor:
    """``(B, N, k)`` indices of each point's nearest others.

    Of points at one place some may count themselves instead of each other, at the same distance, 0.
    """
    with torch.no_grad():
        return knn(points, points, k + 1)[1][..., 1:]


def _root(squared: Tensor) -> Tensor:
    """Square root, with gradient 0 instead of infinity at 0."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1).sqrt(), 0)
