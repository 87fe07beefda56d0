"""Transfers attributes of points (normals, colours, labels) to purified clouds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = TypeVar("Array", Tensor, NDArray[Any])


def transfer_attributes(
    points: Tensor | NDArray[np.floating],
    attributes: Mapping[str, Array],
    purified: Tensor | NDArray[np.floating],
) -> dict[str, Array]:
    """Gives each purified point the attributes of its nearest input point.

    Kept points are their own nearest points, so they keep their attributes.

    Args:
        points: ``(N, 3)`` cloud before purification.
        attributes: ``(N, ...)`` arrays or tensors of any dtype, by name.
        purified: ``(M, 3)`` cloud after purification, in the same frame.

    Returns:
        ``(M, ...)`` arrays or tensors by the same names, of the type, dtype and device of the input.

    Raises:
        ValueError: if shapes do not match, or a coordinate is not finite.

    Examples:
        >>> clean = ifdefense.purify(points[0], "sor", num_points=48)
        >>> numbers = transfer_attributes(points[0], {"number": torch.arange(64)}, clean)["number"]
        >>> torch.equal(points[0][numbers], clean)
        True
    """
    before, after = _coordinates(points, "points"), _coordinates(purified, "purified")
    for name, values in attributes.items():
        if not values.ndim or len(values) != len(before):
            raise ValueError(
                f"{name} must have one row for each of the {len(before)} points, got {tuple(values.shape)}"
            )
    if not attributes:
        return {}
    index = nearest_index(before, after)
    return {
        name: values[torch.from_numpy(index).to(values.device)]
        if isinstance(values, Tensor)
        else np.asarray(values)[index]
        for name, values in attributes.items()
    }


def nearest_index(points: NDArray[np.float64], queries: NDArray[np.float64]) -> NDArray[np.int64]:
    """Index ``(M,)`` of the nearest of ``(N, 3)`` points to each of ``(M, 3)`` queries."""
    from scipy.spatial import cKDTree

    if not len(queries):
        return np.zeros(0, np.int64)
    # Many equal points make a balanced tree degenerate, so the sliding-midpoint rule is used.
    tree = cKDTree(points, balanced_tree=False, compact_nodes=False)
    return np.asarray(tree.query(queries)[1], np.int64)


def _coordinates(points: Tensor | NDArray[np.floating], name: str) -> NDArray[np.float64]:
    array = points.detach().cpu().double().numpy() if isinstance(points, Tensor) else np.asarray(points)
    if array.ndim != 2 or array.shape[1] != 3:
        raise ValueError(f"{name} must be (N, 3), got {array.shape}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite")
    if name == "points" and not len(array):
        raise ValueError("there are no points to take attributes from")
    return array
