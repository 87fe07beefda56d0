"""Where solids come from: ModelNet40's clouds, folders of clouds, triangle soups and procedural solids."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ifdefense.data.errors import DataError
from ifdefense.data.formats import CLOUD_SUFFIXES, read_clouds
from ifdefense.data.modelnet import Split
from ifdefense.data.packed import data_folder
from ifdefense.geometry.axes import UP, turned
from ifdefense.geometry.frame import Frame
from ifdefense.implicit.base import load_network
from ifdefense.provenance import digest
from ifdefense.training.data.cache import cached_set
from ifdefense.training.data.network_labels import grids_from_network
from ifdefense.training.data.solids import (
    BOX,
    OFFSET,
    STEP,
    OccupancyGrid,
    OccupancySet,
    concatenate,
    grid_from_cloud,
    grid_from_mesh,
    grid_from_shape,
)

logger = logging.getLogger(__name__)

POINTS = 1024
DENSE = 30_000  # samples that resolve the surface of a soup on the grid
TOGETHER = 16  # clouds that a network labels at a time
FEWEST_POINTS = 64
FEWEST_CLOUDS = 20

Labels = Literal["local", "estimated"]
"""Source of the solid behind a cloud: the local network, or planes and rays."""

FOLDER = "points"
"""Name of the source that is a folder of clouds."""

SOURCES = ("modelnet40", "meshes", "procedural", FOLDER)

Pair = tuple[NDArray[np.floating], OccupancyGrid | None]


def to_unit_cube(points: NDArray[np.floating]) -> NDArray[np.float32]:
    """Centres a cloud on its bounding box and scales its longest side to 1."""
    cloud = torch.from_numpy(points)
    return Frame.of(cloud).to_cube(cloud).numpy()


def _gather(pairs: Iterable[Pair], total: int, name: str) -> OccupancySet:
    kept = [pair for pair in tqdm(pairs, total=total, desc=name, mininterval=5) if pair[1] is not None]
    if len(kept) < total:
        logger.warning(
            "%s: %d of %d shapes left out, their inside is inconsistent", name, total - len(kept), total
        )
    if not kept:
        raise ValueError(f"{name}: no shape with a usable inside among {total}")
    return OccupancySet(
        points=np.stack([points for points, _ in kept]).astype(np.float16),
        grids=np.stack([grid for _, grid in kept if grid is not None]),
        source=np.zeros(len(kept), dtype=np.int64),
        sources=(name,),
    )


def from_clouds(
    clouds: Sequence[NDArray[np.floating]], name: str, labels: Labels = "local", seed: int = 0
) -> OccupancySet:
    """Clouds without meshes, with the solids behind them.

    Args:
        clouds: ``(N_i, 3)`` samples of surfaces, in any frame. `POINTS` of each are kept, drawn at random;
            points of smaller clouds are repeated.
        name: of the collection.
        labels: ``"local"`` for the solids that the shipped local network sees (`grids_from_network`),
            ``"estimated"`` for those that planes and rays say (`grid_from_cloud`).
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    cubes = [to_unit_cube(_of_size(cloud, rng)) for cloud in clouds]

    def pairs() -> Iterable[Pair]:
        if labels == "estimated":
            yield from ((cube, grid_from_cloud(cube)) for cube in cubes)
            return
        network = load_network("local")
        for start in range(0, len(cubes), TOGETHER):
            part = cubes[start : start + TOGETHER]
            yield from zip(part, grids_from_network(network, part), strict=True)

    return _gather(pairs(), len(cubes), name)


def _of_size(cloud: NDArray[np.floating], rng: np.random.Generator) -> NDArray[np.floating]:
    """`POINTS` points of a cloud."""
    if len(cloud) == POINTS:
        return cloud
    return cloud[np.resize(rng.permutation(len(cloud)), POINTS)]


def from_modelnet40(root: str | Path | None, split: Split, labels: Labels = "local") -> OccupancySet:
    """ModelNet40 clouds of a split, with the solids behind them, see `from_clouds`."""
    from ifdefense.data.modelnet import load_modelnet40

    return from_clouds(list(load_modelnet40(root, split).points), f"modelnet40-{split}", labels)


def read_folder(folder: Path) -> list[NDArray[np.floating]]:
    """All clouds in the files of a folder and of the folders in it, in the order of their names.

    Raises:
        DataError: if there are fewer than `FEWEST_CLOUDS`, a file cannot be read, a cloud has fewer than
            `FEWEST_POINTS` points, or they are all equal.
    """
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in CLOUD_SUFFIXES and not path.name.startswith(".")
    )
    clouds: list[NDArray[np.floating]] = []
    for path in paths:
        found = read_clouds(path, POINTS)
        for index, cloud in enumerate(found):
            if len(cloud) < FEWEST_POINTS:
                raise DataError(
                    f"{path}: cloud {index} has {len(cloud)} points; at least {FEWEST_POINTS} are needed"
                )
            if not np.ptp(cloud, axis=0).any():
                raise DataError(f"{path}: all points of cloud {index} are equal")
        clouds += found
    if len(clouds) < FEWEST_CLOUDS:
        raise DataError(
            f"{folder}: {len(clouds)} clouds in {len(paths)} files; at least {FEWEST_CLOUDS} are needed"
        )
    return clouds


