"""Functional interface: `ifdefense.purify`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TypeVar

import torch

from ifdefense.arguments import device_of, seed_of
from ifdefense.clouds import unpack
from ifdefense.guard import guarded
from ifdefense.purifiers.base import Purifier
from ifdefense.purifiers.loading import load
from ifdefense.purifiers.registry import DEFAULT, METHODS
from ifdefense.purifiers.saving import SPEC, WEIGHTS

C = TypeVar("C")


@guarded
def purify(
    points: C,
    method: str | Path | Purifier = DEFAULT,
    num_points: int | None = None,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    batch_size: int = 16,
    progress: bool = False,
    up: str | None = None,
) -> C:
    """Purifies point clouds.

    Args:
        points: one cloud ``(N, 3)``, a batch ``(B, N, 3)``, or a list of clouds of different sizes: NumPy
            arrays, tensors or nested lists of numbers, in any frame and unit. Further columns ``(N, 3 + C)``
            are attributes, such as normals or colours. Also ``Data`` and ``Batch`` of PyTorch Geometric,
            ``Pointclouds`` and ``Meshes`` of PyTorch3D, ``PointCloud`` and ``Trimesh`` of trimesh, see
            `ifdefense.structures`; meshes are sampled and become clouds. Not modified.
        method: one of `ifdefense.purifiers.registry.METHODS`, a file of weights, a folder of
            `ifdefense.Purifier.save`, or a purifier.
        num_points: points per result; by default as in the input, and 1,024 for meshes.
        seed: random seed, applied per cloud, so results do not depend on the batch. ``None`` draws a new one.
        device: by default the device of the points. Purifier objects stay on their device.
        batch_size: clouds processed together.
        progress: show a progress bar.
        up: up axis of the points, one of `ifdefense.geometry.axes.AXES`, such as ``"y"``; z by default.
            Needed for networks that depend on the orientation, such as those of ``onet-mesh`` and ``sor-ae``.

    Returns:
        The same kind of array as ``points``, in the same frame, unit and dtype, on the same device. Integers
        become floating-point numbers, float64 from 32 bits on. Kept points keep their attributes, new ones
        take those of the nearest input point. The result requires gradients if ``points`` do and the method
        is differentiable (`ifdefense.purifiers.registry.METHODS`); if it is not, a warning is logged.

    Raises:
        TypeError: if a cloud is not an array of real numbers, or an argument has the wrong type.
        ValueError: if a cloud has a wrong shape, values that are not finite, zero extent or fewer than 16
            distinct points (the message names it); if there are no clouds, or an argument is out of range.

    Examples:
        >>> clean = ifdefense.purify(points, "sor", num_points=48)
        >>> clean.shape
        torch.Size([2, 48, 3])
    """
    seed = seed_of(seed)
    clouds = unpack(points, num_points, seed)
    if isinstance(method, Purifier):
        if device is not None:
            raise ValueError("device is for methods by name: move the purifier itself with .to(device)")
        purifier = method
    elif isinstance(method, (str, Path)):
        target = clouds.clouds[0].device if device is None else device_of(device)
        purifier = _pretrained(str(method), target, _version(method))
        clouds = clouds.on(target)
    else:
        raise TypeError(f"method must be a name, a path or a purifier, got {type(method).__name__}")
    return purifier(  # type: ignore[no-any-return]
        clouds, num_points, seed, batch_size=batch_size, progress=bool(progress), up=up
    )


@functools.lru_cache(maxsize=8)
def _pretrained(method: str, device: torch.device, version: tuple[tuple[int, int], ...]) -> Purifier:
    return load(method, device=device)


def _version(method: str | Path) -> tuple[tuple[int, int], ...]:
    """Modification times and sizes of a file of weights or of a folder, to detect changes."""
    path = Path(method)
    if str(method) in METHODS:
        return ()
    files = [path / SPEC, path / WEIGHTS] if path.is_dir() else [path]
    states = [each.stat() for each in files if each.is_file()]
    return tuple((state.st_mtime_ns, state.st_size) for state in states)
