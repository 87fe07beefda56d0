"""Normals of point clouds by principal component analysis."""

from __future__ import annotations

import torch
from torch import Tensor

from ifdefense.geometry.points import gather, knn


def estimated_normals(points: Tensor, k: int = 20) -> Tensor:
    """Normals by PCA: eigenvector of the smallest eigenvalue of each neighbourhood's covariance.

    Args:
        points: ``(B, N, 3)``, any frame.
        k: neighbourhood size, including the point itself.

    Returns:
        ``(B, N, 3)`` unit normals of arbitrary sign.

    Examples:
        >>> normals = estimated_normals(points, k=8)
        >>> normals.norm(dim=-1).allclose(torch.ones(2, 64))
        True
    """
    near = gather(points, knn(points, points, min(k, points.shape[1]))[1])  # (B, N, k, 3)
    offset = near - near.mean(2, keepdim=True)
    covariance = offset.mT @ offset  # (B, N, 3, 3)
    normals: Tensor = torch.linalg.eigh(covariance).eigenvectors[..., 0]
    return normals


def outward_normals(points: Tensor) -> Tensor:
    """``(B, N, 3)`` PCA normals oriented away from the mean; exact only for star-shaped solids.

    Examples:
        >>> outward_normals(points).shape
        torch.Size([2, 64, 3])
    """
    normals = estimated_normals(points)
    outward = ((points - points.mean(1, keepdim=True)) * normals).sum(2, keepdim=True) >= 0
    return torch.where(outward, normals, -normals)


def given_normals(normals: Tensor, points: Tensor) -> Tensor:
    """Validates normals and moves them to the device and dtype of the points.

    Raises:
        ValueError: if the shapes differ.

    Examples:
        >>> given_normals(torch.ones(2, 64, 3), points).shape
        torch.Size([2, 64, 3])
    """
    if normals.shape != points.shape:
        given, clouds = tuple(normals.shape), tuple(points.shape)
        raise ValueError(f"normals of shape {given} do not fit clouds of shape {clouds}")
    return normals.to(points)
