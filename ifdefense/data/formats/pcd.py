"""The Point Cloud Library's .pcd: ascii, binary and (for reading) binary_compressed."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ifdefense.data.errors import DataError
from ifdefense.data.formats.files import without_mark
from ifdefense.data.formats.table import (
    CloudFile,
    Columns,
    FileLayout,
    Options,
    declared,
    short,
    stored_coordinates,
    table_of,
    warn_lost,
)

KIND = "pcd"
KEYS = ("VERSION", "FIELDS", "SIZE", "TYPE", "COUNT", "WIDTH", "HEIGHT", "VIEWPOINT", "POINTS", "DATA")


def decode(data: bytes, options: Options) -> CloudFile:
    """Reads the points with all their fields; points without coordinates (NaN) are dropped with a warning.

    Raises:
        DataError: if the file is damaged or its size differs from the header.
    """
    header, body = _header(without_mark(data))
    dtype = _dtype(header)
    count = declared(header["POINTS"][0], "points")
    size = declared(header["WIDTH"][0], "columns") * declared(header["HEIGHT"][0], "rows")
    if size != count:
        raise DataError(f"the file is damaged: WIDTH x HEIGHT is {size}, POINTS {count}")
    options.check_points(count)
    options.check_bytes(count * dtype.itemsize)
    form = header["DATA"][0]
    if form == "ascii":
        columns = _ascii(body, dtype, count)
    elif form == "binary":
        columns = _binary(body, dtype, count)
    elif form == "binary_compressed":
        columns = _compressed(body, dtype, count)
    else:
        raise DataError(f"not a pcd file: DATA {form}")
    columns = {name: values for name, values in columns.items() if not name.startswith("\0")}
    table, coordinates, _ = table_of(columns, options, drop_missing=True)
    single = all(dtype[name].base == np.float32 for name in coordinates)
    layout = FileLayout(
        kind=KIND,
        columns=tuple(columns),
        coordinates=coordinates,
        named=True,
        text=form == "ascii",
        single=single,
        viewpoint=" ".join(header.get("VIEWPOINT", ["0 0 0 1 0 0 0"])),
    )
    return CloudFile([table], layout)


def _header(data: bytes) -> tuple[dict[str, list[str]], bytes]:
    header: dict[str, list[str]] = {}
    start = 0
    if b"\n" not in data:
        data = data.replace(b"\r", b"\n")
    while "DATA" not in header:
        end = data.find(b"\n", start)
        if end < 0 or end - start > 1 << 16:
            raise DataError("not a complete pcd file: its header does not end with DATA")
        line = data[start:end].decode("latin-1").strip()
        start = end + 1
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        words[0] = "FIELDS" if words[0] == "COLUMNS" else words[0]  # as in version .5
        if words[0] not in KEYS or words[0] in header or len(words) == 1:
            raise DataError(f"not a pcd file: its header has the line {line[:60]!r}")
        header[words[0]] = words[1:]
    for key in ("FIELDS", "SIZE", "TYPE", "WIDTH", "HEIGHT"):
        if key not in header:
            raise DataError(f"not a pcd file: its header has no {key}")
    header.setdefault("COUNT", ["1"] * len(header["FIELDS"]))
    size = declared(header["WIDTH"][0], "columns") * declared(header["HEIGHT"][0], "rows")
    header.setdefault("POINTS", [str(size)])
    return header, data[start:]


def _dtype(header: dict[str, list[str]]) -> np.dtype[np.void]:
    lengths = {len(header[key]) for key in ("FIELDS", "SIZE", "TYPE", "COUNT")}
    if len(lengths) != 1:
        raise DataError("not a pcd file: FIELDS, SIZE, TYPE and COUNT differ in length")
    fields: list[tuple[Any, ...]] = []
    rows = zip(header["FIELDS"], header["SIZE"], header["TYPE"], header["COUNT"], strict=True)
    for index, (name, size, kind, word) in enumerate(rows):
        code = f"{kind.lower()}{size}"
        if kind not in "IUF" or code not in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8"):
            raise DataError(f"not a pcd file: field {name} has type {kind} of size {size}")
        count = declared(word, f"values of field {name}")
        if not 1 <= count <= 1 << 16:
            raise DataError(f"not a pcd file: field {name} has {count} values")
        unique = f"\0{index}" if name == "_" else name  # padding
        fields.append((unique, f"<{code}") if count == 1 else (unique, f"<{code}", (count,)))
    try:
        return np.dtype(fields)
    except ValueError as error:  # the same name twice
        raise DataError(f"not a pcd file: {error}") from None


def _ascii(body: bytes, dtype: np.dtype[np.void], count: int) -> Columns:
    try:
        lines = [line for line in body.decode("ascii").splitlines() if line.partition("#")[0].strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"not an ascii pcd file: {error}") from None
    if len(lines) != count:
        raise short(count, len(lines), "points")
    rows = [line.split() for line in lines]
    names = dtype.names or ()
    widths = [int(np.prod(dtype[name].shape, dtype=int)) for name in names]
    for row, words in enumerate(rows):
        if len(words) != sum(widths):
            raise DataError(
                f"the file is truncated or damaged: point {row} has {len(words)} values, not {sum(widths)}"
            )
    columns: Columns = {}
    start = 0
    for name, width in zip(names, widths, strict=True):
        kind = dtype[name].base
        if kind.kind == "f" and name in ("x", "y", "z"):
            kind = np.dtype(np.float64)  # all written digits are kept
        read = float if kind.kind == "f" else _whole
        try:
            cells = [[read(word) for word in words[start : start + width]] for words in rows]
            values = np.array(cells, dtype=kind).reshape(count, width)
        except (ValueError, OverflowError) as error:
            raise DataError(f"the file is damaged: field {name}: {error}") from None
        columns[name] = values[:, 0] if width == 1 else values
        start += width
    return columns


def _whole(word: str) -> int:
    """Parses a whole number, also as NumPy's savetxt writes it (7.000000e+00)."""
    try:
        return int(word)
    except ValueError:
        value = float(word)
        if not value.is_integer():
            raise
        return int(value)


