"""What the pipeline knows of an implicit function: how a cloud is encoded, its field, and its calibration."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]
"""``(points (M, 3), cloud (M,)) → logits (M,)``: occupancy at points of several clouds, unit cube.

``cloud`` is int64 and ascending and names the cloud of each point. A point is inside where its logit exceeds
the level.
"""

NETWORKS = {
    "local": "ifdefense.implicit.local:LocalOccupancyNetwork",
    "occupancy": "ifdefense.implicit.occupancy:OccupancyNetwork",
}
"""Classes of implicit networks by the name that their weights carry."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How the field of a trained network is to be read; lengths in the unit cube.

    Written into the metadata of the weights by training. The defaults are those of the published Occupancy
    Networks (https://arxiv.org/abs/1812.03828).

    Attributes:
        box: side of the cube in which the network was trained to answer.
        threshold: probability of occupancy at the surface, in (0, 1).
        second_threshold: tried where ``threshold`` shows no surface; ``None`` for no second try.
        offset: thickening of the solid that the network learned; samples of the surface are moved back by it
            along their normals.
        points: input points that the network was trained on, ``None`` for any number.

    Raises:
        ValueError: if a number is out of range.
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
        """Reads the entry ``"calibration"`` of a file of weights; published values where there is none.

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

    A new one is a module that has these members and a line in `NETWORKS`. It may be a `torch.nn.Module`,
    whose parameters then belong to the purifier.
    """

    @property
    def calibration(self) -> Calibration:
        """How its field is to be read."""
        ...

    def encode(self, clouds: Sequence[Tensor], seed: int = 0) -> Any:
        """Codes of clouds ``(N_i, 3)`` in the unit cube, in whatever form `field` takes them.

        The code of a cloud must not depend on the other clouds. ``seed`` is that of every random choice.
        """
        ...

    def field(self, code: Any) -> Field:
        """The field of all clouds in a code."""
        ...


def load_network(name_or_path: str | Path) -> ImplicitNetwork:
    """Loads an implicit network with its calibration.

    Args:
        name_or_path: name of weights that travel with the package, or a file: ``.safetensors`` as training
            writes it, or a public ``.pth`` checkpoint of an Occupancy Network.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it cannot be read or does not fit.
        ValueError: for an unknown name or kind of network.
    """
    from ifdefense.checkpoints import load_into, load_metadata, load_state, shipped

    path = Path(name_or_path)
    if not path.suffix and not path.exists():
        path = shipped("ifdefense", str(name_or_path))
    metadata = load_metadata(path)
    kind = metadata.get("network", "occupancy")
    if kind not in NETWORKS:
        raise ValueError(f"{path}: unknown network {kind!r}; there are {', '.join(NETWORKS)}")
    module, _, cls = NETWORKS[kind].partition(":")
    state = load_state(path)
    network = getattr(importlib.import_module(module), cls).of_weights(state, metadata)
    load_into(network, state, path)
    network.source = str(name_or_path)
    loaded: ImplicitNetwork = network.eval()
    return loaded
