"""Dense surface samples with normals: of meshes, procedural solids, and clouds labelled by a network."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from ifdefense.data.cloudset import CloudSet
from ifdefense.data.modelnet import load_modelnet40
from ifdefense.data.packed import data_folder, load_packed_meshes
from ifdefense.geometry.frame import Frame
from ifdefense.geometry.points import knn
from ifdefense.geometry.sampling import sample_surface
from ifdefense.implicit.base import ImplicitNetwork, load_network
from ifdefense.provenance import digest
from ifdefense.shapes.procedural import CLASSES, make_shape
from ifdefense.stages.extraction import ExtractionOptions, extract_meshes
from ifdefense.stages.resampling import resample
from ifdefense.training.data.cache import cached_set

logger = logging.getLogger(__name__)

Floats = NDArray[np.float32]

WITH_SURFACES = ("meshes", "furniture", "procedural")
"""Sets of shapes whose surface is known."""

SOURCES = (*WITH_SURFACES, "modelnet40")
"""All sets that `collect` knows."""

SAMPLES = 16384
"""Samples per surface."""

SOFTNESS = 0.004
"""Width of the logistic in the distance from a thickened surface that is learned as its label, unit cube."""

FAR = 0.05
"""Samples of a teacher's surface farther than this from the cloud are dropped, unit cube."""


@dataclasses.dataclass(frozen=True, eq=False)
class DenseSurfaces:
    """Samples of S surfaces as small integers; every set has the same split.

    Attributes:
        points: ``(S, D, 3)`` int16 in random order, in steps of 1 / 32767 of the unit cube.
        normals: ``(S, D, 3)`` int8, unit normals in steps of 1 / 127.
        labels: ``(S,)`` int64 classes.
        held: ``(S,)`` bool, surfaces held out for validation.
    """

    points: NDArray[np.int16]
    normals: NDArray[np.int8]
    labels: NDArray[np.int64]
    held: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.points)

    def surface(
        self,
        index: int,
        scale: NDArray[np.floating] | None = None,
        rotation: NDArray[np.floating] | None = None,
    ) -> tuple[Floats, Floats]:
        """Samples and unit normals ``(D, 3)`` of a surface in the unit cube.

        Args:
            index: of the surface.
            scale: factors ``(3,)`` of the axes, applied first.
            rotation: ``(3, 3)`` orthogonal matrix, for row vectors.
        """
        points, normals = self.points[index].astype(np.float32), self.normals[index].astype(np.float32)
        if scale is not None:
            points, normals = points * scale.astype(np.float32), normals / scale.astype(np.float32)
        if rotation is not None:
            points, normals = points @ rotation.astype(np.float32), normals @ rotation.astype(np.float32)
        columns = np.ascontiguousarray(points.T)  # NumPy reduces along rows several times as fast
        low, high = columns.min(1), columns.max(1)
        points = (points - (low + high) / 2) / (high - low).max()
        return points, normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)

    def digest(self) -> str:
        """Identifies the set, by a part of each surface's samples."""
        return digest(self.points[:, :64], self.labels, self.held)

    def save(self, folder: Path) -> None:
        """Writes one .npy file per array."""
        folder.mkdir(parents=True, exist_ok=True)
        for field in dataclasses.fields(self):
            np.save(folder / f"{field.name}.npy", getattr(self, field.name))

    @classmethod
    def load(cls, folder: Path) -> DenseSurfaces:
        """Maps the files that `save` wrote into memory."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in names))


def held_out(labels: NDArray[np.integer], every: int = 10) -> NDArray[np.bool_]:
    """Marks every tenth (``every``) shape of each class."""
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        mask[np.flatnonzero(labels == label)[4::every]] = True
    return mask


def from_meshes(root: str | Path | None, name: str = "meshes", samples: int = SAMPLES) -> DenseSurfaces:
    """Surfaces of packed triangle soups, as `load_packed_meshes` reads them; soups without area are left out.

    Every tenth mesh of each class is held out; of ``"furniture"``, whose classes are rooms, every tenth mesh.
    """
    data = load_packed_meshes(root, name)
    groups = np.zeros_like(data.labels) if name == "furniture" else data.labels
    number = 1 if name == "furniture" else 0
    rows = []
    for index, (mesh, label, held) in enumerate(
        zip(tqdm(data.meshes, desc=name, mininterval=5), data.labels, held_out(groups), strict=True)
    ):
        try:
            points, face = sample_surface(mesh, samples, generator=np.random.default_rng([number, index]))
        except ValueError as error:
            logger.warning("%s %s is left out: %s", name, data.names[index], error)
            continue
        rows.append((points, mesh.face_normals()[face].astype(np.float32), int(label), bool(held)))
    return _pack(rows, name)


def from_procedural(per_class: int = 60, samples: int = SAMPLES) -> DenseSurfaces:
    """Surfaces of procedural solids; every twentieth of each class is held out, from the fifth on."""
    rows = []
    for label, name in enumerate(CLASSES):
        for index in range(per_class):
            rng = np.random.default_rng([77, label, index])
            rows.append((*make_shape(name, rng).sample_surface(samples, rng), label, index % 20 == 4))
    return _pack(rows, "procedural")


@torch.no_grad()
def from_clouds(
    clouds: CloudSet,
    teacher: ImplicitNetwork,
    limit: int | None = None,
    samples: int = SAMPLES,
    *,
    resolution: int = 64,
    max_error: float = 0.014,
    max_missed: float = 0.05,
    device: torch.device | str | None = None,
) -> DenseSurfaces:
    """Surfaces that a trained network finds behind training clouds; none is held out.

    Args:
        clouds: labelled clouds, any frame.
        teacher: the network, in evaluation mode; its calibration is used.
        limit: clouds to try; rare classes are first. All by default.
        samples: per surface.
        resolution: cells per side of the extraction.
        max_error: largest mean distance of the points from the surface, unit cube; clouds with a larger one
            are left out.
        max_missed: largest share of points farther than 0.03 from it; so are clouds with a larger one.
        device: of the network.
    """
    labels = np.asarray(clouds.labels)
    calibration = teacher.calibration
    options = ExtractionOptions(resolution=resolution, box=calibration.box, threshold=calibration.threshold)
    rows = []
    for index in tqdm(_rare_first(labels)[:limit], desc="teacher", mininterval=5):
        cloud = torch.from_numpy(np.asarray(clouds.points[index], np.float32))
        cube = Frame.of(cloud).to_cube(cloud)
        field = teacher.field(teacher.encode([cube.to(device)]))
        mesh = extract_meshes(field, 1, options, device=device)[0]
        if mesh.is_empty:
            continue
        found = resample(
            [mesh], samples * 5 // 4, seed=int(index), method="uniform", inset=calibration.offset
        )
        points, normals = found.points.cpu()[0], found.normals.cpu()[0]
        near = torch.nonzero(_distances(points, cube) < FAR)[:samples, 0]
        missed = _distances(cube, points)
        if len(near) < samples or missed.mean() > max_error or (missed > 0.03).float().mean() > max_missed:
            continue
        rows.append((points[near].numpy(), normals[near].numpy(), int(labels[index]), False))
    return _pack(rows, "teacher")


def _rare_first(labels: NDArray[np.integer]) -> NDArray[np.int64]:
    """A random order by rank within the class: the first cloud of every class, then every second."""
    rng = np.random.default_rng(3)
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels), int)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members))
    return np.lexsort((rng.random(len(labels)), rank))


def _distances(queries: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Distance of each query to the nearest point."""
    return knn(queries[None], points[None], 1)[0][0, :, 0].sqrt()


