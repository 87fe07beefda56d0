"""Corrupted versions of ModelNet40's test set: ModelNet40-C and ModelNet-C.

ModelNet40-C (Sun et al., arXiv:2201.12296): ``data_CORRUPTION_SEVERITY.npy``, ``data_original.npy`` and
``label.npy``. ModelNet-C (Ren et al., arXiv:2202.03377): ``clean.h5`` and ``CORRUPTION_LEVEL.h5``. Both are
made from ``modelnet40_ply_hdf5_2048``, so they are y up (``data/generate_c.py`` of jiachens/ModelNet40-C,
``build/corrupt.py`` of ldkong1205/PointCloud-C). Points added by a corruption come last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ifdefense.data.cloudset import CloudSet
from ifdefense.data.errors import DataError
from ifdefense.data.packed import require
from ifdefense.data.parts import (
    MODELNET40_CLASSES,
    Request,
    batch_of,
    chosen,
    cloud_set,
    numbered,
    read_array,
    read_hdf5_arrays,
)

CORRUPTIONS = (
    "add_global",
    "add_local",
    "dropout_global",
    "dropout_local",
    "jitter",
    "rotate",
    "scale",
)
"""Corruptions of ModelNet-C, each in levels from 0."""


def is_modelnet40_c(root: Path) -> bool:
    """Whether a folder is laid out like ModelNet40-C."""
    return (root / "label.npy").is_file() and any(root.glob("data_*.npy"))


def read_modelnet40_c(root: Path, request: Request) -> CloudSet:
    """Reads one corruption of ModelNet40-C, such as ``"gaussian_3"``, or ``"original"``."""
    variants = {path.stem.removeprefix("data_"): path for path in root.glob("data_*.npy")}
    path = chosen(variants, request.variant, root)
    return _labelled(read_array(path), read_array(root / "label.npy"), path, request)


def is_modelnet_c(root: Path) -> bool:
    """Whether a folder is laid out like ModelNet-C."""
    return bool(_levels(root))


def read_modelnet_c(root: Path, request: Request) -> CloudSet:
    """Reads one corruption of ModelNet-C, such as ``"add_global_4"``, or ``"clean"``."""
    path = chosen(_levels(root), request.variant, root)
    arrays = read_hdf5_arrays(path)
    require(arrays, ("data", "label"), path)
    return _labelled(arrays["data"], arrays["label"], path, request)


def _levels(root: Path) -> dict[str, Path]:
    patterns = ["clean.h5", *(f"{corruption}_[0-9].h5" for corruption in CORRUPTIONS)]
    return {path.stem: path for pattern in patterns for path in root.glob(pattern)}


def _labelled(clouds: NDArray[Any], labels: NDArray[Any], path: Path, request: Request) -> CloudSet:
    """All points, or the same random rows of every cloud: the first rows may be uncorrupted."""
    points = batch_of(clouds, path)
    size = points.shape[1]
    if request.num_points is not None:
        if size < request.num_points:
            raise DataError(f"{path}: its clouds have {size} points, {request.num_points} are asked for")
        rows = np.random.default_rng(0).choice(size, request.num_points, replace=False)
        points = points[:, np.sort(rows)]
    return cloud_set(points, labels, numbered(path, len(points)), MODELNET40_CLASSES)
