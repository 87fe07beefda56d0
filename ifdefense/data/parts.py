"""Shared by the readers of labelled sets: requests, and checks of arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ifdefense.data.cloudset import CloudSet
from ifdefense.data.errors import DataError
from ifdefense.data.formats import hdf5, text
from ifdefense.data.formats.arrays import Arrays, clouds_of, load_npy
from ifdefense.data.formats.files import naming, read_bytes
from ifdefense.data.formats.table import Options
from ifdefense.data.packed import require

Part = Literal["train", "val", "test"]

# fmt: off
MODELNET40_CLASSES = (
    "airplane", "bathtub", "bed", "bench", "bookshelf", "bottle", "bowl", "car", "chair", "cone", "cup",
    "curtain", "desk", "door", "dresser", "flower_pot", "glass_box", "guitar", "keyboard", "lamp",
    "laptop", "mantel", "monitor", "night_stand", "person", "piano", "plant", "radio", "range_hood",
    "sink", "sofa", "stairs", "stool", "table", "tent", "toilet", "tv_stand", "vase", "wardrobe", "xbox",
)
# fmt: on


@dataclasses.dataclass(frozen=True)
class Request:
    """Arguments of a reader.

    Attributes:
        part: the part of the set.
        num_points: points per cloud; ``None`` for the usual number of the layout.
        variant: version of the part.
        background: whether background points are kept.
    """

    part: Part
    num_points: int | None = None
    variant: str | None = None
    background: bool = True

    @property
    def points(self) -> int:
        """Points per cloud of the usual layouts: 1,024 by default."""
        return 1024 if self.num_points is None else self.num_points


def cloud_set(
    points: NDArray[Any],
    labels: Iterable[int] | NDArray[Any],
    names: Iterable[str],
    classes: tuple[str, ...],
    targets: NDArray[Any] | None = None,
) -> CloudSet:
    """Set of clouds from the arrays of a file."""
    return CloudSet(
        points=points.astype(np.float32),
        labels=np.asarray(labels, dtype=np.int64).reshape(-1),
        names=np.asarray(names, dtype=np.str_),
        classes=classes,
        targets=None if targets is None else targets.reshape(-1).astype(np.int64),
    )


def numbered(path: Path, count: int) -> list[str]:
    """Names for unnamed clouds: file name and number."""
    return [f"{path.stem}_{index:04d}" for index in range(count)]


def found(paths: list[Path], root: Path, part: Part) -> list[Path]:
    """The files of a part.

    Raises:
        DataError: if there are none.
    """
    if not paths:
        raise DataError(f"{root}: there are no files of the {part} part in it")
    return paths


def chosen(variants: Mapping[str, Path], variant: str | None, root: Path) -> Path:
    """File of a variant; without a name, the only file.

    Raises:
        DataError: if the variant is unknown, or not given and there are several; lists them.
    """
    names = ", ".join(sorted(variants))
    if variant is None:
        if len(variants) > 1:
            raise DataError(f"{root}: variant= says which of these is meant: {names}")
        return next(iter(variants.values()))
    if variant not in variants:
        raise DataError(f"{root}: there is no variant {variant!r}; there are {names}")
    return variants[variant]


def read_hdf5_arrays(path: Path) -> Arrays:
    """All arrays of an .h5 file."""
    with naming(path):
        return hdf5.load(read_bytes(path, Options()), Options())


def read_ply_data(
    root: Path, request: Request, names_of: Callable[[Path, int], list[str]]
) -> tuple[NDArray[Any], NDArray[Any], list[str]]:
    """Points, labels and names of a part that is stored as ``ply_data_PART*.h5``.

    Args:
        root: folder of the set.
        request: the part and its number of points.
        names_of: names of the clouds of a file, from its path and their number.
    """
    points, labels, names = [], [], []
    for path in found(sorted(root.glob(f"ply_data_{request.part}*.h5")), root, request.part):
        arrays = read_hdf5_arrays(path)
        require(arrays, ("data", "label"), path)
        points.append(first(batch_of(arrays["data"], path), request.points, path))
        labels.append(arrays["label"].reshape(-1))
        names += names_of(path, len(points[-1]))
    return np.concatenate(points), np.concatenate(labels), names


def read_array(path: Path) -> NDArray[Any]:
    """The array of an .npy file."""
    with naming(path):
        return load_npy(read_bytes(path, Options()), Options())


def read_rows(path: Path, max_rows: int) -> NDArray[np.float64]:
    """The first points of a text file without a line of names."""
    options = Options(max_rows=max_rows)
    with naming(path):
        return text.decode(read_bytes(path, options), options).clouds[0].points


def batch_of(clouds: NDArray[Any], path: Path) -> NDArray[np.float64]:
    """The clouds ``(S, N, 3)`` of an array, checked."""
    if clouds.ndim != 3:
        raise DataError(f"{path}: the clouds must be (S, N, 3), got {clouds.shape}")
    with naming(path):
        file = clouds_of({"points": clouds}, Options(), "npz")
        return np.stack([cloud.points for cloud in file.clouds])


def first(clouds: NDArray[Any], num_points: int, path: Path) -> NDArray[Any]:
    """The first points of each cloud.

    Raises:
        DataError: if there are fewer.
    """
    if clouds.shape[1] < num_points:
        raise DataError(f"{path}: its clouds have {clouds.shape[1]} points, {num_points} are asked for")
    return clouds[:, :num_points]


def stacked(clouds: Sequence[NDArray[Any]], num_points: int, names: Sequence[object]) -> NDArray[Any]:
    """The first points of clouds of different sizes, ``(S, num_points, 3)``.

    Raises:
        DataError: if a cloud has fewer; names the smallest.
    """
    sizes = [len(cloud) for cloud in clouds]
    smallest = int(np.argmin(sizes))
    if sizes[smallest] < num_points:
        few = sum(size < num_points for size in sizes)
        raise DataError(
            f"{names[smallest]}: it has {sizes[smallest]} points, {num_points} are asked for; "
            f"of {len(clouds)} clouds, {few} have too few and this one the fewest"
        )
    return np.stack([cloud[:num_points] for cloud in clouds])
