"""HDF5 (.h5, .hdf5): arrays of one or several clouds, laid out as in .npz.

External links, external storage and virtual data sets are refused, as they can read arbitrary files.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np

from ifdefense.data.errors import DataError, optional
from ifdefense.data.formats.arrays import Arrays, arrays_of, clouds_of
from ifdefense.data.formats.table import CloudFile, Options, short

KIND = "h5"
MAX_DEPTH = 16


def decode(data: bytes, options: Options) -> CloudFile:
    """Reads the arrays of a file; those in groups have names such as ``scans/points``.

    Raises:
        DataError: if the file is damaged or refers to other files.
        ImportError: if h5py is not installed.
    """
    return clouds_of(load(data, options), options, KIND)


def load(data: bytes, options: Options) -> Arrays:
    """Every array of a file; errors as `decode`."""
    h5py = optional("h5py")
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            datasets: dict[str, Any] = {}
            _collect(h5py, file, "", datasets, 0)
            options.check_bytes(sum(math.prod(d.shape) * d.dtype.itemsize for d in datasets.values()))
            for name, dataset in datasets.items():
                _check_stored(name, dataset, len(data), options)
            return {name: np.asarray(dataset[()]) for name, dataset in datasets.items()}
    except DataError:
        raise
    except MemoryError:
        raise DataError("there is not enough memory to unpack it") from None
    except Exception as error:  # h5py raises many kinds of errors on damaged files
        raise DataError(f"not a complete h5 file: {error}") from error


def _collect(h5py: Any, group: Any, prefix: str, datasets: dict[str, Any], depth: int) -> None:
    """Finds the data sets without following external links."""
    if depth > MAX_DEPTH:
        raise DataError("not a complete h5 file: its groups are nested too deeply")
    for name in group:
        path = f"{prefix}{name}"
        link = group.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            raise DataError(f"{path} is a link to another file, {link.filename}, which is not followed")
        if isinstance(link, h5py.SoftLink):
            continue  # its target is visited on its own
        found = group[name]
        if isinstance(found, h5py.Group):
            _collect(h5py, found, f"{path}/", datasets, depth + 1)
        elif isinstance(found, h5py.Dataset):
            if found.external or found.is_virtual:
                raise DataError(f"{path} is stored in another file, which is not read")
            if found.shape is not None and not _has_references(h5py, found.dtype):
                datasets[path] = found


def _has_references(h5py: Any, dtype: Any) -> bool:
    """Whether the values are Python objects other than strings."""
    return dtype.hasobject and h5py.check_string_dtype(dtype) is None


def _check_stored(name: str, dataset: Any, size: int, options: Options) -> None:
    """Compares the declared size of a data set with its stored size."""
    declared = math.prod(dataset.shape) * dataset.dtype.itemsize
    if dataset.chunks is None:
        if declared > size:
            raise DataError(f"{name}: {short(declared, size, 'bytes')}")
        stored = dataset.id.get_storage_size()
        if declared and stored == 0 and dataset.id.get_create_plist().get_layout() != 0:  # 0 is compact
            raise DataError(f"{name}: {short(declared, 0, 'bytes')}")
        return
    options.check_bytes(math.prod(dataset.chunks) * dataset.dtype.itemsize)
    wanted = math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))
    if dataset.id.get_num_chunks() < wanted:
        raise DataError(f"{name}: {short(wanted, dataset.id.get_num_chunks(), 'chunks')}")


def encode(file: CloudFile, suffix: str) -> bytes:
    """Clouds and all other arrays, compressed.

    The file is built in memory: on a full disk HDF5 crashes or writes zeros.

    Raises:
        ImportError: if h5py is not installed.
    """
    h5py = optional("h5py")
    with h5py.File("in memory", "w", driver="core", backing_store=False) as out:
        for name, values in arrays_of(file, KIND).items():
            values = np.asarray(values)
            if values.dtype.kind in "UO":
                values = values.astype(h5py.string_dtype())
            out.create_dataset(name, data=values, compression="gzip" if values.ndim else None)
        out.flush()
        image: bytes = out.id.get_file_image()
    return image
