"""`ifdefense.purify`: the methods as one function."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TypeVar

import torch

from ifdefense.arguments import device_of, seed_of
from ifdefense.clouds import unpack
from ifdefense.purifiers.base import Purifier
from ifdefense.purifiers.registry import DEFAULT, METHODS

C = TypeVar("C")


def purify(
    points: C,
    method: str | Path | Purifier = DEFAULT,
    num_points: int | None = None,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> C:
    """Removes what an attacker did to point clouds.

    Args:
        points: one cloud ``(N, 3)``, a batch ``(B, N, 3)``, or a list of clouds of different sizes: NumPy
            arrays, tensors or nested lists of numbers, in any frame and unit. Clouds may have further columns
            ``(N, 3 + C)``, attributes such as normals or colours. Or a ``Data`` or ``Batch`` of PyTorch
            Geometric, see `ifdefense.pyg`. They are not changed.
        method: name of a method, see `ifdefense.purifiers.registry.METHODS`, a file of weights, or a
            purifier.
        num_points: points of each result; by default as many as came in.
        seed: seed of every draw, the same for every cloud: the result for a cloud does not depend on its
            batch. ``None`` draws a fresh one.
        device: where to compute; by default where the points are. A purifier that is given stays where it is.
        batch_size: clouds that go through the network together.
        progress: whether to show a progress bar.

    Returns:
        The same kind of array as ``points``, in the same frame, unit, precision and on the same device;
        integers come back as floating-point numbers, float64 from 32 bits on. Coordinates are purified.
        A point that was kept keeps its attributes, a new one takes those of the nearest input point.

    Raises:
        TypeError: if a cloud is no array of real numbers, or an argument has the wrong type.
        ValueError: if a cloud has a wrong shape, NaN or infinity, zero extent or fewer than 16 distinct
            points, or if there is none (the message names the cloud); if an argument is out of range.
    """
    clouds = unpack(points)
    home = [cloud.device for cloud in clouds.clouds]
    if isinstance(method, Purifier):
        if device is not None:
            raise ValueError("device is for methods by name: move the purifier itself with .to(device)")
        purifier = method
        weight = next(purifier.parameters(), None)
        target = home[0] if weight is None else weight.device
    elif isinstance(method, (str, Path)):
        target = home[0] if device is None else device_of(device)
        purifier = _pretrained(str(method), target, _version(method))
    else:
        raise TypeError(f"method must be a name, a path or a purifier, got {type(method).__name__}")
    given = [cloud.to(target) for cloud in clouds.clouds]
    with torch.no_grad():
        outcomes = purifier.outcomes(given, num_points, seed_of(seed), batch_size, bool(progress))
    results = [each.points.to(device) for each, device in zip(outcomes, home, strict=True)]
    return clouds.pack(results, [each.index for each in outcomes])  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=8)
def _pretrained(method: str, device: torch.device, version: tuple[int, int] | None) -> Purifier:
    return Purifier.from_pretrained(method).to(device)


def _version(method: str | Path) -> tuple[int, int] | None:
    """What tells that a file of weights is another one now."""
    path = Path(method)
    if str(method) in METHODS or not path.is_file():
        return None
    status = path.stat()
    return status.st_mtime_ns, status.st_size
