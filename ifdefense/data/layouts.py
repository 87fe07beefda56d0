"""Detects the layout of labelled data sets and reads their parts.

Supported are this project's packed files, ``modelnet40_ply_hdf5_2048`` (Qi et al., arXiv:1612.00593),
``modelnet40_normal_resampled`` (Qi et al., arXiv:1706.02413), folders of meshes or clouds laid out like
ModelNet's (Wu et al., arXiv:1406.5670), processed files of PyTorch Geometric's ``ModelNet``, IF-Defense's npz
files (Wu et al., arXiv:2010.05272), ModelNet40-C and ModelNet-C, ScanObjectNN, ShapeNetPart, and single files
of clouds and labels; the last five are described in their modules. docs/data.md lists
the sources of the up axes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ifdefense.data import modelnet_c, scanobjectnn, shapenet_part
from ifdefense.data.catalogue import hint
from ifdefense.data.cloudset import CloudSet
from ifdefense.data.errors import DataError, optional
from ifdefense.data.formats import CLOUD_SUFFIXES, read_cloud
from ifdefense.data.formats.arrays import read_npz
from ifdefense.data.formats.files import naming
from ifdefense.data.formats.table import checked_points
from ifdefense.data.labelled_arrays import is_labelled_arrays, read_labelled_arrays
from ifdefense.data.orientation import looks_up
from ifdefense.data.packed import data_folder, load_packed_clouds, read_classes, require
from ifdefense.data.parts import (
    MODELNET40_CLASSES,
    Part,
    Request,
    batch_of,
    cloud_set,
    first,
    found,
    numbered,
    read_ply_data,
    read_rows,
    stacked,
)
from ifdefense.geometry.axes import UP, axis_of, turned
from ifdefense.geometry.mesh import Mesh
from ifdefense.geometry.sampling import sample_surface

logger = logging.getLogger(__name__)

SOURCE = "source"
"""Value of ``up`` that leaves clouds as they are stored."""

# fmt: off
MODELNET10_CLASSES = (
    "bathtub", "bed", "chair", "desk", "dresser", "monitor", "night_stand", "sofa", "table", "toilet",
)
# fmt: on


@dataclasses.dataclass(frozen=True)
class Layout:
    """Storage layout of a labelled set.

    Attributes:
        matches: whether a folder or file has this layout.
        read: reads a part of it, in the frame of the source.
        up: up axis of the source; ``None`` if unknown.
        parts: names of the parts.
        variants: whether a part has several versions.
        background: whether its clouds have background points.
    """

    matches: Callable[[Path], bool]
    read: Callable[[Path, Request], CloudSet]
    up: str | None
    parts: tuple[Part, ...] = ("train", "test")
    variants: bool = False
    background: bool = False


def detect_layout(root: str | Path) -> str:
    """The name of the layout of a folder or file, one of `LAYOUTS`.

    Raises:
        DataError: if the path does not exist or its layout is unknown.
    """
    root = Path(root)
    if not root.exists():
        raise DataError(f"{root}: there is no such file or folder")
    for name, layout in LAYOUTS.items():
        if layout.matches(root):
            return name
    raise DataError(f"{root}: its layout is not known; known are {', '.join(LAYOUTS)}")


def load_part(
    root: str | Path,
    part: Part,
    num_points: int | None = None,
    *,
    up: str | None = None,
    variant: str | None = None,
    background: bool = True,
) -> CloudSet:
    """Reads a part of labelled clouds in any known layout, with z up.

    Layouts define their up axis. Clouds with another up axis are rotated; this is logged at level INFO and
    recorded in `CloudSet.turned_from`. A warning is logged if clouds of ModelNet's classes seem to have
    another up axis.

    Args:
        root: folder, or npz file of IF-Defense.
        part: ``"train"`` or ``"test"``; for ShapeNetPart also ``"val"``.
        num_points: points per cloud, by default 1,024: the first stored ones, as is usual for these data, or
            uniform samples of stored meshes. Corrupted sets are read whole by default; otherwise the same
            random rows are taken from each cloud.
        up: the up axis of the source, one of `ifdefense.geometry.axes.AXES`, by default that of the layout;
            or ``"source"`` for no rotation. Both disable the warning.
        variant: version of the part: ``"gaussian_3"`` (ModelNet40-C), ``"add_global_4"``
            (ModelNet-C), ``"PB_T50_RS"`` (ScanObjectNN).
        background: whether background points are kept (ScanObjectNN).

    Raises:
        DataError: if the layout is unknown, the part or variant does not exist, or a file is unusable.
        ImportError: if the package that reads this layout is not installed.
        ValueError: if ``up`` is unknown.
    """
    root = Path(root)
    if up not in (None, SOURCE):
        axis_of(up)
    name = detect_layout(root)
    layout = LAYOUTS[name]
    if part not in layout.parts:
        raise DataError(f"{root}: {name} has no part {part!r}, only {', '.join(layout.parts)}")
    if variant is not None and not layout.variants:
        raise DataError(f"{root}: {name} has no variants, so there is no {variant!r}")
    if not (background or layout.background):
        raise DataError(f"{root}: {name} does not say which points are background")
    try:
        clouds = layout.read(root, Request(part, num_points, variant, background))
    except DataError:
        raise
    except ValueError as error:  # clouds and labels do not match
        raise DataError(f"{root}: {error}") from error
    return _upright(clouds, layout.up, up, root, name)


def load_named(
    name: str, root: str | Path | None, part: Part, num_points: int | None = None, **options: Any
) -> CloudSet:
    """Reads a part of a data set of `ifdefense.data.catalogue.CATALOGUE`.

    Args:
        name: its name.
        root: its folder or the parent with a folder ``name``; by default ``IFDEFENSE_DATA``.
        part: as for `load_part`, like the following.
        num_points: ...
        options: ...

    Raises:
        DataError: as `load_part`; if the data set is missing, the message says how to get it.
    """
    folder = data_folder(root, name)
    if not any(layout.matches(folder) for layout in LAYOUTS.values()):
        raise DataError(f"{folder}: there is no {name} in it{hint(name)}")
    return load_part(folder, part, num_points, **options)


def _upright(clouds: CloudSet, stated: str | None, up: str | None, root: Path, name: str) -> CloudSet:
    """Rotates clouds to z up, unless ``up`` forbids it or the axis is unknown."""
    if up is None:
        seen = looks_up(clouds, stated or UP)
        if seen is not None:
            logger.warning(
                "%s: %s is read as %s up, but its clouds look %s up: use up=%r, or up=%r if that is wrong",
                root,
                name,
                stated or UP,
                seen,
                seen,
                stated or UP,
            )
    if up == SOURCE:
        return dataclasses.replace(clouds, up=stated)
    axis = up or stated
    if axis in (None, UP):
        return dataclasses.replace(clouds, up=axis)
    logger.info("%s: %s, %s up, was turned %s up; up=%r leaves it as it is", root, name, axis, UP, SOURCE)
    return dataclasses.replace(clouds, points=turned(clouds.points, axis), up=UP, turned_from=axis)


def _read_packed(root: Path, request: Request) -> CloudSet:
    paths = sorted(root.glob("test.npz" if request.part == "test" else "train_*.npz"))
    clouds = load_packed_clouds(found(paths, root, request.part))
    points = first(clouds.points, request.points, root)
    return CloudSet(points, clouds.labels, clouds.names, clouds.classes)


def _read_hdf5(root: Path, request: Request) -> CloudSet:
    points, labels, names = read_ply_data(root, request, functools.partial(_names_beside, request.part))
    return cloud_set(points, labels, names, read_classes(root / "shape_names.txt"))


def _names_beside(part: Part, path: Path, count: int) -> list[str]:
    """Names of the shapes of an h5 file, from the list next to it if there is one."""
    number = path.stem.removeprefix(f"ply_data_{part}")
    listing = path.with_name(f"ply_data_{part}_{number}_id2file.json")
    if not listing.is_file():
        return numbered(path, count)
    return [Path(entry).stem for entry in json.loads(listing.read_text(encoding="utf-8"))]


def _read_resampled(root: Path, request: Request) -> CloudSet:
    names_file = max(root.glob("modelnet*_shape_names.txt"))  # the list of ModelNet10 is in the same folder
    classes = read_classes(names_file)
    names = read_classes(names_file.with_name(names_file.name.replace("shape_names", request.part)))
    paths = [root / name.rpartition("_")[0] / f"{name}.txt" for name in names]
    points = stacked([read_rows(path, request.points) for path in paths], request.points, paths)
    return cloud_set(points, [classes.index(path.parent.name) for path in paths], names, classes)


def _read_folders(root: Path, request: Request) -> CloudSet:
    classes = tuple(
        sorted(folder.parent.name for folder in root.glob(f"*/{request.part}") if folder.is_dir())
    )
    paths = [path for name in classes for path in sorted((root / name / request.part).iterdir())]
    paths = found([path for path in paths if path.suffix.lower() in CLOUD_SUFFIXES], root, request.part)
    clouds = [read_cloud(path, mesh_points=request.points) for path in paths]
    points = stacked(clouds, request.points, paths)
    labels = [classes.index(path.parent.parent.name) for path in paths]
    return cloud_set(points, labels, [path.stem for path in paths], classes)


def _read_geometric(root: Path, request: Request) -> CloudSet:
    path = root / "processed" / ("test.pt" if request.part == "test" else "training.pt")
    data, slices = _load_geometric(path)
    points = []
    for index in range(len(slices["pos"]) - 1):
        pos = data["pos"][slices["pos"][index] : slices["pos"][index + 1]].numpy()
        if "face" in data:
            faces = data["face"][:, slices["face"][index] : slices["face"][index + 1]].numpy().T
            rng = np.random.default_rng(index)
            pos = sample_surface(Mesh(pos, faces), request.points, generator=rng)[0]
        points.append(_checked(pos, index, path))
    labels = data["y"].reshape(-1).numpy()
    names = [f"{path.stem}_{index:05d}" for index in range(len(points))]
    whole = stacked(points, request.points, [f"{path}, cloud {index}" for index in range(len(points))])
    return cloud_set(whole, labels, names, _geometric_classes(root, labels))


def _load_geometric(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Contents of a saved `InMemoryDataset`: joined tensors and the start of each example."""
    geometric = optional("torch_geometric.data", "torch-geometric")
    try:
        with torch.serialization.safe_globals([geometric.Data]):
            data, slices, *_ = torch.load(path, weights_only=True)
        return {key: data[key] for key in ("pos", "y", "face") if data.get(key) is not None}, slices
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except (OSError, EOFError, RuntimeError, ValueError, TypeError, pickle.UnpicklingError) as error:
        # torch's message may suggest loading the file unsafely.
        reason = str(error).partition("\n")[0] if isinstance(error, OSError) else type(error).__name__
        raise DataError(f"{path}: not what torch_geometric.datasets.ModelNet saves ({reason})") from None


