"""Attacked clouds with the surfaces behind them, as examples beside the simulated corruptions.

The clouds are made elsewhere, by whoever has attacks and classifiers (`ifdefense-bench attacked-set`).
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ifdefense.data.errors import DataError
from ifdefense.provenance import digest
from ifdefense.training.data.surfaces import DenseSurfaces

Floats = NDArray[np.float32]


@dataclasses.dataclass(frozen=True, eq=False)
class AttackedClouds:
    """S attacked clouds, each of a surface of `DenseSurfaces`.

    Attributes:
        points: ``(T, 3)`` float16, the clouds one after another, each in the frame of its surface: the one
            that `DenseSurfaces.surface` gives with the scale and the rotation below.
        sizes: ``(S,)`` points of each cloud.
        sources: names of the sets of surfaces.
        digests: their `DenseSurfaces.digest`.
        source: ``(S,)`` index of the set of each cloud.
        index: ``(S,)`` its surface in the set.
        scale: ``(S, 3)`` factors of the surface's axes.
        rotation: ``(S, 3, 3)`` orthogonal matrix for row vectors.
        attacks: names of the attacks, with the classifier.
        attack: ``(S,)`` index of the attack of each cloud.
    """

    points: NDArray[np.float16]
    sizes: NDArray[np.int64]
    sources: NDArray[np.str_]
    digests: NDArray[np.str_]
    source: NDArray[np.int64]
    index: NDArray[np.int64]
    scale: Floats
    rotation: Floats
    attacks: NDArray[np.str_]
    attack: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.sizes)

    @classmethod
    def load(cls, path: str | Path) -> AttackedClouds:
        """Reads an npz whose arrays are the attributes.

        Raises:
            DataError: if the file cannot be read or does not hold them.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = cls(*(arrays[name] for name in names))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} holds no attacked clouds: {error}") from None
        rows = {
            name: len(getattr(found, name)) for name in ("source", "index", "scale", "rotation", "attack")
        }
        if set(rows.values()) != {len(found)} or found.sizes.sum() != len(found.points):
            raise DataError(f"{path} holds no attacked clouds: its arrays do not belong together")
        return found

    def digest(self) -> str:
        """Identifies the clouds."""
        return digest(self.points, self.sizes, self.source, self.index)

    def check(self, surfaces: Mapping[str, DenseSurfaces]) -> None:
        """Checks that the clouds are of these surfaces.

        Raises:
            DataError: if a set is missing, or another one of the same name.
        """
        for name, expected in zip(self.sources.tolist(), self.digests.tolist(), strict=True):
            if name not in surfaces:
                raise DataError(f"the attacked clouds need the surfaces {name}, which are not in the mix")
            if surfaces[name].digest() != expected:
                raise DataError(f"the attacked clouds were made of other surfaces {name} than those given")

    def held(self, surfaces: Mapping[str, DenseSurfaces]) -> NDArray[np.bool_]:
        """``(S,)`` whether a cloud's surface is held out for validation."""
        held = np.zeros(len(self), bool)
        for number, name in enumerate(self.sources.tolist()):
            rows = self.source == number
            held[rows] = surfaces[name].held[self.index[rows]]
        return held

    def pair(self, row: int, surfaces: Mapping[str, DenseSurfaces]) -> tuple[Floats, Floats, Floats]:
        """A cloud ``(N, 3)``, and samples and unit normals ``(D, 3)`` of its surface, in one frame."""
        end = int(self.sizes[: row + 1].sum())
        cloud = self.points[end - int(self.sizes[row]) : end].astype(np.float32)
        name = str(self.sources[self.source[row]])
        surface = surfaces[name].surface(int(self.index[row]), self.scale[row], self.rotation[row])
        return cloud, *surface
