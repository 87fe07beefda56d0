"""Detects points of a cloud that do not belong to its shape, by local evidence and a global prior.

A small head scores every point by three features: the local occupancy network describes its neighbourhood,
the Occupancy Network predicts from a code of the whole cloud whether the point is inside the shape, and the
distances to its neighbours measure its support. No single feature suffices: a global network is too coarse
for legs and handles, and density also varies in clean scans.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ifdefense.checkpoints import load_metadata, load_weights, save_safetensors, stated_axis
from ifdefense.devices import in_float64
from ifdefense.geometry.axes import UP
from ifdefense.geometry.points import Neighbours
from ifdefense.guard import loading
from ifdefense.implicit.base import Field, ImplicitNetwork, field_of, load_network, metadata_of, weights_path
from ifdefense.implicit.local import LocalField, LocalOccupancyNetwork
from ifdefense.implicit.occupancy import OccupancyNetwork
from ifdefense.provenance import digest_of_weights

NEIGHBOURS = (2, 8, 16)
"""Number of neighbours whose distances measure the support of a point."""

CONTEXT = 8
"""Number of nearest points, itself included, whose mean inputs are inputs as well, as anomalies form
groups."""

HIDDEN = 128
"""Width of the head."""

LIMIT = 8.0
"""Standardised inputs are clipped to this range, which the network was trained on."""


class AnomalyHead(nn.Module):
    """Three layers on standardised inputs.

    Args:
        inputs: number of inputs per point.
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
    """Predicts the probability that a point does not belong to the shape's surface.

    The weights are those of the head only. They name the weights of both networks, and are rejected if these
    have changed, as the head would receive other features than in training.

    Args:
        local: local occupancy network.
        prior: Occupancy Network; one view of the cloud is encoded.

    Examples:
        >>> neighbours, logits = AnomalyNetwork.load()(points[0])
        >>> logits.shape
        torch.Size([64])
    """

    source: str | None = None
    up_axis: str | None = None

    def __init__(self, local: LocalOccupancyNetwork, prior: OccupancyNetwork) -> None:
        super().__init__()
        self.local, self.prior = local, prior
        self.prior.views = 1
        self.head = AnomalyHead(2 * (4 * local.config.values + 2 + len(NEIGHBOURS)))

    @classmethod
    def untrained(cls, local: str, prior: str) -> Self:
        """Builds an anomaly network with an untrained head.

        Args:
            local: name or file of weights of a local occupancy network, see `load_network`.
            prior: the same of an Occupancy Network.

        Raises:
            ValueError: if the weights are of other types of networks.
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
    @loading
    def load(cls, name_or_path: str | Path = "anomaly") -> Self:
        """Loads the head and the networks named in its file; arguments and errors as `load_network`.

        Raises:
            ValueError: if the weights are of another type of network, or the head was trained with other
                weights.
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
        load_weights(network.head, path)
        network.source = str(name_or_path)
        network.up_axis = stated_axis(path)
        return network

    def save(self, path: Path, **metadata: str) -> None:
        """Saves a file for `load`, with further metadata."""
        networks = json.dumps(self.networks())
        save_safetensors(self.head, path, {"networks": networks, "up": UP, **metadata})

    def metadata(self) -> dict[str, str]:
        """What `of_weights` needs beside the tensors."""
        parts = {"local": self.local, "prior": self.prior}
        own = {} if self.up_axis is None else {"up": self.up_axis}
        return {**own, **{name: json.dumps(metadata_of(part)) for name, part in parts.items()}}

    @classmethod
    def of_weights(cls, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Self:
        """Builds an untrained network with the sizes of its whole state dict, and with `metadata`."""
        parts: dict[str, Any] = {}
        for name, kind in (("local", LocalOccupancyNetwork), ("prior", OccupancyNetwork)):
            inner = {
                key.removeprefix(f"{name}."): each for key, each in state.items() if key.startswith(name)
            }
            given = json.loads(metadata[name])
            parts[name] = kind.of_weights(inner, given)
            parts[name].up_axis = given.get("up")
        return cls(**parts)

    def networks(self) -> dict[str, dict[str, str]]:
        """Names and digests of the weights of both networks."""
        return {
            "local": {"source": str(self.local.source), "weights": digest_of_weights(self.local)},
            "prior": {"source": str(self.prior.source), "weights": digest_of_weights(self.prior)},
        }

    def share(self, network: ImplicitNetwork) -> Self:
        """Uses ``network`` as the local one if the weights are equal, to reuse codes of its fields."""
        weights = digest_of_weights(self.local)
        if isinstance(network, LocalOccupancyNetwork) and digest_of_weights(network) == weights:
            self.local = network
        return self

    def features(self, cloud: Tensor, field: Field | None = None, row: int = 0) -> tuple[Neighbours, Tensor]:
        """Inputs of the head.

        Args:
            cloud: ``(N, 3)``, unit-cube frame.
            field: a field of the cloud. If it is one of the local network, the cloud is not encoded again.
            row: index of the cloud in the field.

        Returns:
            A neighbour search in the encoded points ``(M, 3)``, a subset if the local network limits their
            number, and their inputs ``(M, C)``: affine maps of the local network; logit of the prior above
            its level, also in robust standard deviations of the cloud; logarithms of distances of neighbours
            over the cloud's median; and the means of all of them over `CONTEXT`.
        """
        if not isinstance(field, LocalField) or field.decoder is not self.local.decoder:
            field, row = self.local.field(self.local.encode([cloud])), 0
        neighbours, maps = field.neighbours[row], field.codes[row].maps[0].detach()
        points = neighbours.source
        if self.head.mean.device != points.device:  # a shared network is moved with its purifier
            self.to(points.device)
        prior = field_of(self.prior, [cloud])
        inside = prior(points, torch.zeros(len(points), dtype=torch.long, device=points.device))
        inside = inside - self.prior.calibration.level
        centred = inside - inside.median()
        spread = 1.4826 * centred.abs().median() + 0.05
        k = min(NEIGHBOURS[-1] + 1, len(points))
        near = neighbours.own(k)
        columns = near[:, [min(number, k - 1) for number in NEIGHBOURS]]
        apart = in_float64(points[columns]) - in_float64(points[:, None])
        distance = apart.norm(dim=-1).to(points)
        typical = distance[:, 1].median().clamp(min=1e-6)
        support = (distance / typical + 0.02).log()
        values = torch.cat([maps, inside[:, None], (centred / spread)[:, None], support], 1)
        around = F.embedding_bag(near[:, :CONTEXT].contiguous(), values, mode="mean")
        return neighbours, torch.cat([values, around], 1)

    @torch.no_grad()
    def forward(self, cloud: Tensor, field: Field | None = None, row: int = 0) -> tuple[Neighbours, Tensor]:
        """A search in the encoded points ``(M, 3)``, and the logits ``(M,)`` of being anomalous.

        Arguments as `features`.
        """
        neighbours, inputs = self.features(cloud, field, row)
        return neighbours, self.head(inputs)