def _geometric_classes(root: Path, labels: NDArray[Any]) -> tuple[str, ...]:
    """Names of the sorted raw folders; without these, ModelNet10 or ModelNet40 by the number of classes."""
    raw = sorted(folder.name for folder in (root / "raw").glob("*/"))
    return tuple(raw) or (
        MODELNET10_CLASSES if labels.max() < len(MODELNET10_CLASSES) else MODELNET40_CLASSES
    )


def _read_if_defense(path: Path, request: Request) -> CloudSet:
    arrays = read_npz(path)
    require(arrays, (f"{request.part}_pc", f"{request.part}_label"), path)
    points = first(batch_of(arrays[f"{request.part}_pc"], path), request.points, path)
    targets = arrays.get("target_label") if request.part == "test" else None
    names = numbered(path, len(points))
    return cloud_set(points, arrays[f"{request.part}_label"], names, MODELNET40_CLASSES, targets)


def _is_if_defense(root: Path) -> bool:
    if not root.is_file() or root.suffix != ".npz" or not zipfile.is_zipfile(root):
        return False
    with zipfile.ZipFile(root) as archive:
        return not {"test_pc.npy", "train_pc.npy"}.isdisjoint(archive.namelist())


def _is_modelnet40_hdf5(root: Path) -> bool:
    return any(root.glob("ply_data_*.h5")) and not shapenet_part.is_hdf5(root)


