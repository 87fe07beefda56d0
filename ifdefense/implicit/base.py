"""Interface of implicit networks: encoding, field and calibration."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ifdefense.geometry.axes import UP, trained_axis, turned
from ifdefense.guard import loading
from ifdefense.threads import parallel_map

Field = Callable[[Tensor, Tensor], Tensor]
"""``(points (M, 3), cloud (M,)) → logits (M,)``: occupancy at query points of several clouds, unit cube.

``cloud`` holds the ascending int64 index of each point's cloud. Points whose logit exceeds the level are
inside.
"""

NETWORKS = {
    "convolutional": "ifdefense.implicit.convolutional:ConvolutionalNetwork",
    "generative": "ifdefense.reconstruction.generative:GenerativeOccupancyNetwork",
    "image": "ifdefense.reconstruction.conditions:ImageNetwork",
    "local": "ifdefense.implicit.local:LocalOccupancyNetwork",
    "occupancy": "ifdefense.implicit.occupancy:OccupancyNetwork",
    "voxel": "ifdefense.reconstruction.conditions:VoxelNetwork",
}
"""Classes of networks by the name in the metadata of their weights."""

SIGNS = {
    "encoder.unet.": "convolutional",
    "encoder_latent.": "generative",
    "encoder.features.": "image",
    "encoder.conv_in.": "voxel",
}
"""Prefixes of tensor names that identify public checkpoints; ``occupancy`` if none matches."""

NAMES = dict.fromkeys(NETWORKS, ("decoder.fc_p.weight", "decoder.fc_out.weight"))
NAMES["local"] = ("decoder.attend.weight", "decoder.out.weight")
"""Tensors that a network has regardless of its sizes."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Interpretation of a trained network's field; lengths in the unit cube.

    Stored in the metadata of the weights by training. The defaults are those of the published Occupancy
    Networks (https://arxiv.org/abs/1812.03828).

    Attributes:
        box: side of the cube of the training queries.
        threshold: occupancy probability at the surface, in (0, 1).
        second_threshold: used if ``threshold`` yields no surface; ``None`` to disable it.
        offset: thickening of the learned solid; samples of the surface are moved inwards by it along their
            normals.
        points: number of input points in training, ``None`` for any number.

    Raises:
        ValueError: if a number is out of range.

    Examples:
        >>> Calibration(threshold=0.5).level
        0.0
    """

    box: float = 1.1
    threshold: float = 0.2
    second_threshold: float | None = None
    offset: float = 0.0
    points: int | None = 300

    def __post_init__(self) -> None:
        for name in ("threshold", "second_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} is a probability in (0, 1), got {value}")
        if not 0.5 <= self.box <= 4:
            raise ValueError(f"box must be a cube around the unit cube, of side 0.5 to 4, got {self.box}")
        if not abs(self.offset) < self.box / 2:
            raise ValueError(f"offset must be less than half of the box, got {self.offset}")
        if self.points is not None and self.points < 1:
            raise ValueError(f"points must be at least 1, got {self.points}")

    @property
    def level(self) -> float:
        """The logit of ``threshold``."""
        return math.log(self.threshold / (1 - self.threshold))

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, str]) -> Self:
        """Reads the entry ``"calibration"`` of metadata; the defaults if it is missing.

        Raises:
            ValueError: if the entry is damaged or out of range.
        """
        if "calibration" not in metadata:
            return cls()
        try:
            return cls(**json.loads(metadata["calibration"]))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"the calibration of the weights cannot be read: {error}") from None

    def metadata(self) -> dict[str, str]:
        """The entry that `of_metadata` reads."""
        return {"calibration": json.dumps(dataclasses.asdict(self))}


class ImplicitNetwork(Protocol):
    """An implicit function conditioned on point clouds.

    To add one, write a class with these members and register it in `NETWORKS`. The parameters of a
    `torch.nn.Module` become parameters of the purifier. The attribute ``up_axis`` is the up axis of the
    expected clouds, if it is not z; see `field_of`.

    Examples:
        >>> class Ball:  # of radius 0.4, whatever the cloud
        ...     calibration = Calibration(threshold=0.5)
        ...     encode = lambda self, clouds, seed=0: None
        ...     field = lambda self, code: lambda points, cloud: 0.16 - (points**2).sum(1)
        >>> field = field_of(Ball(), [points[0]])
    """

    @property
    def calibration(self) -> Calibration:
        """Calibration of the field."""
        ...

    def encode(self, clouds: Sequence[Tensor], seed: int = 0) -> Any:
        """Encodes clouds ``(N_i, 3)`` in the unit cube; the type of the codes depends on the network.

        The code of a cloud must not depend on the other clouds. ``seed`` seeds all randomness.
        """
        ...

    def field(self, code: Any) -> Field:
        """The fields of encoded clouds."""
        ...


def metadata_of(network: Any) -> dict[str, str]:
    """What ``of_weights`` of a network needs beside its tensors: calibration, settings and up axis."""
    settings: dict[str, Any] = getattr(network, "settings", dict)()
    up = trained_axis(network)
    return {
        **network.calibration.metadata(),
        "config": json.dumps(settings),
        **({} if up is None else {"up": up}),
    }


def field_of(network: ImplicitNetwork, clouds: Sequence[Tensor], seed: int = 0) -> Field:
    """Fields of clouds in the library's frame, by a network that may have another up axis.

    Args:
        network: the network; clouds and queries are rotated to its ``up_axis``.
        clouds: ``(N_i, 3)`` in the unit cube, z up.
        seed: seed of `ImplicitNetwork.encode`.

    Examples:
        >>> field = field_of(load_network("onet"), [points[0]])
        >>> field(torch.zeros(5, 3), torch.zeros(5, dtype=torch.long)).shape
        torch.Size([5])
    """
    up = trained_axis(network) or UP
    field = network.field(network.encode([turned(cloud, UP, up) for cloud in clouds], seed))
    return field if up == UP else lambda points, cloud: field(turned(points, UP, up), cloud)


def random_subset(cloud: Tensor, most: int | None, seed: int) -> Tensor:
    """Random subset of at most ``most`` points of a cloud ``(N, 3)``; all for ``None``.

    Examples:
        >>> random_subset(points[0], 16, seed=0).shape
        torch.Size([16, 3])
    """
    if most is None or len(cloud) <= most:
        return cloud
    order = torch.randperm(len(cloud), generator=torch.Generator().manual_seed(seed))
    return cloud[order[:most].to(cloud.device)]


def evaluated(
    fields: Sequence[Callable[[Tensor], Tensor]], points: Tensor, cloud: Tensor, chunk: int
) -> Tensor:
    """Logits ``(M,)`` of queries of several clouds, in chunks distributed over threads.

    Args:
        fields: one per cloud, ``(Q, 3)`` queries to ``(Q,)`` logits.
        points: ``(M, 3)`` queries.
        cloud: ``(M,)`` int64 index of each query's cloud, ascending.
        chunk: queries per call of a field.
    """
    one = len(fields) == 1
    counts = [len(points)] if one else torch.bincount(cloud, minlength=len(fields)).tolist()
    parts = []
    for field, part in zip(fields, points.split(counts), strict=True):
        if len(part):
            parts += parallel_map(field, even_parts(part, chunk))
    return torch.cat(parts) if parts else points.new_zeros(0)


def even_parts(points: Tensor, chunk: int) -> tuple[Tensor, ...]:
    """Splits ``(M, 3)`` queries into as few parts of at most ``chunk`` as possible, of similar size."""
    parts = -(-len(points) // chunk)
    return torch.split(points, -(-len(points) // parts))


def weights_path(name_or_path: str | Path) -> Path:
    """Path of a file of weights, given by the name of shipped ones or by its path.

    Raises:
        ValueError: if no weights of that name are shipped.
    """
    from ifdefense.checkpoints import shipped

    path = Path(name_or_path)
    if path.suffix or path.is_file():
        return path
    return shipped("ifdefense", str(name_or_path))


@loading
def load_network(name_or_path: str | Path) -> ImplicitNetwork:
    """Loads an implicit network and its calibration, in evaluation mode and with frozen parameters.

    Args:
        name_or_path: name of shipped weights, a ``.safetensors`` file of ``ifdefense train``, or a public
            ``.pth`` checkpoint of an Occupancy Network of any kind in `SIGNS`.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file cannot be read or does not fit.
        ValueError: if the name or the type of network is unknown.

    Examples:
        >>> load_network("local").calibration.offset
        0.015
    """
    from ifdefense.checkpoints import (
        CheckpointError,
        load_into,
        load_metadata,
        load_state,
        stated_axis,
        unlike,
    )

    path = weights_path(name_or_path)
    metadata = load_metadata(path)
    names = NAMES.get(metadata.get("network", "occupancy"), ())
    state = load_state(path, names)
    signs = (kind for sign, kind in SIGNS.items() if any(name.startswith(sign) for name in state))
    kind = metadata.get("network", next(signs, "occupancy"))
    if kind not in NETWORKS:
        raise ValueError(f"{path}: unknown network {kind!r}; there are {', '.join(NETWORKS)}")
    module, _, cls = NETWORKS[kind].partition(":")
    if missing := [name for name in names if name not in state]:
        raise CheckpointError(
            f"{path} is not a network of the kind {kind!r}: tensor {missing[0]} is missing; "
            + unlike(state, names)
        )
    network = getattr(importlib.import_module(module), cls).of_weights(state, metadata)
    load_into(network, state, path)
    network.source = str(name_or_path)
    network.up_axis = stated_axis(path)
    loaded: ImplicitNetwork = network
    return loaded
