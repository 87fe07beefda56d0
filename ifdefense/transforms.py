"""Transforms for data sets of PyTorch Geometric; see docs/pyg.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ifdefense.arguments import count_of, integer, named_device, seed_of
from ifdefense.geometry.axes import axis_of
from ifdefense.geometry.points import knn
from ifdefense.provenance import digest
from ifdefense.purifiers.base import Purifier
from ifdefense.purifiers.function import purify
from ifdefense.purifiers.registry import DEFAULT, known

try:
    from torch_geometric.transforms import BaseTransform
except ImportError as error:
    raise ImportError(
        "ifdefense.transforms needs PyTorch Geometric: pip install torch-geometric", name="torch_geometric"
    ) from error


class Purify(BaseTransform):  # type: ignore[misc]
    """Purifies the positions of ``Data``; for other attributes see `ifdefense.structures.pyg`.

    As ``pre_transform`` of a data set it runs once and the result is stored; as ``transform`` it runs at
    every access. For meshes, place it after ``SamplePoints``; place transforms that compute graphs or
    features of positions after it::

        T.Compose([T.SamplePoints(1024), Purify("onet-mesh"), T.NormalizeScale()])

    Args:
        method: name of a method, file of weights, or a purifier, as in `ifdefense.purify`.
        num_points: points per result; by default as in the input.
        seed: random seed; ``None`` draws a new one at each call.
        device: device to compute on, by default that of the positions. It is not used before the first call,
            so that workers of a ``DataLoader`` can be forked.
        up: up axis of the positions, z by default, as in `ifdefense.purify`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if there is neither a method nor a file of that name, or an argument is out of range.

    Examples:
        >>> from torch_geometric.data import Data
        >>> Purify("sor", num_points=48)(Data(pos=points[0]))
        Data(pos=[48, 3])
    """

    def __init__(
        self,
        method: str | Path | Purifier = DEFAULT,
        num_points: int | None = None,
        seed: int | None = 0,
        device: str | torch.device | None = None,
        up: str | None = None,
    ) -> None:
        if not isinstance(method, (str, Path, Purifier)):
            raise TypeError(f"method must be a name, a path or a purifier, got {type(method).__name__}")
        if not isinstance(method, Purifier):
            known(method)
        self.method = method
        self.num_points = count_of(num_points)
        self.seed = None if seed is None else seed_of(seed)
        self.device = None if device is None else named_device(device)
        self.up = None if up is None else axis_of(up)

    def forward(self, data: Any) -> Any:
        """Returns a purified copy of a ``Data`` or a ``Batch``, or of another input of `ifdefense.purify`."""
        return purify(data, self.method, self.num_points, self.seed, self.device, up=self.up)

    def __repr__(self) -> str:
        # Data sets compare this text to detect outdated stored results.
        method = self.method
        shown = f"{method.name}-{digest(method.spec())}" if isinstance(method, Purifier) else str(method)
        axis = "" if self.up is None else f", up={self.up!r}"
        return f"Purify({shown!r}, num_points={self.num_points}, seed={self.seed}{axis})"


class KNNGraph(BaseTransform):  # type: ignore[misc]
    """Connects each point to its nearest points; replaces PyG's transform where pyg-lib is not installed.

    Sets ``edge_index`` ``(2, E)``, edges from neighbours to points, as ``T.KNNGraph`` by default. In clouds
    of at most ``k`` points, each point is connected to all others.

    Args:
        k: neighbours of each point.
        loop: whether each point is a neighbour of itself; it then counts as one of the ``k``.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if ``k`` is not positive.

    Examples:
        >>> from torch_geometric.data import Data
        >>> KNNGraph(k=4)(Data(pos=points[0]))
        Data(pos=[64, 3], edge_index=[2, 256])
    """

    def __init__(self, k: int = 6, loop: bool = False) -> None:
        self.k = integer("k", k, 1)
        self.loop = bool(loop)

    def forward(self, data: Any) -> Any:
        """Sets the edges of a ``Data``, or of each cloud of a ``Batch``."""
        positions, batch = data.pos.detach(), data.batch if "batch" in data else None
        sizes = [len(positions)] if batch is None else torch.bincount(batch).tolist()
        edges, start = [], 0
        for cloud in positions.split(sizes):
            if len(cloud):
                edges.append(self._edges(cloud) + start)
            start += len(cloud)
        data.edge_index = torch.cat(edges, 1) if edges else positions.new_zeros((2, 0), dtype=torch.long)
        data.edge_attr = None
        return data

    def _edges(self, cloud: Tensor) -> Tensor:
        """Edges ``(2, E)`` of one cloud, ordered by target and distance."""
        count = min(self.k + (not self.loop), len(cloud))
        source = knn(cloud[None], cloud[None], count)[1][0]
        target = torch.arange(len(cloud), device=cloud.device)[:, None].expand_as(source)
        if self.loop:
            return torch.stack([source, target]).flatten(1)
        # Of equal points, each may have another one as its first neighbour.
        others = source != target
        others[others.all(1), -1] = False
        return torch.stack([source[others], target[others]])

    def __repr__(self) -> str:
        return f"KNNGraph(k={self.k}, loop={self.loop})"
