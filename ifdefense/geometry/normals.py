"""Normals of point clouds by principal components."""

from __future__ import annotations

import torch
from torch import Tensor

from ifdefense.geometry.points import gather, knn


def estimated_normals(points: Tensor, k: int = 20) -> Tensor:
    """Normals of clouds by principal components.

    The direction in which a point and its neighbours spread least: the eigenvector of the smallest eigenvalue
    of their covariance.

    Args:
        points: ``(B, N, 3)``, any frame.
        k: points of a neighbourhood, the point itself included.

    Returns:
        ``(B, N, 3)`` of length 1; the sign is arbitrary, and so is the direction where all points of a
        neighbourhood are on a line.
    """
    near = gather(points, knn(points, points, min(k, points.shape[1]))[1])  # (B, N, k, 3)
    offset = near - near.mean(2, keepdim=True)
    covariance = offset.mT @ offset  # (B, N, 3, 3)
    normals: Tensor = torch.linalg.eigh(covariance).eigenvectors[..., 0]
    return normals


def outward_normals(points: Tensor) -> Tensor:
    """Unit normals by principal components, pointing away from the cloud's mean.

    Right for every solid that is star-shaped about its mean; a guess in the concave parts of others.

    Args:
        points: ``(B, N, 3)`` points.

    Returns:
        ``(B, N, 3)``.
    """
    normals = estimated_normals(points)
    outward = ((points - points.mean(1, keepdim=True)) * normals).sum(2, keepdim=True) >= 0
    return torch.where(outward, normals, -normals)
