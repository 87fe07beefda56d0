"""Builds occupancy sets from ModelNet40's clouds, from triangle soups and from the procedural solids."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ifdefense.data.modelnet import Split
from ifdefense.geometry.frame import Frame
from ifdefense.training.occupancies import (
    Field,
    OccupancySet,
    field_from_cloud,
    field_from_mesh,
    field_from_shape,
)

logger = logging.getLogger(__name__)

POINTS = 1024
DENSE = 30_000  # samples that resolve the surface of a soup on the grid

Pair = tuple[NDArray[np.floating], Field | None]


def to_unit_cube(points: NDArray[np.floating]) -> NDArray[np.float32]:
    """Centres a cloud on its bounding box and scales its longest side to 1."""
    cloud = torch.from_numpy(points)
    return Frame.of(cloud).to_cube(cloud).numpy()


def _gather(pairs: Iterable[Pair], total: int, name: str) -> OccupancySet:
    kept = [pair for pair in tqdm(pairs, total=total, desc=name, mininterval=5) if pair[1] is not None]
    if len(kept) < total:
        logger.warning(
            "%s: %d of %d shapes thrown out, their inside is inconsistent", name, total - len(kept), total
        )
    if not kept:
        raise ValueError(f"{name}: no shape with a usable inside among {total}")
    return OccupancySet(
        points=np.stack([points for points, _ in kept]).astype(np.float16),
        fields=np.stack([field for _, field in kept if field is not None]),
        source=np.zeros(len(kept), dtype=np.int64),
        sources=(name,),
    )


def from_modelnet40(root: str | Path | None, split: Split) -> OccupancySet:
    """ModelNet40 clouds of a split with the solids guessed behind them."""
    from ifdefense.data.modelnet import load_modelnet40

    clouds = [to_unit_cube(points) for points in load_modelnet40(root, split).points]
    return _gather(
        ((points, field_from_cloud(points)) for points in clouds), len(clouds), f"modelnet40-{split}"
    )


def from_meshes(root: str | Path | None, seed: int = 0) -> OccupancySet:
    """Packed triangle soups, signed by winding numbers; those with an inconsistent inside are left out."""
    from ifdefense.data.packed import load_packed_meshes
    from ifdefense.stages.resampling import sample_surface

    meshes = load_packed_meshes(root).meshes

    def pairs() -> Iterable[Pair]:
        for index, mesh in enumerate(meshes):
            points, _ = sample_surface(mesh, DENSE, generator=np.random.default_rng([seed, index]))
            yield points[:POINTS], field_from_mesh(mesh, points)

    return _gather(pairs(), len(meshes), "meshes")


def from_procedural(per_class: int, seed: int = 0) -> OccupancySet:
    """Procedural solids with their exact fields."""
    from ifdefense.shapes.procedural import CLASSES, make_shape

    def pairs() -> Iterable[Pair]:
        for label, name in enumerate(CLASSES):
            for index in range(per_class):
                rng = np.random.default_rng([seed, label, index])
                shape = make_shape(name, rng)
                yield shape.sample_surface(POINTS, rng)[0], field_from_shape(shape)

    return _gather(pairs(), per_class * len(CLASSES), "procedural")


def cached(folder: Path, build: Callable[[], OccupancySet]) -> OccupancySet:
    """Loads the set from ``folder``, building and saving it first when it is not there."""
    if not (folder / "sources.txt").exists():
        build().save(folder)
    return OccupancySet.load(folder)
