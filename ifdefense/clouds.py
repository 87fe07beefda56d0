"""What callers hand in, one cloud, a batch or a list, NumPy or torch: checked, and given back as it came."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

MIN_POINTS = 16
"""Distinct points that a cloud must have at least."""

Clouds = Tensor | np.ndarray | Sequence[Tensor] | Sequence[np.ndarray]
"""``(N, 3)``, ``(B, N, 3)``, or a list of ``(N_i, 3)``."""


@dataclasses.dataclass(frozen=True, eq=False)
class Unpacked:
    """Clouds as a list of tensors, with the way back to the caller's kind.

    Attributes:
        clouds: ``(N_i, 3)`` float tensors in the caller's precision, on the caller's device.
        pack: turns a list of as many ``(M_i, 3)`` tensors into the kind of array that came in.
    """

    clouds: list[Tensor]
    pack: Callable[[list[Tensor]], Clouds]


def unpack(points: Clouds, *, detach: bool = True) -> Unpacked:
    """Checks clouds and takes them apart.

    Args:
        points: clouds in the caller's frame.
        detach: whether the tensors are cut off from the graph that they are part of.

    Raises:
        TypeError: if a cloud is neither a NumPy array nor a tensor, or its numbers are not real.
        ValueError: for a wrong shape, an empty list, NaN or infinity, zero extent, or fewer than
            :data:`MIN_POINTS` distinct points, naming the cloud.
    """
    if isinstance(points, (Tensor, np.ndarray)):
        if points.ndim not in (2, 3) or points.shape[-1] != 3:
            raise ValueError(
                f"expected a cloud (N, 3), a batch (B, N, 3) or a list of clouds, got {_shape(points)}"
            )
        single = points.ndim == 2
        parts: list[ArrayLike | Tensor] = [points] if single else list(points)
    elif isinstance(points, (list, tuple)):
        single, parts = False, list(points)
    else:
        raise TypeError(f"expected NumPy arrays or tensors, got {type(points).__name__}")
    if not parts:
        raise ValueError("there are no clouds: the list or batch is empty")
    names = ["the cloud" if single else f"cloud {index}" for index in range(len(parts))]
    clouds = [_check(part, name, detach) for part, name in zip(parts, names, strict=True)]

    def pack(result: list[Tensor]) -> Clouds:
        if isinstance(points, Tensor):
            return result[0] if single else torch.stack(result)
        if isinstance(points, np.ndarray):
            return result[0].cpu().numpy() if single else torch.stack(result).cpu().numpy()
        kinds = zip(parts, result, strict=True)
        return cast(
            Clouds, [cloud.cpu().numpy() if isinstance(part, np.ndarray) else cloud for part, cloud in kinds]
        )

    return Unpacked(clouds, pack)


def _shape(points: Tensor | np.ndarray) -> str:
    return f"an array of shape {tuple(points.shape)}"


def _check(cloud: object, name: str, detach: bool) -> Tensor:
    """One cloud as a float tensor."""
    if isinstance(cloud, np.ndarray):
        if cloud.dtype.kind not in "fiu":
            raise TypeError(f"{name} has dtype {cloud.dtype}: coordinates must be real numbers")
        native = np.ascontiguousarray(cloud, dtype=cloud.dtype.newbyteorder("="))
        cloud = torch.from_numpy(native.astype(np.float64) if native.dtype.itemsize > 8 else native)
    if not isinstance(cloud, Tensor):
        raise TypeError(f"{name} is a {type(cloud).__name__}: expected a NumPy array or a tensor")
    if cloud.dtype == torch.bool or cloud.is_complex():
        raise TypeError(f"{name} has dtype {cloud.dtype}: coordinates must be real numbers")
    if cloud.ndim != 2 or cloud.shape[1] != 3:
        raise ValueError(f"{name} must have shape (N, 3), got {tuple(cloud.shape)}")
    if not cloud.is_floating_point():
        cloud = cloud.float()
    if detach:
        cloud = cloud.detach()
    broken = ~torch.isfinite(cloud).all(1)
    if broken.any():
        first = int(broken.nonzero()[0])
        raise ValueError(
            f"{name} has {int(broken.sum())} points with NaN or infinity, the first is point {first}"
        )
    if len(cloud) and bool((cloud == cloud[0]).all()):
        raise ValueError(f"{name} has zero extent: all its {len(cloud)} points are the same")
    distinct = len(torch.unique(cloud.detach(), dim=0))
    if distinct < MIN_POINTS:
        raise ValueError(f"{name} has {distinct} distinct points, at least {MIN_POINTS} are needed")
    return cloud
