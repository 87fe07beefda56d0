"""NumPy's .npy and .npz: arrays of one or several clouds; pickles are never loaded.

An array is ``(N, C)`` for one cloud and ``(S, N, C)`` for several; C is 3 or more and columns after the third
are fields. Other arrays with a row per point are fields too; the rest belong to the file and are kept.
"""

from __future__ import annotations

import dataclasses
import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ifdefense.data.errors import DataError
from ifdefense.data.formats.table import (
    CloudFile,
    FileLayout,
    Options,
    PointTable,
    checked_points,
    find_coordinates,
    needs_double,
    plain_strings,
    short,
    warn_lost,
)

CLOUD_KEYS = ("points", "test_pc", "train_pc", "data", "pc")
"""Usual names of an array of clouds: this project's, IF-Defense's, and those of other npz and h5 files."""

CLOUD_STEP = 1.02 / 32767
"""Length of one int16 step in this project's packed files, which reach to 1.02."""

MAX_RATIO = 1100
"""Largest compression ratio of Deflate."""

Arrays = dict[str, NDArray[Any]]


def decode_npy(data: bytes, options: Options) -> CloudFile:
    """Reads the array of an .npy file.

    Raises:
        DataError: if the file is damaged, holds Python objects or no clouds.
    """
    return clouds_of({"points": load_npy(data, options)}, options, "npy")


def decode_npz(data: bytes, options: Options) -> CloudFile:
    """Reads the arrays of an .npz file; errors as `decode_npy`."""
    return clouds_of(load_npz(data, options), options, "npz")


