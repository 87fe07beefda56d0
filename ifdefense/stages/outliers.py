"""Statistical outlier removal (SOR) and simple random sampling (SRS)."""

from __future__ import annotations

import torch
from torch import Tensor

from ifdefense.geometry.points import nearest_squared


def statistical_outlier_removal(points: Tensor, k: int = 2, alpha: float = 1.1) -> Tensor:
    """Statistical outlier removal (SOR): mask of the points to keep.

    A point is kept if its mean *squared* distance to its ``k`` nearest neighbours is at most
    ``mean + alpha * std`` over the cloud, as in DUP-Net (Zhou et al., ICCV 2019,
    https://arxiv.org/abs/1812.11017) and IF-Defense (https://arxiv.org/abs/2010.05272).

    Args:
        points: ``(B, N, 3)``, any frame.
        k: neighbours.
        alpha: threshold in standard deviations above the mean.

    Returns:
        ``(B, N)`` mask of kept points, at least one per cloud.

    Examples:
        >>> kept = statistical_outlier_removal(points, k=2, alpha=1.1)
        >>> kept.shape, kept.dtype
        (torch.Size([2, 64]), torch.bool)
    """
    distances = nearest_squared(points, min(k + 1, points.shape[1]))
    value = distances[..., 1:].mean(-1)  # without the point itself
    limit = value.mean(-1, keepdim=True) + alpha * value.std(-1, keepdim=True)
    return value <= limit * (1 + 1e-5)  # on a regular grid all values equal the mean, up to rounding


def simple_random_sampling(points: Tensor, drop: int = 500, *, seed: int = 0) -> Tensor:
    """Simple random sampling (SRS): mask of the points to keep, the same in every cloud.

    Args:
        points: ``(B, N, 3)``, any frame.
        drop: points to drop from each cloud.
        seed: random seed.

    Returns:
        ``(B, N)`` mask with ``N - drop`` entries ``True`` in each row.

    Raises:
        ValueError: if no point would be left.

    Examples:
        >>> simple_random_sampling(points, 16, seed=0).sum(1)
        tensor([48, 48])
    """
    count = points.shape[1]
    if drop >= count:
        raise ValueError(f"cannot drop {drop} of {count} points")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(count, dtype=torch.bool)
    mask[order[:drop]] = False
    return mask.to(points.device).expand(len(points), -1)
