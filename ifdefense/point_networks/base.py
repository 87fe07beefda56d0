"""Base class of networks that map clouds to clouds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from torch import Tensor, nn

from ifdefense.checkpoints import load_into, load_state, shipped, stated_axis
from ifdefense.guard import loading


class PointNetwork(nn.Module, ABC):
    """Maps clouds to clouds, in the unit sphere: mean-centred, largest norm 1.

    Attributes:
        source: name or file of the weights, ``None`` if they were not loaded.
        up_axis: up axis of the expected clouds, from the metadata of the weights; ``None`` if unknown.
        points: maximum number of points; larger clouds must be subsampled. ``None`` for no limit.

    Shapes: ``(B, N, 3)`` to ``(B, M, 3)``.
    """

    source: str | None = None
    up_axis: str | None = None
    points: int | None = None

    @abstractmethod
    def forward(self, points: Tensor) -> Tensor:
        """Maps clouds of equal size; differentiable."""

    def mapped(self, clouds: Sequence[Tensor]) -> list[Tensor]:
        """Maps clouds ``(N_i, 3)`` to ``(M_i, 3)``, one by one, as rounding varies with the batch."""
        return [self(cloud[None])[0] for cloud in clouds]

    @classmethod
    @abstractmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Builds an untrained network with the sizes of a state dict, which may be incomplete or empty."""

    def metadata(self) -> dict[str, str]:
        """What `of_weights` needs beside the tensors."""
        return {} if self.up_axis is None else {"up": self.up_axis}

    @classmethod
    def of_weights(cls, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Self:
        """As `of_state`, with the signature of implicit networks."""
        return cls.of_state(state)

    @classmethod
    @loading
    def load(cls, name_or_path: str | Path) -> Self:
        """Loads weights, in evaluation mode and with frozen parameters.

        Args:
            name_or_path: name of shipped weights, a ``.safetensors`` file, or a public checkpoint.

        Raises:
            FileNotFoundError: if there is no such file.
            ifdefense.checkpoints.CheckpointError: if the file cannot be read or does not fit.
            ValueError: if the name is unknown.
        """
        path = Path(name_or_path)
        if not path.suffix and not path.is_file():
            path = shipped("ifdefense", str(name_or_path))
        state = load_state(path, cls.of_state({}).state_dict())
        network = cls.of_state(state)
        load_into(network, state, path)
        network.source = str(name_or_path)
        network.up_axis = stated_axis(path)
        return network
