"""Converts user input (a cloud, a batch or a list; NumPy or torch) to checked tensors, and results back."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ifdefense.arguments import MIN_POINTS, cloud_of, real_tensor
from ifdefense.attributes import transfer_attributes
from ifdefense.devices import in_float64
from ifdefense.structures.registry import Build, Rows, Sampling, adapter_of

__all__ = ["MIN_POINTS", "Clouds", "Unpacked", "tensors", "unpack"]

Clouds = Any
"""``(N, 3 + C)``, ``(B, N, 3 + C)``, or a list of ``(N_i, 3 + C)``: NumPy arrays, tensors or nested lists of
numbers; the first three columns are coordinates. Also structures of the libraries in
`ifdefense.structures.registry.LIBRARIES`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Unpacked:
    """Clouds as a list of tensors, with the conversion back to the caller's type.

    Attributes:
        clouds: ``(N_i, 3)`` float tensors in the caller's precision, on the caller's device.
        build: converts results and rows to the caller's type, see `pack`.
    """

    clouds: list[Tensor]
    build: Build

    @classmethod
    def of(cls, members: Sequence[Unpacked]) -> Unpacked:
        """Joins several; their results are packed as a list."""
        starts = np.cumsum([0, *(len(member.clouds) for member in members)]).tolist()

        def build(results: Sequence[Tensor], rows: Rows) -> list[Any]:
            return [
                member.build(results[start:end], _shifted(rows, start))
                for member, start, end in zip(members, starts[:-1], starts[1:], strict=True)
            ]

        return cls([cloud for member in members for cloud in member.clouds], build)

    def on(self, device: torch.device) -> Unpacked:
        """Moves the clouds to a device; results are packed on the original device."""

        def build(results: Sequence[Tensor], rows: Rows) -> Any:
            back = [each.to(cloud.device) for each, cloud in zip(results, self.clouds, strict=True)]
            return self.build(back, rows)

        return Unpacked([cloud.to(device) for cloud in self.clouds], build)

    def pack(self, results: Sequence[Tensor], index: Sequence[Tensor | None] | None = None) -> Any:
        """Converts results to the type of the input, with its attributes.

        Args:
            results: ``(M_i, 3)``, one for each cloud, in the caller's frame.
            index: ``(M_i,)`` rows of the input, if a result is a selection of its points; otherwise
                attributes are taken from the nearest input points.
        """

        def rows(i: int) -> Tensor:
            known = None if index is None else index[i]
            return _nearest_rows(self.clouds[i], results[i]) if known is None else known

        return self.build(results, rows)


def unpack(points: Clouds | Unpacked, num_points: int | None = None, seed: int = 0) -> Unpacked:
    """Checks clouds and converts them to a list of tensors.

    Args:
        points: clouds in the caller's frame; `Unpacked` is returned unchanged.
        num_points: number of points requested as the result; only used to sample meshes.
        seed: random seed, likewise.

    Raises:
        TypeError: if a cloud is neither a NumPy array nor a tensor, or its numbers are not real.
        ValueError: for a wrong shape, an empty list, NaN or infinity, zero extent, or fewer than
            :data:`MIN_POINTS` distinct points, naming the cloud.
    """
    if isinstance(points, Unpacked):
        return points

    def sampling() -> Sampling:
        return Sampling(num_points, seed)

    if (adapter := adapter_of(points)) is not None:
        return Unpacked(*adapter.unpack(points, None, sampling))
    if isinstance(points, (Tensor, np.ndarray)) or _is_numbers(points):
        return _unpack_array(points)
    if not isinstance(points, (list, tuple)):
        raise _wrong_type(points)
    if not points:
        raise ValueError("there are no clouds: the list or batch is empty")
    return Unpacked.of([_member(part, f"cloud {i}", sampling) for i, part in enumerate(points)])