LAYOUTS = {
    "packed": Layout(
        lambda root: any(root.glob("train_*.npz")) or (root / "test.npz").is_file(), _read_packed, "z"
    ),
    "modelnet40_ply_hdf5_2048": Layout(_is_modelnet40_hdf5, _read_hdf5, "y"),
    "modelnet40_normal_resampled": Layout(
        lambda root: any(root.glob("modelnet*_shape_names.txt")), _read_resampled, "y"
    ),
    "torch_geometric": Layout(lambda root: any(root.glob("processed/*.pt")), _read_geometric, "z"),
    "CLASS/train|test/*": Layout(
        lambda root: any(root.glob("*/train")) or any(root.glob("*/test")), _read_folders, None
    ),
    "IF-Defense npz": Layout(_is_if_defense, _read_if_defense, "y"),
    "ModelNet40-C": Layout(
        modelnet_c.is_modelnet40_c, modelnet_c.read_modelnet40_c, "y", ("test",), variants=True
    ),
    "ModelNet-C": Layout(modelnet_c.is_modelnet_c, modelnet_c.read_modelnet_c, "y", ("test",), variants=True),
    "ScanObjectNN": Layout(
        scanobjectnn.is_scanobjectnn, scanobjectnn.read_scanobjectnn, "y", variants=True, background=True
    ),
    "shapenet_part_seg_hdf5_data": Layout(
        shapenet_part.is_hdf5, shapenet_part.read_hdf5, "y", ("train", "val", "test")
    ),
    "shapenetcore_partanno_segmentation_benchmark_v0_normal": Layout(
        shapenet_part.is_text, shapenet_part.read_text, "y", ("train", "val", "test")
    ),
    ".npz or .h5 with points and labels": Layout(is_labelled_arrays, read_labelled_arrays, None, ("test",)),
}
"""Layouts by name; the first match is used."""


def _checked(points: NDArray[Any], index: int, path: Path) -> NDArray[np.float64]:
    with naming(path):
        return checked_points(points, f"cloud {index}, ")
