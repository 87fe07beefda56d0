"""ScanObjectNN, scans of objects indoors (Uy et al., arXiv:1908.04616).

``h5_files`` contains ``main_split`` and ``main_split_nobg``, each with ``training_VARIANT.h5`` and
``test_VARIANT.h5``, which have ``data``, ``label`` and ``mask`` (-1 for the background). y is up
(https://github.com/hkust-vgd/scanobjectnn/issues/33); names of classes and variants are those of
https://github.com/hkust-vgd/scanobjectnn and its ``training_data/README.md``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ifdefense.data.cloudset import CloudSet
from ifdefense.data.errors import DataError
from ifdefense.data.packed import require
from ifdefense.data.parts import (
    Request,
    batch_of,
    chosen,
    cloud_set,
    found,
    numbered,
    read_hdf5_arrays,
    stacked,
)

# fmt: off
CLASSES = (
    "bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed", "pillow",
    "sink", "sofa", "toilet",
)
# fmt: on

VARIANTS = {
    "OBJ_BG": "objectdataset",
    "PB_T25": "objectdataset_augmented25_norot",
    "PB_T25_R": "objectdataset_augmented25rot",
    "PB_T50_R": "objectdataset_augmentedrot",
    "PB_T50_RS": "objectdataset_augmentedrot_scale75",
}
"""File names by the names in the paper; both are accepted. Other variants only have a file name."""

PREFIX = {"train": "training_", "test": "test_"}


def is_scanobjectnn(root: Path) -> bool:
    """Whether a folder is a split of ScanObjectNN or contains the splits."""
    return any(root.glob("*_objectdataset*.h5")) or any(root.glob("main_split*/*_objectdataset*.h5"))


def read_scanobjectnn(root: Path, request: Request) -> CloudSet:
    """Reads one variant, such as ``"PB_T50_RS"``; ``nobg`` files or the mask remove the background."""
    split = root if any(root.glob("*_objectdataset*.h5")) else root / "main_split"
    if request.background or split.name.endswith("_nobg"):
        path, masked = _file(split, request), False
    else:
        bare = split.with_name(f"{split.name}_nobg")
        path, masked = _file(split, request), True
        if (bare / path.name).is_file():
            path, masked = bare / path.name, False
    arrays = read_hdf5_arrays(path)
    require(arrays, ("data", "label", *(("mask",) if masked else ())), path)
    points, labels = batch_of(arrays["data"], path), arrays["label"].reshape(-1)
    names = numbered(path, len(points))
    clouds = list(points)
    if masked:
        mask = arrays["mask"]
        if mask.shape != points.shape[:2]:
            raise DataError(f"{path}: mask must be {points.shape[:2]}, one number a point, got {mask.shape}")
        clouds = [cloud[kept] for cloud, kept in zip(points, mask != -1, strict=True)]
    cut = stacked(clouds, request.points, [f"{path}, {name}" for name in names])
    return cloud_set(cut, labels.astype(np.int64), names, CLASSES)


def _file(split: Path, request: Request) -> Path:
    """File of a variant, by its name in the paper or its file name."""
    prefix = PREFIX[request.part]
    paths = found(sorted(split.glob(f"{prefix}objectdataset*.h5")), split, request.part)
    titles = {stem: title for title, stem in VARIANTS.items()}
    stems = {path.stem.removeprefix(prefix): path for path in paths}
    variant = None if request.variant is None else titles.get(request.variant, request.variant)
    return chosen({titles.get(stem, stem): path for stem, path in stems.items()}, variant, split)
