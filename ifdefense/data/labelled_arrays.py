"""Labelled clouds of your own in one .npz or .h5 file.

The file has an array of clouds ``(S, N, 3)`` under one of the usual names (`CLOUD_KEYS`) and one of labels
``(S,)`` (`LABEL_KEYS`): integers from 0, or names of classes. Optional are ``classes``, the names of the
classes, and ``target``, the classes at which targeted attacks aim.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ifdefense.data.cloudset import CloudSet
from ifdefense.data.errors import DataError
from ifdefense.data.formats.arrays import CLOUD_KEYS, Arrays, is_packed, read_npz
from ifdefense.data.packed import require
from ifdefense.data.parts import Request, batch_of, cloud_set, first, numbered, read_hdf5_arrays

LABEL_KEYS = ("label", "labels", "y")
"""Usual names of the array of labels."""

SUFFIXES = (".npz", ".h5", ".hdf5")


def is_labelled_arrays(root: Path) -> bool:
    """Whether this is a file that may hold arrays of clouds and labels."""
    return root.is_file() and root.suffix.lower() in SUFFIXES


def read_labelled_arrays(path: Path, request: Request) -> CloudSet:
    """Reads the clouds and labels of a file; all points by default.

    Raises:
        DataError: if an array is missing, ambiguous or unusable.
    """
    arrays = read_npz(path) if path.suffix.lower() == ".npz" else read_hdf5_arrays(path)
    if is_packed(arrays):
        raise DataError(f"{path}: a packed file has no names of classes: give its folder")
    clouds, labels = (_one_of(keys, arrays, path) for keys in (CLOUD_KEYS, LABEL_KEYS))
    points = batch_of(arrays[clouds], path)
    if request.num_points is not None:
        points = first(points, request.num_points, path)
    names = _strings(arrays["classes"]) if "classes" in arrays else None
    numbers, classes = _numbered(arrays[labels].reshape(-1), names, f"{path}: {labels}")
    return cloud_set(points, numbers, numbered(path, len(points)), classes, arrays.get("target"))


def _one_of(keys: tuple[str, ...], arrays: Arrays, path: Path) -> str:
    """The only one of these keys that the file has."""
    there = [key for key in keys if key in arrays]
    if len(there) > 1:
        raise DataError(f"{path}: it holds {' and '.join(there)}, of which only one may be there")
    if not there:
        require(arrays, (" or ".join(keys),), path)
    return there[0]


def _strings(values: NDArray[Any]) -> NDArray[np.str_]:
    """Text as str; HDF5 stores it as bytes."""
    flat = values.reshape(-1)
    return np.array([text.decode() if isinstance(text, bytes) else str(text) for text in flat], dtype=np.str_)


def _numbered(
    labels: NDArray[Any], names: NDArray[np.str_] | None, where: str
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels as indices, and the names of the classes: without names, their numbers."""
    if labels.dtype.kind in "iu":
        count = int(labels.max(initial=-1)) + 1
        return labels.astype(np.int64), tuple(map(str, range(count)) if names is None else names)
    if labels.dtype.kind not in "USO":
        raise DataError(f"{where} must be integers or names of classes, got {labels.dtype}")
    texts = _strings(labels)
    names = np.unique(texts) if names is None else names
    unknown = sorted(set(map(str, texts)) - set(map(str, names)))
    if unknown:
        raise DataError(f"{where}: {unknown[0]!r} is not among the classes {', '.join(names)}")
    index = {str(name): number for number, name in enumerate(names)}
    return np.array([index[str(text)] for text in texts], dtype=np.int64), tuple(map(str, names))