def _binary(body: bytes, dtype: np.dtype[np.void], count: int) -> Columns:
    size = count * dtype.itemsize
    if len(body) < size:
        raise short(count, len(body) // dtype.itemsize, "points")
    if body[size:].strip(b"\0\r\n"):
        raise DataError(f"the file is damaged: {len(body) - size} bytes follow what its header declares")
    table = np.frombuffer(body, dtype, count)
    return {name: np.ascontiguousarray(table[name]) for name in dtype.names or ()}


def _compressed(body: bytes, dtype: np.dtype[np.void], count: int) -> Columns:
    """Fields one after another, compressed with LZF."""
    if len(body) < 8:
        raise DataError("the file is truncated: it ends before its points")
    packed, unpacked = struct.unpack_from("<II", body)
    if packed > len(body) - 8:
        raise short(packed, len(body) - 8, "bytes")
    if unpacked != count * dtype.itemsize:
        raise DataError(f"the file is damaged: {unpacked} bytes for {count} points of {dtype.itemsize}")
    data = unpack_lzf(body[8 : 8 + packed], unpacked)
    columns: Columns = {}
    start = 0
    for name in dtype.names or ():
        field = dtype[name]
        values = np.frombuffer(data, field.base, count * field.itemsize // field.base.itemsize, start)
        columns[name] = values.reshape((count, *field.shape)).copy()
        start += count * field.itemsize
    return columns


def unpack_lzf(data: bytes, size: int) -> bytes:
    """Unpacks LZF (Marc Lehmann's liblzf), as PCL writes it.

    Args:
        data: packed bytes.
        size: length of the result.

    Raises:
        DataError: if the bytes are damaged or the length differs.
    """
    out = bytearray()
    at, end = 0, len(data)
    try:
        while at < end:
            control = data[at]
            at += 1
            if control < 32:  # a literal run
                if at + control + 1 > end:
                    raise DataError("the file is damaged: its packed points end within a run")
                out += data[at : at + control + 1]
                at += control + 1
            else:  # a back reference
                length = control >> 5
                if length == 7:
                    length += data[at]
                    at += 1
                back = ((control & 31) << 8) + data[at] + 1
                at += 1
                length += 2
                start = len(out) - back
                if start < 0:
                    raise DataError("the file is damaged: its packed points refer to before their start")
                while length > 0:  # a copy may overlap itself
                    piece = out[start : start + length]
                    out += piece
                    start += len(piece)
                    length -= len(piece)
            if len(out) > size:
                break
    except IndexError:
        raise DataError("the file is damaged: its packed points end too early") from None
    if len(out) != size:
        raise short(size, len(out), "bytes")
    return bytes(out)


def encode(file: CloudFile, suffix: str) -> bytes:
    """Encodes as binary, or as ascii if the source was."""
    (table,) = file.clouds
    layout = file.laid_out(KIND)
    coordinates = stored_coordinates(table, layout)
    order = [*layout.columns, *(name for name in table.fields if name not in layout.columns)]
    columns: Columns = {}
    lost = []
    for name in order:
        if name in layout.coordinates:
            columns[name] = coordinates[:, layout.coordinates.index(name)]
        elif name in table.fields:
            values = table.fields[name]
            word = "_".join(name.split()) or "column"
            while word in columns or word in layout.coordinates:
                word += "_"
            if values.dtype.kind not in "fiub":
                lost.append(name)
            else:
                columns[word] = _storable(values)
    warn_lost(lost, KIND)
    return _encode(columns, len(table.points), layout)


def _encode(columns: Columns, count: int, layout: FileLayout) -> bytes:
    sizes = [str(values.dtype.itemsize) for values in columns.values()]
    kinds = [values.dtype.kind.upper() for values in columns.values()]
    counts = [str(values.shape[1] if values.ndim == 2 else 1) for values in columns.values()]
    header = (
        "# .PCD v0.7 - Point Cloud Data file format\nVERSION 0.7\n"
        f"FIELDS {' '.join(columns)}\nSIZE {' '.join(sizes)}\nTYPE {' '.join(kinds)}\n"
        f"COUNT {' '.join(counts)}\nWIDTH {count}\nHEIGHT 1\nVIEWPOINT {layout.viewpoint}\n"
        f"POINTS {count}\nDATA {'ascii' if layout.text else 'binary'}\n"
    ).encode()
    if layout.text:
        flat = [part for values in columns.values() for part in (values.T if values.ndim == 2 else [values])]
        cells = [[str(value) for value in part] for part in flat]
        return header + "".join(" ".join(row) + "\n" for row in zip(*cells, strict=True)).encode("ascii")
    fields: list[tuple[Any, ...]] = [
        (name, values.dtype.newbyteorder("<"), values.shape[1:]) for name, values in columns.items()
    ]
    rows = np.empty(count, np.dtype(fields))
    for name, values in columns.items():
        rows[name] = values
    return header + rows.tobytes()


def _storable(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """Converts values to a type of the format."""
    if values.dtype.kind == "b":
        return values.astype(np.uint8)
    if values.dtype.kind == "f" and values.dtype.itemsize not in (4, 8):
        return values.astype(np.float32 if values.dtype.itemsize < 4 else np.float64)
    return values
