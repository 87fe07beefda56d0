"""Critical points and clusters of them, used as starts of added points."""

from __future__ import annotations

import torch
from torch import Tensor

from attacks.functional.losses import cross_entropy
from attacks.oracle import Oracle
from ifdefense.geometry.points import gather, squared_distances


def critical_points(oracle: Oracle, points: Tensor, count: int) -> Tensor:
    """``(B, count, 3)`` points with the largest gradient of the cross-entropy, in descending order.

    Xiang et al., 2019, `arXiv:1809.07016 <https://arxiv.org/abs/1809.07016>`_. One query; the ranking is
    repeated if ``count`` exceeds N.
    """
    _, gradient = oracle.gradient(points, cross_entropy)
    order = gradient.square().sum(2).argsort(dim=1, descending=True, stable=True)
    return gather(points, order[:, torch.arange(count, device=order.device) % points.shape[1]])


def dbscan(points: Tensor, radius: float, least: int) -> Tensor:
    """DBSCAN (Ester et al., 1996, KDD) of a batch.

    Differs from the original in that a border point joins the cluster of its nearest core point, not the
    first one found.

    Args:
        points: ``(B, K, 3)``.
        radius: radius of a neighbourhood, in units of the points.
        least: points in the neighbourhood of a core point, including itself.

    Returns:
        ``(B, K)`` lowest index of a core point of the cluster, or -1 for noise.
    """
    size = points.shape[1]
    distance = squared_distances(points, points)
    close = distance <= radius**2
    core = close.sum(2) >= least
    link = close & core.unsqueeze(1) & core.unsqueeze(2)
    label = torch.arange(size, device=points.device).expand(len(points), -1)
    while True:
        lowest = torch.where(link, label.unsqueeze(1), label.unsqueeze(2)).amin(2)
        lowest = lowest.gather(1, lowest)  # pointer jumping, for long clusters
        if torch.equal(lowest, label):
            break
        label = lowest
    gap, index = torch.where(core.unsqueeze(1), distance, torch.inf).min(2)
    return torch.where(gap <= radius**2, label.gather(1, index), -1)


def seed_clusters(
    points: Tensor, num: int, size: int, radius: float, least: int, generator: torch.Generator
) -> Tensor:
    """Starting groups of added points: the largest clusters of `dbscan`.

    If there are fewer than ``num``, the others are neighbourhoods of random points, without noise points
    unless there are no others.

    Args:
        points: ``(B, K, 3)`` critical points.
        num: groups.
        size: points per neighbourhood.
        radius: of `dbscan`.
        least: of `dbscan`.
        generator: source of randomness, on the CPU, shared by all examples.

    Returns:
        ``(B, num, K)`` masks, none empty.

    Raises:
        ValueError: if there are fewer points than groups.
    """
    count = points.shape[1]
    if count < num:
        raise ValueError(f"cannot start {num} groups from {count} points")
    labels = dbscan(points, radius, least)
    clustered = labels >= 0
    population = torch.zeros_like(labels).scatter_add_(1, labels.clamp_min(0), clustered.long())
    largest = population.argsort(dim=1, descending=True, stable=True)[:, :num]
    members = labels.unsqueeze(1) == largest.unsqueeze(2)  # (B, num, K)

    allowed = clustered | ~clustered.any(1, keepdim=True)
    draw = torch.rand(num, count, generator=generator, dtype=torch.float32).to(points.device)
    middle = torch.where(allowed.unsqueeze(1), draw, -1).argmax(2)  # (B, num)
    distance = squared_distances(gather(points, middle), points)
    distance = torch.where(allowed.unsqueeze(1), distance, torch.inf)
    index = distance.argsort(dim=2, stable=True)[..., :size]
    around = torch.zeros_like(members).scatter_(2, index, True) & allowed.unsqueeze(1)
    return torch.where(members.any(2, keepdim=True), members, around)


def draw_members(members: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draws ``(B, num, size)`` indices from masks ``(B, num, K)``; repeats only if there are too few."""
    draw = torch.rand(members.shape[1:], generator=generator, dtype=torch.float32).to(members.device)
    order = torch.where(members, draw, torch.inf).argsort(2)
    turn = torch.arange(size, device=members.device) % members.sum(2, keepdim=True)
    return order.gather(2, turn)
