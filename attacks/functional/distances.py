"""Differentiable distances between attacked and clean clouds, ``(B, N, 3)`` and ``(B, M, 3)`` to ``(B,)``.

Norms of a shift compare point by point (N = M). ``directed`` distances go from the attacked points to the
clean ones. Gradients are finite where points coincide. Neighbours are searched without gradients, so no
N x M matrix is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ifdefense.geometry.points import gather, knn, nearest_neighbour, root, squared_distances


class _GlobalL2(torch.autograd.Function):
    """Norm per example with gradient 0 at 0."""

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
    """Euclidean norm of the shift of all points.

    Examples:
        >>> l2(points + 1, points)
        tensor([13.8564, 13.8564])
    """
    return cast(Tensor, _GlobalL2.apply(points - clean))  # type: ignore[no-untyped-call]


def point_l2(points: Tensor, clean: Tensor) -> Tensor:
    """Longest shift of a point.

    Examples:
        >>> point_l2(points + 1, points)
        tensor([1.7321, 1.7321])
    """
    sizes: Tensor = torch.linalg.vector_norm(points - clean, dim=2)
    return sizes.amax(1)


def linf(points: Tensor, clean: Tensor) -> Tensor:
    """Largest change of a coordinate.

    Examples:
        >>> linf(points + 1, points)
        tensor([1., 1.])
    """
    return (points - clean).abs().flatten(1).amax(1)


def directed_hausdorff(points: Tensor, clean: Tensor, *, squared: bool = True) -> Tensor:
    """Largest distance to the nearest clean point; ``squared`` as in all published attacks.

    Examples:
        >>> directed_hausdorff(points[:, :32], points)
        tensor([0., 0.])
    """
    distance = nearest_neighbour(points, clean)[0].amax(1)
    return distance if squared else root(distance)


def hausdorff(points: Tensor, clean: Tensor, *, squared: bool = True) -> Tensor:
    """Two-sided Hausdorff distance: the maximum of the directed ones.

    Examples:
        >>> hausdorff(points, points)
        tensor([0., 0.])
    """
    there = directed_hausdorff(points, clean, squared=squared)
    return torch.maximum(there, directed_hausdorff(clean, points, squared=squared))


def diameter(points: Tensor) -> Tensor:
    """Distance of the farthest pair of points per cloud, ``(B, N, 3)`` to ``(B,)``.

    Examples:
        >>> diameter(2 * points) / diameter(points)
        tensor([2., 2.])
    """
    with torch.no_grad():
        pair = squared_distances(points, points).flatten(1).argmax(1)
    ends = gather(points, torch.stack([pair // points.shape[1], pair % points.shape[1]], 1))
    return root((ends[:, 0] - ends[:, 1]).square().sum(1))


def knn_smoothness(points: Tensor, k: int = 5, alpha: float = 1.05) -> Tensor:
    """Outlier loss ``mean(d * (d > mean(d) + alpha * std(d)))`` over the points of a cloud.

    Tsai et al., 2020, `doi:10.1609/aaai.v34i01.5443 <https://doi.org/10.1609/aaai.v34i01.5443>`_. ``d`` is
    the mean squared distance of a point to its ``k`` nearest other points (published: 5), ``std`` unbiased
    (published: alpha 1.05); the threshold is constant for the gradient.

    Examples:
        >>> knn_smoothness(points, k=5).shape
        torch.Size([2])
    """
    neighbours = gather(points, _neighbours(points, k))  # (B, N, k, 3)
    distance = (neighbours - points.unsqueeze(2)).square().sum(3).mean(2)
    fixed = distance.detach()
    threshold = fixed.mean(1, keepdim=True) + alpha * fixed.std(1, keepdim=True)
    return (distance * (fixed > threshold)).mean(1)


def curvature(points: Tensor, normals: Tensor, k: int = 16) -> Tensor:
    """Local curvature: mean of ``|<(q - p) / |q - p|, n>|`` over the ``k`` nearest neighbours q of p.

    Wen et al., 2020, `arXiv:1912.11171 <https://arxiv.org/abs/1912.11171>`_. Points and unit normals n of
    either sign ``(B, N, 3)`` to ``(B, N)`` in [0, 1]; coincident neighbours count 0.

    Examples:
        >>> from ifdefense.geometry.normals import estimated_normals
        >>> curvature(points, estimated_normals(points), k=8).shape
        torch.Size([2, 64])
    """
    offset = gather(points, _neighbours(points, k)) - points.unsqueeze(2)  # (B, N, k, 3)
    length = root(offset.square().sum(3))
    height = (offset * normals.unsqueeze(2)).sum(3).abs()
    return (height / torch.where(length > 0, length, 1)).mean(2)


def curvature_difference(points: Tensor, clean: Tensor, normals: Tensor, k: int = 16) -> Tensor:
    """Mean squared difference of `curvature` to the nearest clean point, whose normal is used for both.

    Wen et al., 2020, `arXiv:1912.11171 <https://arxiv.org/abs/1912.11171>`_, with unit normals ``(B, M, 3)``
    of the clean points and ``k`` neighbours (published: 16).

    Examples:
        >>> from ifdefense.geometry.normals import estimated_normals
        >>> curvature_difference(points, points, estimated_normals(points), k=8)
        tensor([0., 0.])
    """
    index = nearest_neighbour(points, clean)[1]
    expected = gather(curvature(clean, normals, k).unsqueeze(2), index).squeeze(2)
    return (curvature(points, gather(normals, index), k) - expected).square().mean(1)


def spread(points: Tensor, values: Tensor, k: int) -> Tensor:
    """``(B, N)`` standard deviation of ``values`` ``(B, N)`` over the ``k`` nearest neighbours of a point.

    Examples:
        >>> spread(points, torch.ones(2, 64), k=4).shape
        torch.Size([2, 64])
    """
    return gather(values.unsqueeze(2), _neighbours(points, k)).squeeze(3).std(2)


def _neighbours(points: Tensor, k: int) -> Tensor:
    """``(B, N, k)`` indices of the nearest other points; coincident points may count themselves."""
    with torch.no_grad():
        return knn(points, points, k + 1)[1][..., 1:]
