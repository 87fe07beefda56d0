"""Projections of shifts ``(B, N, 3)`` onto the ball of radius ``epsilon`` of a norm."""

from __future__ import annotations

import torch
from torch import Tensor


def _shrunk(shift: Tensor, norm: Tensor, epsilon: float) -> Tensor:
    """Scales shifts down to a norm of at most ``epsilon``."""
    return shift * (epsilon / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1)


def l2(shift: Tensor, epsilon: float) -> Tensor:
    """Limits the norm over all points.

    Examples:
        >>> l2(torch.full((1, 4, 3), 5.0), 6.0).norm()
        tensor(6.0000)
    """
    return _shrunk(shift, shift.flatten(1).norm(dim=1)[:, None, None], epsilon)


def point_l2(shift: Tensor, epsilon: float) -> Tensor:
    """Limits the length of each point's shift.

    Examples:
        >>> point_l2(torch.ones(1, 4, 3), 1.0).norm(dim=2)
        tensor([[1.0000, 1.0000, 1.0000, 1.0000]])
    """
    return _shrunk(shift, shift.norm(dim=2, keepdim=True), epsilon)


def linf(shift: Tensor, epsilon: float) -> Tensor:
    """Limits each coordinate.

    Examples:
        >>> linf(torch.ones(1, 4, 3), 0.1).amax()
        tensor(0.1000)
    """
    return shift.clamp(-epsilon, epsilon)