def tensors(points: Clouds) -> Any:
    """Converts arrays and lists of them to tensors without checks; structures are returned unchanged."""
    if isinstance(points, Tensor) or adapter_of(points) is not None:
        return points
    if isinstance(points, np.ndarray) or _is_numbers(points):
        return real_tensor(points, "the cloud")
    if isinstance(points, (list, tuple)):
        return [
            part if adapter_of(part) is not None else real_tensor(part, f"cloud {i}")
            for i, part in enumerate(points)
        ]
    raise _wrong_type(points)


def _wrong_type(value: object) -> TypeError:
    """The error for something that is no cloud, with a hint for paths."""
    hint = "; ifdefense.data.read_cloud reads a file" if isinstance(value, (str, os.PathLike)) else ""
    return TypeError(f"expected NumPy arrays or tensors, got {type(value).__name__}{hint}")


def _is_numbers(value: object) -> bool:
    """Whether a list is one cloud, a list of rows of numbers, rather than a list of clouds."""
    if not isinstance(value, (list, tuple)) or not value or not isinstance(value[0], (list, tuple)):
        return False
    return not value[0] or not isinstance(value[0][0], (list, tuple, Tensor, np.ndarray))


def _unpack_array(points: Any) -> Unpacked:
    """One cloud, or a batch as one array."""
    shape = np.shape(points) if isinstance(points, np.ndarray) else getattr(points, "shape", None)
    if shape is not None and (len(shape) not in (2, 3) or shape[-1] < 3):
        raise ValueError(
            f"expected a cloud (N, 3), a batch (B, N, 3) or a list of clouds, got an array of shape "
            f"{tuple(shape)}"
        )
    single = shape is None or len(shape) == 2
    whole = real_tensor(points, "the cloud" if single else "the batch")
    parts = [whole] if single else list(whole)
    if not parts:
        raise ValueError("there are no clouds: the list or batch is empty")
    names = ["the cloud"] if single else [f"cloud {i}" for i in range(len(parts))]
    full = [cloud_of(part, name) for part, name in zip(parts, names, strict=True)]

    def build(results: Sequence[Tensor], rows: Rows) -> Any:
        done = [_with_columns(*each, i, rows) for i, each in enumerate(zip(full, results, strict=True))]
        return _as_kind(done[0] if single else torch.stack(done), points)

    return Unpacked([cloud[:, :3] for cloud in full], build)


def _shifted(rows: Rows, start: int) -> Rows:
    return lambda i: rows(start + i)


def _member(part: Any, name: str, sampling: Callable[[], Sampling]) -> Unpacked:
    """One item of a list: a cloud of any type, or a structure."""
    if (adapter := adapter_of(part)) is not None:
        return Unpacked(*adapter.unpack(part, name, sampling))
    full = cloud_of(part, name)
    return Unpacked(
        [full[:, :3]], lambda results, rows: _as_kind(_with_columns(full, results[0], 0, rows), part)
    )


def _with_columns(full: Tensor, result: Tensor, i: int, rows: Rows) -> Tensor:
    """Appends attribute columns to a result ``(M, 3)``; they pass gradients if its points do."""
    if full.shape[1] == 3:
        return result
    columns = full[rows(i).to(full.device), 3:].to(result)
    return torch.cat([result, columns if result.requires_grad else columns.detach()], 1)


def _as_kind(result: Tensor, like: Any) -> Any:
    """Converts a tensor to the type of the input; integers become floating-point numbers."""
    if isinstance(like, Tensor):
        return result
    array = result.detach().cpu().numpy()
    if not isinstance(like, np.ndarray):
        return array.tolist()
    return array.astype(like.dtype, copy=False) if like.dtype.kind == "f" else array


def _nearest_rows(cloud: Tensor, result: Tensor) -> Tensor:
    # In units of the extent, so that squares of distances neither overflow nor vanish.
    wide = in_float64(cloud.detach())
    low = wide.amin(0)
    extent = (wide.amax(0) - low).max()
    places = (in_float64(result.detach()).to(low.device) - low) / extent
    index = torch.arange(len(cloud), device=cloud.device)
    return transfer_attributes((wide - low) / extent, {"index": index}, places)["index"]
