"""Support for ``Data`` and ``Batch`` of PyTorch Geometric in `ifdefense.purify`.

Positions are purified per cloud. Kept points keep their other node attributes, such as ``x`` and ``normal``;
new ones take those of the nearest input point. Attributes of clouds, such as ``y``, are unchanged. As ``x``
is not purified, compute features of positions after the purification.

Edges and faces refer to points by index, which purification invalidates, so they raise an error. Purify
before building graphs, and sample the surface of meshes first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ifdefense.arguments import cloud_of
from ifdefense.structures.registry import Build, Rows, Sampling, names_of

BOOKKEEPING = {"pos", "batch", "ptr", "num_nodes"}
"""Attributes that follow from the positions."""

ADJACENCY = {"adj", "adj_t", "face"}
"""Attributes that connect points, besides those with "edge" in their name."""


def unpack(value: Any, name: str | None, sampling: Callable[[], Sampling]) -> tuple[list[Tensor], Build]:
    """Splits a ``Data`` or ``Batch`` into clouds, see `ifdefense.structures.registry.Adapter`.

    Args:
        value: with positions ``pos`` ``(N, 3)``; the vector ``batch`` assigns points to clouds.
        name: name of the data, for error messages.
        sampling: not used, as meshes are an error.

    Raises:
        TypeError: if it is not a ``Data``, such as ``HeteroData``, or has no tensor of positions.
        ValueError: if there are edges or faces, ``batch`` is invalid, or a cloud cannot be purified.
    """
    from torch_geometric.data import Data

    if not isinstance(value, Data):
        raise TypeError(f"{name or 'the data'} is a {type(value).__name__}: expected Data or Batch")
    positions = value.pos
    if not isinstance(positions, Tensor):
        raise TypeError(f"{name or 'the data'} has no positions: expected a tensor in data.pos")
    if positions.ndim != 2 or positions.shape[1] != 3:
        raise ValueError(f"{name or 'the data'}: pos must have shape (N, 3), got {tuple(positions.shape)}")
    _check_no_graph(value, name or "the data")
    sizes = _sizes(value, len(positions))
    names = names_of(None if sizes is None else len(sizes), name)
    parts = positions.split([len(positions)] if sizes is None else sizes)
    clouds = [cloud_of(part, called) for part, called in zip(parts, names, strict=True)]

    def build(results: Sequence[Tensor], rows: Rows) -> Any:
        return _rebuilt(value, [len(cloud) for cloud in clouds], results, rows)

    return clouds, build


def inputs(value: Any, prepared: Callable[[Tensor], Tensor]) -> Any:
    """A copy with other positions, on their device."""
    sizes = _sizes(value, len(value.pos))
    result = copy.copy(value)
    parts = value.pos.split([len(value.pos)] if sizes is None else sizes)
    result.pos = torch.cat([prepared(part) for part in parts])
    return result.to(result.pos.device)


def _check_no_graph(data: Any, name: str) -> None:
    graph = [
        key
        for key in data.keys()  # noqa: SIM118 - not a dictionary
        if data[key] is not None
        and (key in ADJACENCY or "edge" in key or ("index" in key and data.is_node_attr(key)))
    ]
    if graph:
        hint = "sample its surface first" if graph == ["face"] else "purify before the graph is built"
        raise ValueError(f"{name} has {', '.join(graph)}, which refer to points by index: {hint}")


def _sizes(data: Any, total: int) -> list[int] | None:
    """Number of points per cloud; ``None`` for a single cloud."""
    batch = data.batch if "batch" in data else None
    if batch is None:
        return None
    if batch.ndim != 1 or len(batch) != total:
        raise ValueError(f"batch must have shape ({total},), one number per point, got {tuple(batch.shape)}")
    if not total:
        raise ValueError("there are no clouds: the batch is empty")
    if batch.is_floating_point() or bool((batch.diff() < 0).any()) or int(batch[0]) < 0:
        raise ValueError("batch must be ascending numbers of clouds, from 0")
    sizes: list[int] = torch.bincount(batch, minlength=int(getattr(data, "num_graphs", 0))).tolist()
    return sizes


def _rebuilt(data: Any, sizes: Sequence[int], results: Sequence[Tensor], rows: Rows) -> Any:
    """A copy of the data with other points."""
    out = copy.copy(data)
    device = data.pos.device
    counts = [len(result) for result in results]
    ptr = torch.tensor([0, *np.cumsum(counts).tolist()])
    nodes = [key for key in data.keys() if key not in BOOKKEEPING and data.is_node_attr(key)]  # noqa: SIM118
    if nodes:
        starts = np.cumsum([0, *sizes]).tolist()
        index = torch.cat([rows(i).to(device) + start for i, start in enumerate(starts[:-1])])
        for key in nodes:
            out[key] = _selected(data[key], index, data.__cat_dim__(key, data[key]))
    out.pos = torch.cat(list(results)).to(device)
    if "num_nodes" in data:
        out.num_nodes = len(out.pos)
        if hasattr(out._store, "_num_nodes"):  # of each cloud, for `Batch.to_data_list`
            out._store._num_nodes = counts
    if "batch" in data and data.batch is not None:
        out.batch = torch.arange(len(counts)).repeat_interleave(ptr.diff()).to(data.batch)
    starts_of = {"ptr", *(f"{key}_ptr" for key in ["pos", *nodes])}
    for key in starts_of:
        if key in data and data[key] is not None:
            out[key] = ptr.to(data[key])
    _rewrite_slices(out, data, {"pos", *nodes}, ptr)
    return out


def _selected(values: Any, index: Tensor, dim: int) -> Any:
    """Selects rows of a node attribute: a tensor, an array, or a list."""
    if isinstance(values, Tensor):
        return values.index_select(dim, index.to(values.device))
    if isinstance(values, np.ndarray):
        return np.take(values, index.cpu().numpy(), axis=dim)
    return [values[i] for i in index.tolist()]


def _rewrite_slices(out: Any, data: Any, nodes: set[str], ptr: Tensor) -> None:
    """Updates the slices of `Batch.to_data_list`."""
    slices = getattr(data, "_slice_dict", None)
    if slices is None:
        return
    slices = dict(slices)
    for key in nodes & slices.keys():
        slices[key] = ptr.to(slices[key])
    out._slice_dict = slices
