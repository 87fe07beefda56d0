"""Which points of a cloud do not belong to its shape: local evidence against a global prior.

The local occupancy network describes each point in its surroundings, the Occupancy Network says from one code
of the whole cloud whether the shape reaches there, and the distances of neighbours say whether the point is
supported as the others are. A small head reads the three. None of them alone is enough: a global network is
too coarse for legs and handles, density varies on honest scans too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from ifdefense.checkpoints import load_into, load_metadata, load_state, save_safetensors
from ifdefense.geometry.points import nearest_squared
from ifdefense.implicit.base import load_network, weights_path
from ifdefense.implicit.local import LocalOccupancyNetwork
from ifdefense.implicit.occupancy import OccupancyNetwork
from ifdefense.provenance import digest_of_weights

NEIGHBOURS = (2, 8, 16)
"""Neighbours whose distances are the support of a point."""

HIDDEN = 128
"""Width of the head."""

LIMIT = 8.0
"""Standardised inputs are clipped here: a network has never seen farther ones."""


class AnomalyHead(nn.Module):
    """Three layers on standardised inputs.

    Args:
        inputs: numbers per point.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))
        self.first = nn.Linear(inputs, HIDDEN)
        self.second = nn.Linear(HIDDEN, HIDDEN)
        self.out = nn.Linear(HIDDEN, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``(M,)`` of inputs ``(M, C)``."""
        x = ((inputs - self.mean) / self.std).clamp(-LIMIT, LIMIT)
        x = torch.relu(self.second(torch.relu(self.first(x))))
        logits: Tensor = self.out(x).squeeze(-1)
        return logits


class AnomalyNetwork(nn.Module):
    """Probability that a point is not one of the shape's surface.

    Its weights are those of the head alone. They name the weights of both networks, and are refused where
    these have changed, so that the head never meets features that it was not trained on.

    Args:
        local: describes each point in its surroundings.
        prior: the shape as a whole; one view of the cloud is encoded.
    """

    source: str | None = None

    def __init__(self, local: LocalOccupancyNetwork, prior: OccupancyNetwork) -> None:
        super().__init__()
        self.local, self.prior = local, prior
        self.prior.views = 1
        self.head = AnomalyHead(4 * local.config.values + 2 + len(NEIGHBOURS))

    @classmethod
    def untrained(cls, local: str, prior: str) -> Self:
        """With a new head.

        Args:
            local: name or file of weights of a local occupancy network, see `load_network`.
            prior: of an Occupancy Network.

        Raises:
            ValueError: if the weights are those of other networks.
        """
        networks: list[object] = [load_network(local), load_network(prior)]
        first, second = networks
        if not isinstance(first, LocalOccupancyNetwork) or not isinstance(second, OccupancyNetwork):
            raise ValueError(
                f"a local occupancy network and an Occupancy Network are needed, got {local} and {prior}: "
                + " and ".join(type(network).__name__ for network in networks)
            )
        return cls(first, second).eval()

    @classmethod
    def load(cls, name_or_path: str | Path = "anomaly") -> Self:
        """Loads the head and the networks that it names; arguments and errors as `load_network`.

        Raises:
            ValueError: if the weights are those of another network, or the head was trained on other weights.
        """
        path = weights_path(name_or_path)
        try:
            given = json.loads(load_metadata(path)["networks"])
            names = {part: given[part]["source"] for part in ("local", "prior")}
        except (KeyError, TypeError, json.JSONDecodeError):
            raise ValueError(f"{path}: not an anomaly network: it does not name its networks") from None
        network = cls.untrained(**names)
        if network.networks() != given:
            raise ValueError(
                f"{path}: its head was trained on other weights of {' or '.join(names.values())}"
            )
        load_into(network.head, load_state(path), path)
        network.source = str(name_or_path)
        return network

    def save(self, path: Path, **metadata: str) -> None:
        """Writes what `load` reads, with further metadata."""
        save_safetensors(self.head, path, {"networks": json.dumps(self.networks()), **metadata})

    def networks(self) -> dict[str, dict[str, str]]:
        """Names and digests of the weights of both networks."""
        return {
            "local": {"source": str(self.local.source), "weights": digest_of_weights(self.local)},
            "prior": {"source": str(self.prior.source), "weights": digest_of_weights(self.prior)},
        }

    def features(self, cloud: Tensor) -> tuple[Tensor, Tensor]:
        """What the head reads.

        Args:
            cloud: ``(N, 3)``, unit-cube frame.

        Returns:
            The encoded points ``(M, 3)``, a subset if there are more than the local network takes, and their
            inputs ``(M, C)``: affine maps of the local network; logit of the prior above its level, also in
            robust standard deviations of the cloud; logarithms of distances of neighbours over the cloud's
            median.
        """
        (code,) = self.local.encode([cloud])
        points = code.points[0]
        field = self.prior.field(self.prior.encode([cloud]))
        inside = field(points, torch.zeros(len(points), dtype=torch.long, device=points.device))
        inside = inside - self.prior.calibration.level
        centred = inside - inside.median()
        spread = 1.4826 * centred.abs().median() + 0.05
        k = min(NEIGHBOURS[-1] + 1, len(points))
        near = nearest_squared(points[None].double(), k)[0].sqrt().float()
        columns = [min(number, k - 1) for number in NEIGHBOURS]
        typical = near[:, columns[1]].median().clamp(min=1e-6)
        support = (near[:, columns] / typical + 0.02).log()
        return points, torch.cat([code.maps[0], inside[:, None], (centred / spread)[:, None], support], 1)

    @torch.no_grad()
    def forward(self, cloud: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded points ``(M, 3)`` of a cloud ``(N, 3)`` and the logits ``(M,)`` of being anomalous."""
        points, inputs = self.features(cloud)
        return points, self.head(inputs)
