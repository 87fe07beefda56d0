"""Which points of a cloud do not belong to its shape: local evidence against a global prior.

The local occupancy network describes each point in its surroundings, the Occupancy Network says from one code
of the whole cloud whether the shape reaches there, and the distances of neighbours say whether the point is
supported as the others are. A small head reads the three. None of them alone is enough: a global network is
too coarse for legs and handles, density varies on honest scans too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ifdefense.geometry.points import knn
from ifdefense.implicit.base import Calibration, load_network
from ifdefense.implicit.local import LocalConfig, LocalOccupancyNetwork
from ifdefense.implicit.occupancy import OccupancyConfig, OccupancyNetwork

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

    It carries its own two networks, so that its head never meets features that it was not trained on.

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
    def of_weights(cls, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> AnomalyNetwork:
        """Builds an untrained network with the sizes and the calibrations of weights.

        Raises:
            ValueError: if tensors or calibrations are missing.
        """
        parts: dict[str, dict[str, Tensor]] = {"local": {}, "prior": {}, "head": {}}
        for name, value in state.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = value
        given = json.loads(metadata.get("calibrations", "{}"))
        if set(given) != {"local", "prior"}:
            raise ValueError("not an anomaly network: the calibrations of its networks are missing")
        read = {name: Calibration(**values) for name, values in given.items()}
        local = LocalOccupancyNetwork(LocalConfig.of_state(parts["local"]), read["local"])
        return cls(local, OccupancyNetwork(OccupancyConfig.of_state(parts["prior"]), read["prior"]))

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
        near = knn(points[None].double(), points[None].double(), k)[0][0].sqrt().float()
        columns = [min(number, k - 1) for number in NEIGHBOURS]
        typical = near[:, columns[1]].median().clamp(min=1e-6)
        support = (near[:, columns] / typical + 0.02).log()
        return points, torch.cat([code.maps[0], inside[:, None], (centred / spread)[:, None], support], 1)

    @torch.no_grad()
    def forward(self, cloud: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded points ``(M, 3)`` of a cloud ``(N, 3)`` and the logits ``(M,)`` of being anomalous."""
        points, inputs = self.features(cloud)
        return points, self.head(inputs)

    def metadata(self) -> dict[str, str]:
        """What `of_weights` reads besides the tensors."""
        calibrations = {"local": self.local.calibration, "prior": self.prior.calibration}
        values = {name: dataclasses.asdict(value) for name, value in calibrations.items()}
        return {"network": "anomaly", "calibrations": json.dumps(values)}


def load_anomaly_network(name_or_path: str | Path = "anomaly") -> AnomalyNetwork:
    """Loads an `AnomalyNetwork`; arguments and errors as `load_network`.

    Raises:
        ValueError: if the weights are those of another network.
    """
    network: object = load_network(name_or_path)
    if not isinstance(network, AnomalyNetwork):
        raise ValueError(f"{name_or_path}: weights of a {type(network).__name__}, not of an AnomalyNetwork")
    return network