def from_meshes(root: str | Path | None, seed: int = 0) -> OccupancySet:
    """Packed triangle soups, signed by winding numbers, without those whose inside is inconsistent."""
    from ifdefense.data.packed import load_packed_meshes
    from ifdefense.geometry.sampling import sample_surface

    meshes = load_packed_meshes(root).meshes

    def pairs() -> Iterable[Pair]:
        for index, mesh in enumerate(meshes):
            points, _ = sample_surface(mesh, DENSE, generator=np.random.default_rng([seed, index]))
            yield points[:POINTS], grid_from_mesh(mesh, points)

    return _gather(pairs(), len(meshes), "meshes")


def from_procedural(per_class: int, seed: int = 0) -> OccupancySet:
    """Procedural solids with their exact grids."""
    from ifdefense.shapes.procedural import CLASSES, make_shape

    def pairs() -> Iterable[Pair]:
        for label, name in enumerate(CLASSES):
            for index in range(per_class):
                rng = np.random.default_rng([seed, label, index])
                shape = make_shape(name, rng)
                yield shape.sample_surface(POINTS, rng)[0], grid_from_shape(shape)

    return _gather(pairs(), per_class * len(CLASSES), "procedural")


def cached(
    folder: Path, build: Callable[[], OccupancySet], settings: Mapping[str, Any] | None = None
) -> OccupancySet:
    """`cached_set` of occupancies, whose settings include those of the grids."""
    wanted = {"box": BOX, "offset": OFFSET, "step": STEP, **(settings or {})}
    return cached_set(folder, build, OccupancySet.load, wanted)


@dataclasses.dataclass(frozen=True)
class SolidSources:
    """Where solids come from.

    Attributes:
        mix: weights of the sources.
        root: data folder.
        clouds: folder of clouds, the source ``"points"``.
        labels: source of the solid behind a cloud.
        cache: folder of the prepared shapes.
        per_class: procedural shapes per class.
        seed: of their draw.
        up: up axis of the clouds, which are turned z up, as the other sources are.
    """

    mix: dict[str, float]
    root: str | None
    clouds: Path | None
    labels: Labels
    cache: Path
    per_class: int
    seed: int
    up: str = UP

    def train(self) -> OccupancySet:
        """Shapes of all sources, named by them."""
        parts = {name: self._collect(name) for name in self.mix}
        return concatenate([dataclasses.replace(part, sources=(name,)) for name, part in parts.items()])

    def validation(self) -> OccupancySet:
        """Shapes that no training sees."""
        if self.clouds is not None:
            return self._clouds(held=True)
        if "modelnet40" in self.mix:
            return self._modelnet40("validation")
        seed = self.seed + 2
        return cached(self.cache / "procedural-validation", lambda: from_procedural(4, seed), {"seed": seed})

    def _collect(self, name: str) -> OccupancySet:
        """The training shapes of a source."""
        seed = self.seed
        if name == FOLDER:
            return self._clouds(held=False)
        if name == "modelnet40":
            return self._modelnet40("train")
        if name == "procedural":
            settings: dict[str, Any] = {"per_class": self.per_class, "seed": seed + 1}
            return cached(self.cache / name, lambda: from_procedural(self.per_class, seed + 1), settings)
        folder = str(data_folder(self.root, name).resolve())
        return cached(
            self.cache / name, lambda: from_meshes(self.root, seed), {"folder": folder, "seed": seed}
        )

    def _modelnet40(self, split: Split) -> OccupancySet:
        folder = str(data_folder(self.root, "modelnet40").resolve())
        return cached(
            self.cache / f"modelnet40-{split}",
            lambda: from_modelnet40(self.root, split, self.labels),
            {"folder": folder, "labels": self.labels},
        )

    @functools.cached_property
    def _read(self) -> list[NDArray[np.floating]]:
        """The clouds of the folder, z up."""
        assert self.clouds is not None
        return [turned(cloud, self.up) for cloud in read_folder(self.clouds)]

    def _clouds(self, held: bool) -> OccupancySet:
        """Every tenth cloud of the folder, or the others."""
        part = [cloud for index, cloud in enumerate(self._read) if (index % 10 == 0) == held]
        name = "points-validation" if held else FOLDER
        return cached(
            self.cache / name,
            lambda: from_clouds(part, name, self.labels, self.seed),
            {"clouds": digest(*part), "labels": self.labels, "seed": self.seed},
        )
