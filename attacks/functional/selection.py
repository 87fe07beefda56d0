"""Selection of points by a mask or by saliency."""

from __future__ import annotations

import torch
from torch import Tensor

from ifdefense.geometry.points import gather, lower_median


def selected(points: Tensor, mask: Tensor) -> Tensor:
    """Kept points in their order, repeated from the first up to the original number.

    Linear in the points, so an outlier filter has an exact gradient where its mask is constant.

    Args:
        points: ``(B, N, 3)`` clouds.
        mask: ``(B, N)`` points to keep, at least one per cloud.

    Returns:
        ``(B, N, 3)``, differentiable.

    Raises:
        ValueError: if the mask of a cloud is empty.

    Examples:
        >>> mask = torch.arange(64).expand(2, 64) < 16
        >>> selected(points, mask).shape
        torch.Size([2, 64, 3])
    """
    count = mask.sum(1, keepdim=True)
    if (count == 0).any():
        raise ValueError(f"example {int((count == 0).nonzero()[0, 0])}: the filter keeps no point")
    kept_first = (~mask).byte().argsort(dim=1, stable=True)
    turn = torch.arange(points.shape[1], device=points.device) % count
    return gather(points, kept_first.gather(1, turn))


def saliency(points: Tensor, gradient: Tensor, alpha: float = 1.0) -> Tensor:
    """First-order gain of moving a point to the centre of its cloud, which approximates dropping it.

    Zheng et al., 2019, `arXiv:1812.01687 <https://arxiv.org/abs/1812.01687>`_, equation (8):
    ``r^alpha <x - c, g>`` with the median c, ``r = |x - c|`` and the gradient g of the attacker's loss.

    Args:
        points: ``(B, N, 3)`` clouds.
        gradient: ``(B, N, 3)`` gradient of the loss that the attacker minimises.
        alpha: exponent of the radius (published: 1).

    Returns:
        ``(B, N)``.

    Examples:
        >>> given = points.clone().requires_grad_()
        >>> (gradient,) = torch.autograd.grad(classifier(given).sum(), given)
        >>> saliency(points, gradient).shape
        torch.Size([2, 64])
    """
    offset = points - lower_median(points, 1)
    gain: Tensor = offset.norm(dim=2) ** alpha * (offset * gradient).sum(2)
    return gain