def _pack(rows: Iterable[tuple[Floats, Floats, int, bool]], name: str) -> DenseSurfaces:
    packed: list[tuple[NDArray[np.int16], NDArray[np.int8], int, bool]] = []
    for points, normals, label, held in rows:
        low, high = points.min(0), points.max(0)
        unit = (points - (low + high) / 2) / (high - low).max()
        steps = np.rint(unit * 32767).astype(np.int16)
        packed.append((steps, np.rint(normals * 127).astype(np.int8), label, held))
    if not packed:
        raise ValueError(f"{name}: no usable surface")
    return DenseSurfaces(
        np.stack([row[0] for row in packed]),
        np.stack([row[1] for row in packed]),
        np.array([row[2] for row in packed], dtype=np.int64),
        np.array([row[3] for row in packed], dtype=bool),
    )


def collect(
    name: str, root: str | None, cache: Path, per_class: int, teacher: Path | None, limit: int, device: Any
) -> DenseSurfaces:
    """The surfaces of a source, cached in a folder of that name.

    Args:
        name: one of `SOURCES`.
        root: data folder.
        cache: folder of the sets.
        per_class: procedural solids per class.
        teacher: weights that label ModelNet40's training clouds.
        limit: clouds that the teacher tries.
        device: of the teacher.

    Raises:
        DataError: if the data is missing or cannot be used.
        ValueError: if a teacher is needed and not given.
    """
    settings: dict[str, Any] = {"samples": SAMPLES}
    if name == "procedural":
        settings["per_class"] = per_class
        return cached_set(cache / name, lambda: from_procedural(per_class), DenseSurfaces.load, settings)
    settings["folder"] = str(data_folder(root, name).resolve())
    if name != "modelnet40":
        return cached_set(cache / name, lambda: from_meshes(root, name), DenseSurfaces.load, settings)
    if teacher is None:
        raise ValueError("ModelNet40's clouds have no surfaces: they need a teacher")

    def label() -> DenseSurfaces:
        network = load_network(teacher)
        if isinstance(network, nn.Module):
            network.to(device)
        return from_clouds(load_modelnet40(root, "train"), network, limit, device=device)

    settings |= {"teacher": None if teacher is None else digest(teacher.read_bytes()), "limit": limit}
    return cached_set(cache / name, label, DenseSurfaces.load, settings)


def mixed(mix: Mapping[str, float], sources: Mapping[str, DenseSurfaces]) -> str:
    """A mix of sets in words, for model cards."""
    return ", ".join(
        f"{name} (weight {weight:g}, {int((~sources[name].held).sum()):,} surfaces)"
        for name, weight in mix.items()
    )
