"""Purification by a network that maps clouds to clouds, such as PU-Net or an auto-encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
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
    """Replaces a cloud by the requested number of points from the output of a network.

    The input of the network is the cloud in the unit sphere, or a random subset if it has more than
    `PointNetwork.points` points. If more points are requested than the network returns, random ones are
    repeated.

    Args:
        network: the network.
        name: name of the method.
        sampling: how surplus points are reduced: by ``"farthest"``-point sampling, which covers the result
            evenly, or at ``"random"``.

    Raises:
        ValueError: if ``sampling`` is unknown.

    Examples:
        >>> from ifdefense.point_networks.autoencoder import AutoEncoder
        >>> purifier = MappedPurifier(AutoEncoder.load("autoencoder-modelnet40"))
        >>> purifier(points).shape
        torch.Size([2, 64, 3])
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
        """Maps the clouds and resamples the results."""
        with stage("mapping"):
            mapped = self._mapped(clouds, seed)
        with stage("resampling"):
            taken = self._taken([points.detach() for points in mapped], counts, seed)
            return [
                Outcome(points if index is None else points[index])
                for points, index in zip(mapped, taken, strict=True)
            ]

    def _mapped(self, clouds: list[Tensor], seed: int) -> list[Tensor]:
        """The results of the network, ``(M_i, 3)`` in the unit cube."""
        up = trained_axis(self.network) or UP
        given = [turned(random_subset(cloud, self.network.points, seed), UP, up) for cloud in clouds]
        centres = [cloud.mean(0) for cloud in given]
        radii = [(cloud - centre).norm(dim=1).max() for cloud, centre in zip(given, centres, strict=True)]
        spheres = [
            (cloud - centre) / radius for cloud, centre, radius in zip(given, centres, radii, strict=True)
        ]
        results = zip(self.network.mapped(spheres), centres, radii, strict=True)
        return [turned(points * radius + centre, up) for points, centre, radius in results]

    def _taken(self, clouds: list[Tensor], counts: Sequence[int | None], seed: int) -> list[Tensor | None]:
        """Indices ``(count,)`` of the points selected from each cloud; ``None`` for all."""
        taken: list[Tensor | None] = [None] * len(clouds)
        spread: dict[tuple[int, int], list[int]] = {}
        for i, (points, count) in enumerate(zip(clouds, counts, strict=True)):
            if count is not None and self.sampling == "farthest" and count < len(points):
                spread.setdefault((len(points), count), []).append(i)
            elif count is not None:
                taken[i] = refilled(len(points), count, seed).to(points.device)
        for (_, count), rows in spread.items():
            found = spread_sampling(torch.stack([clouds[i] for i in rows]), count)
            for i, index in zip(rows, found, strict=True):
                taken[i] = index
        return taken
