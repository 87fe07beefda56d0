"""Purification by a network that maps clouds to clouds, such as PU-Net or an auto-encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from ifdefense.geometry.axes import UP, trained_axis, turned
from ifdefense.geometry.points import spread_sampling
from ifdefense.implicit.base import random_subset
from ifdefense.point_networks.base import PointNetwork
from ifdefense.purifiers.base import Outcome, Purifier
from ifdefense.purifiers.filters import refilled
from ifdefense.timing import stage

Sampling = Literal["farthest", "random"]


class MappedPurifier(Purifier):
    """Replaces a cloud by the result of a network, and takes the number of points asked for from it.

    The network gets the cloud in the unit sphere, and a random subset of one with more than
    `PointNetwork.points` points. Clouds are mapped one by one, as rounding varies with the batch. Where more
    points are asked for than there are, all are taken and random ones repeat.

    Args:
        network: the network.
        name: name of the method.
        sampling: which points are taken where there are too many: a ``"farthest"``-point sample, which
            covers the result evenly, or ``"random"`` ones.

    Raises:
        ValueError: if ``sampling`` is unknown.
    """

    differentiable = True

    def __init__(self, network: PointNetwork, name: str = "mapped", sampling: Sampling = "farthest") -> None:
        super().__init__()
        if sampling not in get_args(Sampling):
            raise ValueError(f"sampling must be one of {', '.join(get_args(Sampling))}, got {sampling!r}")
        self.network = network
        self.name = name
        self.sampling = sampling
        self.eval()

    def run(self, clouds: list[Tensor], counts: Sequence[int | None], seed: int) -> list[Outcome]:
        """Points of the mapped clouds."""
        with stage("mapping"):
            mapped = [self._mapped(cloud, seed) for cloud in clouds]
        with stage("resampling"):
            return [
                Outcome(points if count is None else points[self._taken(points.detach(), count, seed)])
                for points, count in zip(mapped, counts, strict=True)
            ]

    def _mapped(self, cloud: Tensor, seed: int) -> Tensor:
        """The result of the network, ``(M, 3)`` in the unit cube."""
        device = next(self.network.parameters()).device
        up = trained_axis(self.network) or UP
        given = turned(random_subset(cloud, self.network.points, seed).to(device), UP, up)
        centre = given.mean(0)
        radius = (given - centre).norm(dim=1).max()
        points: Tensor = self.network(((given - centre) / radius)[None])[0]
        result: Tensor = turned(points * radius + centre, up)
        return result.to(cloud.device)

    def _taken(self, points: Tensor, count: int, seed: int) -> Tensor:
        """Indices ``(count,)`` of the points that are taken."""
        if self.sampling == "farthest" and count < len(points):
            return spread_sampling(points[None], count)[0]
        return refilled(len(points), count, seed).to(points.device)
