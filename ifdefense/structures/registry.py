"""Registry of the libraries whose structures hold clouds; they are recognised without an import."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from torch import Tensor

from ifdefense.arguments import MAX_SEED, count_of, integer

Rows = Callable[[int], Tensor]
"""For the i-th cloud, the input rows ``(M,)`` from which the result's points were taken or to which they are
nearest."""

Build = Callable[[Sequence[Tensor], Rows], Any]
"""Converts results ``(M_i, 3)`` and their rows to the caller's structure."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How meshes become clouds: uniformly by area, each mesh with the same seed.

    Args:
        num_points: number of points requested as the result; at least `LEAST` are sampled.
        seed: random seed.

    Raises:
        TypeError: if a value is not an integer.
        ValueError: if a value is out of range.
    """

    LEAST = 1024

    num_points: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        count_of(self.num_points)
        integer("seed", self.seed, 0, MAX_SEED)

    @property
    def count(self) -> int:
        """Points sampled from each mesh."""
        return max(self.num_points or 0, self.LEAST)


class Adapter(Protocol):
    """A module that supports the structures of one library.

    To add one, write a module with these functions and register it in `LIBRARIES`.
    """

    def unpack(
        self, value: Any, name: str | None, sampling: Callable[[], Sampling]
    ) -> tuple[list[Tensor], Build]:
        """Splits a structure into clouds.

        Args:
            value: the structure; not modified.
            name: its name, for error messages.
            sampling: options for meshes; called for them only.

        Returns:
            Checked clouds ``(N_i, 3)``, and a function that converts results to a structure with the
            attributes of the input.

        Raises:
            TypeError: if the structure is not supported.
            ValueError: if a cloud cannot be purified, naming it.
        """
        ...

    def inputs(self, value: Any, prepared: Callable[[Tensor], Tensor]) -> Any:
        """What a classifier is called with: a structure, a tensor, or a list of tensors.

        Args:
            value: the structure; not modified.
            prepared: rotates, normalises and moves positions ``(N, 3)`` or ``(B, N, 3)``.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Library:
    """A library with structures.

    Attributes:
        module: module that holds the classes.
        classes: their names.
        adapter: our module with the functions of `Adapter`.
    """

    module: str
    classes: tuple[str, ...]
    adapter: str


LIBRARIES = {
    "PyTorch Geometric": Library("torch_geometric.data.data", ("BaseData",), "ifdefense.structures.pyg"),
    "PyTorch3D": Library("pytorch3d.structures", ("Pointclouds", "Meshes"), "ifdefense.structures.pytorch3d"),
    "trimesh": Library("trimesh", ("PointCloud", "Trimesh", "Scene"), "ifdefense.structures.trimesh"),
}
"""Supported libraries by name."""


def adapter_of(value: object) -> Adapter | None:
    """Adapter of a structure; ``None`` if it is none. Libraries are not imported.

    Examples:
        >>> import trimesh
        >>> adapter_of(trimesh.PointCloud(points[0])).__name__
        'ifdefense.structures.trimesh'
    """
    for library in LIBRARIES.values():
        module = sys.modules.get(library.module)
        classes = tuple(found for name in library.classes if (found := getattr(module, name, None)))
        if isinstance(value, classes):
            return cast(Adapter, importlib.import_module(library.adapter))
    return None


def names_of(count: int | None, name: str | None) -> list[str]:
    """Names of the clouds of a structure, for error messages; ``None`` for a single cloud."""
    if count is None:
        return [name or "the cloud"]
    prefix = f"{name}, " if name else ""
    return [f"{prefix}cloud {i}" for i in range(count)]
