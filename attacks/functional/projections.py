"""Projections of displacements ``(B, N, 3)`` onto the ball of radius ``epsilon`` of a norm."""

from __future__ import annotations

import torch
from torch import Tensor


def _shrunk(shift: Tensor, norm: Tensor, epsilon: float) -> Tensor:
    """Scales down where the norm, which broadcasts against ``shift``, is above ``epsilon``."""
    return shift * (epsilon / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1)


def l2(shift: Tensor, epsilon: float) -> Tensor:
    """Nearest displacements whose norm over all points together is at most ``epsilon``."""
    return _shrunk(shift, shift.flatten(1).norm(dim=1)[:, None, None], epsilon)


def point_l2(shift: Tensor, epsilon: float) -> Tensor:
    """Nearest displacements of which none is longer than ``epsilon``."""
    return _shrunk(shift, shift.norm(dim=2, keepdim=True), epsilon)


def linf(shift: Tensor, epsilon: float) -> Tensor:
    """Nearest displacements of which no coordinate is larger than ``epsilon``."""
    return shift.clamp(-epsilon, epsilon)
