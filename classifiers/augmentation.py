"""Augmentation of the clouds that classifiers are trained on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from classifiers.options import ClassifierOptions


def augment(points: Tensor, count: int, options: ClassifierOptions, generator: torch.Generator) -> Tensor:
    """Random subsets of the points, rotated, scaled, shifted and jittered.

    Args:
        points: ``(B, N, 3)``.
        count: points of each subset.
        options: strength of the augmentation.
        generator: source of randomness.

    Returns:
        ``(B, min(count, N), 3)``.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * 2 - 1

    batch = len(points)
    order = torch.rand(points.shape[:2], generator=generator).argsort(1)[:, :count]
    points = points.gather(1, order.unsqueeze(2).expand(-1, -1, 3))
    if options.max_rotation:
        angle = uniform(batch) * math.radians(options.max_rotation)
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(batch)
        rows = [torch.stack(row, 1) for row in ((cos, -sin, zero), (sin, cos, zero), (zero, zero, zero + 1))]
        points = points @ torch.stack(rows, 1)
    points = (
        points * torch.exp(uniform(batch, 1, 3) * math.log(options.max_scale))
        + uniform(batch, 1, 3) * options.max_shift
    )
    noise = torch.randn(points.shape, generator=generator) * options.jitter
    return points + noise.clamp(-5 * options.jitter, 5 * options.jitter)


def cut_mix(points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Replaces a random share of the points of every cloud by points of another cloud of the batch.

    PointCutMix-R (Zhang et al., 2021, https://arxiv.org/abs/2101.01461), with beta = 1. The paper matches the
    points that are exchanged; here both are drawn independently, which has the same marginals and needs no
    assignment.

    Args:
        points: ``(B, N, 3)``.
        generator: source of randomness.

    Returns:
        ``(B, N, 3)`` mixed clouds, the ``(B,)`` indices of the clouds that the new points come from, and the
        share of the points that stayed, the same for every cloud.
    """
    batch, size, _ = points.shape
    other = torch.randperm(batch, generator=generator).to(points.device)
    kept = int(torch.randint(size + 1, (), generator=generator))
    stay = torch.rand(batch, size, generator=generator).argsort(1)[:, :kept].to(points.device)
    come = torch.rand(batch, size, generator=generator).argsort(1)[:, kept:].to(points.device)
    own = points.gather(1, stay.unsqueeze(2).expand(-1, -1, 3))
    new = points[other].gather(1, come.unsqueeze(2).expand(-1, -1, 3))
    return torch.cat([own, new], 1), other, kept / size
