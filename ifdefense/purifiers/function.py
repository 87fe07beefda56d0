"""`ifdefense.purify`: the methods as one function."""

from __future__ import annotations

import functools

import torch

from ifdefense.clouds import Clouds, unpack
from ifdefense.purifiers.base import Purifier
from ifdefense.purifiers.registry import DEFAULT


@functools.lru_cache(maxsize=8)
def _pretrained(method: str, device: torch.device) -> Purifier:
    return Purifier.from_pretrained(method).to(device)


def purify(
    points: Clouds,
    method: str = DEFAULT,
    num_points: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Clouds:
    """Removes what an attacker did to point clouds.

    Args:
        points: one cloud ``(N, 3)``, a batch ``(B, N, 3)``, or a list of clouds of different sizes, NumPy or
            torch, in any frame and unit. They are not changed.
        method: name of a method, see `ifdefense.purifiers.registry.METHODS`, or a file of weights.
        num_points: points of each result; by default as many as came in.
        seed: seed of every draw, the same for every cloud: the result for a cloud does not depend on its
            batch.
        device: where to compute; by default where the points are.
        batch_size: clouds that go through the network together.
        progress: whether to show a progress bar.

    Returns:
        The same kind of array as ``points``, in the same frame, unit, precision and on the same device.

    Raises:
        TypeError: if a cloud is no array of real numbers.
        ValueError: if a cloud has a wrong shape, NaN or infinity, zero extent or fewer than 16 distinct
            points, or if there is none; the message names the cloud.
    """
    clouds = unpack(points)
    home = [cloud.device for cloud in clouds.clouds]
    target = torch.device(device) if device is not None else home[0]
    purifier = _pretrained(method, target)
    given = [cloud.to(target) for cloud in clouds.clouds]
    with torch.no_grad():
        result = purifier(given, num_points, seed, batch_size=batch_size, progress=progress)
    return clouds.pack([cloud.to(device) for cloud, device in zip(result, home, strict=True)])