def load_npy(data: bytes, options: Options) -> NDArray[Any]:
    """Array of an .npy file; its size is checked against the header.

    Raises:
        DataError: if the file is damaged, too large, or holds Python objects.
    """
    shape, fortran, dtype, start = _npy_header(io.BytesIO(data))
    count = math.prod(shape)
    options.check_bytes(count * dtype.itemsize)
    if count * dtype.itemsize != len(data) - start:
        raise short(count * dtype.itemsize, len(data) - start, "bytes")
    flat: NDArray[Any] = np.frombuffer(data, dtype, count, start) if count else np.zeros(0, dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, order and dtype declared by the header of an .npy file, and the offset of the array."""
    start = file.read(6)
    if start != b"\x93NUMPY":
        raise DataError(f"not an npy file: it starts with {start!r}")
    version = tuple(file.read(2))
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise DataError("not a complete npy file: it has no known version")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    try:
        shape, fortran, dtype = read(file)
    except Exception as error:  # a damaged header may raise any parser error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"not a complete npy file: its header cannot be read: {reason}") from None
    if dtype.hasobject:
        raise DataError("it holds pickled Python objects, which can run code and are never read")
    if any(size < 0 for size in shape):
        raise DataError(f"not a complete npy file: it declares the shape {shape}")
    return shape, fortran, dtype, file.tell()


def load_npz(data: bytes, options: Options) -> Arrays:
    """Arrays of an .npz file; sizes are checked before unpacking.

    Raises:
        DataError: if the file is damaged or too large, or an array holds Python objects.
    """
    if not data.startswith(b"PK"):
        raise DataError(f"not an npz file: it starts with {data[:6]!r}")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            if not members:
                raise DataError("there are no arrays in it: it is another kind of zip file")
            for info in members:
                _check_member(archive, info)
            options.check_bytes(sum(info.file_size for info in members))
            return {
                info.filename.removesuffix(".npy"): load_npy(archive.read(info), options) for info in members
            }
    except DataError:
        raise
    except MemoryError:
        raise DataError("there is not enough memory to unpack it") from None
    except Exception as error:  # zipfile and zlib fail in many ways on a damaged file
        raise DataError(f"not a complete npz file: {error}") from error


def _check_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Compares the declared size of an array with its size in the archive."""
    with archive.open(info) as file:
        try:
            shape, _, dtype, start = _npy_header(file)
        except DataError as error:
            raise DataError(f"{info.filename}: {error}") from None
    size = math.prod(shape) * dtype.itemsize
    if size + start != info.file_size:
        raise DataError(f"{info.filename}: {short(size, info.file_size - start, 'bytes')}")
    deflated = info.compress_type == zipfile.ZIP_DEFLATED
    if deflated and info.file_size > MAX_RATIO * (info.compress_size + 1):
        raise DataError(f"{info.filename}: {short(info.file_size, info.compress_size, 'bytes')} (packed)")


def clouds_of(arrays: Arrays, options: Options, kind: str) -> CloudFile:
    """The clouds among the arrays of a file.

    Raises:
        DataError: if there are none, or several candidates.
    """
    key = _key(arrays, options.key)
    found = arrays[key]
    if found.dtype.names:
        batch, columns, named = _structured(found, key)
    else:
        if is_packed(arrays) and key == "points":
            found = unpack_points(found)
        batch, columns, named = _matrix(found, key), [], False
    count, size = batch.shape[:2]
    options.check_points(count * size)
    columns = columns or [*"xyz", *(f"column_{index}" for index in range(3, batch.shape[2]))]
    chosen = find_coordinates(columns, options.columns or (None if named else ("0", "1", "2")))
    coordinates = (columns[chosen[0]], columns[chosen[1]], columns[chosen[2]])
    batched = found.ndim == (2 if named else 3)
    others = {name: values for name, values in arrays.items() if name != key and name not in CLOUD_KEYS}
    beside = {name for name, values in others.items() if _per_point(values, batch, batched)}
    beside -= {name for name in beside if name in columns}
    clouds = []
    for number, rows in enumerate(batch):
        points = checked_points(_real(rows, chosen), f"cloud {number}, " if batched else "")
        fields = {name: _column(rows, index) for index, name in enumerate(columns) if index not in chosen}
        fields |= {name: arrays[name][number] if batched else arrays[name] for name in sorted(beside)}
        clouds.append(PointTable(points, fields))
    kinds = [_column(batch[0], index).dtype for index in chosen]
    layout = FileLayout(
        kind=kind,
        columns=tuple(columns),
        coordinates=coordinates,
        key=key,
        named=named,
        single=all(dtype.kind == "f" and dtype.itemsize <= 4 for dtype in kinds),
        batched=batched,
    )
    extras = {name: values for name, values in arrays.items() if name != key and name not in beside}
    return CloudFile(clouds, layout, extras)


def _key(arrays: Mapping[str, object], wanted: str | None) -> str:
    names = ", ".join(sorted(arrays)) or "nothing"
    if wanted is not None:
        if wanted not in arrays:
            raise DataError(f"no array {wanted} in it; it holds {names}")
        return wanted
    known = [key for key in CLOUD_KEYS if key in arrays]
    if len(known) > 1:
        raise DataError(f"{' and '.join(known)} may be the clouds; key (--key) says which")
    if known or len(arrays) == 1:
        return (known or list(arrays))[0]
    raise DataError(
        f"no array of clouds ({', '.join(CLOUD_KEYS)}) in it; it holds {names}; key (--key) says which"
    )


def _matrix(found: NDArray[Any], key: str) -> NDArray[Any]:
    """The array as ``(S, N, C)``."""
    if found.ndim not in (2, 3) or found.shape[-1] < 3 or 0 in found.shape:
        raise DataError(f"{key} must be (N, 3) or (S, N, 3) and not empty, got {found.shape}")
    if found.dtype.kind not in "fiu":
        raise DataError(f"{key} must be real numbers, got {found.dtype}")
    rows, columns = found.shape[-2:]
    if columns > 3 and rows <= 9 and columns > 2 * rows:
        raise DataError(f"{key} has the shape {found.shape}: points must be rows, this looks transposed")
    return found[None] if found.ndim == 2 else found


def _structured(found: NDArray[Any], key: str) -> tuple[NDArray[Any], list[str], bool]:
    """An array of records as ``(S, N)``, and the names of its columns."""
    if found.ndim not in (1, 2) or 0 in found.shape:
        raise DataError(f"{key} must be (N,) or (S, N) records and not empty, got {found.shape}")
    return (found[None] if found.ndim == 1 else found), list(found.dtype.names or ()), True


def _column(rows: NDArray[Any], index: int) -> NDArray[Any]:
    """One column of a matrix or of records."""
    return rows[rows.dtype.names[index]] if rows.dtype.names else rows[:, index]


def _real(rows: NDArray[Any], chosen: tuple[int, int, int]) -> NDArray[np.float64]:
    axes = [_column(rows, index) for index in chosen]
    if any(axis.ndim != 1 or axis.dtype.kind not in "fiu" for axis in axes):
        raise DataError("the columns of x, y and z must be real numbers")
    with np.errstate(invalid="ignore"):  # a damaged NaN
        return np.stack([axis.astype(np.float64) for axis in axes], axis=1)


def _per_point(values: NDArray[Any], batch: NDArray[Any], batched: bool) -> bool:
    """Whether an array has a row per point."""
    leading = batch.shape[:2] if batched else batch.shape[1:2]
    return (
        values.shape[: len(leading)] == leading
        and values.ndim - len(leading) in (0, 1)
        and values.dtype.names is None
    )


def is_packed(arrays: Mapping[str, NDArray[Any]]) -> bool:
    """Whether these are the arrays of one of this project's packed files, with int16 coordinates."""
    return {"points", "label", "name"} <= arrays.keys() and arrays["points"].dtype == np.int16


def unpack_points(steps: NDArray[np.int16]) -> NDArray[np.float32]:
    """Converts the int16 coordinates of a packed file to lengths."""
    return steps.astype(np.float32) * np.float32(CLOUD_STEP)


def arrays_of(file: CloudFile, kind: str) -> Arrays:
    """Arrays to write, clouds first.

    Raises:
        ValueError: if clouds of one array differ in size.
    """
    sizes = sorted({len(cloud.points) for cloud in file.clouds})
    if len(sizes) != 1:
        raise ValueError(f"clouds written together must have the same number of points, got {sizes}")
    layout = file.layout
    if layout.kind not in ("npy", "npz", "h5"):
        layout = dataclasses.replace(file.laid_out(kind), named=False)
    batched = layout.batched or len(file.clouds) > 1
    columns = list(layout.columns)
    if kind == "npy" and file.layout.kind != "npy":
        columns += [name for name in file.clouds[0].fields if name not in columns]
    parts = [_joined(cloud, layout.coordinates, columns, layout) for cloud in file.clouds]
    arrays = {layout.key: np.stack(parts) if batched else parts[0]}
    rest = [name for name in file.clouds[0].fields if name not in columns]
    if kind == "npy":
        warn_lost([*rest, *file.extras], kind)
        return arrays
    for name in rest:
        values = [plain_strings(np.asarray(cloud.fields[name])) for cloud in file.clouds]
        arrays[name] = np.stack(values) if batched else values[0]
    return arrays | dict(file.extras)


def _joined(
    cloud: PointTable, coordinates: tuple[str, str, str], columns: list[str], layout: FileLayout
) -> NDArray[Any]:
    """Coordinates and fields as one array: a matrix, or records if the file had records."""
    single = layout.single and not needs_double(cloud.points)
    points = cloud.points.astype(np.float32) if single else cloud.points
    parts: list[tuple[str, NDArray[Any]]] = []
    for name in columns:
        if name in coordinates:
            parts.append((name, points[:, coordinates.index(name)]))
        elif name in cloud.fields:
            parts.append((name, np.asarray(cloud.fields[name])))
    if layout.named:
        records = np.empty(len(points), [(name, values.dtype, values.shape[1:]) for name, values in parts])
        for name, values in parts:
            records[name] = values
        return records
    warn_lost([name for name, values in parts if values.dtype.kind not in "fiub"], "npy matrix")
    return np.column_stack([values for _, values in parts if values.dtype.kind in "fiub"])


def encode_npy(file: CloudFile, suffix: str) -> bytes:
    """One array; other arrays are dropped with a warning."""
    (array,) = arrays_of(file, "npy").values()
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def encode_npz(file: CloudFile, suffix: str) -> bytes:
    """Clouds and all other arrays, compressed."""
    buffer = io.BytesIO()
    arrays = {name: plain_strings(values) for name, values in arrays_of(file, "npz").items()}
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, values in arrays.items():  # np.savez takes no array of the name "file"
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy.write_array(member, values, allow_pickle=False)
    return buffer.getvalue()


def read_npz(path: str | Path, options: Options | None = None) -> Arrays:
    """All arrays of an npz file on disk; pickles are never loaded.

    Raises:
        DataError: if the file is missing, truncated, not an npz file, or holds pickled objects.
    """
    from ifdefense.data.formats.files import naming, read_bytes

    options = options or Options()
    with naming(path):
        return load_npz(read_bytes(path, options), options)
