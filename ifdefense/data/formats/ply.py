"""Stanford .ply: ascii and binary; clouds with any properties, and meshes."""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ifdefense.data.errors import DataError
from ifdefense.data.formats.files import decoded_text, without_mark
from ifdefense.data.formats.table import (
    FILE,
    CloudFile,
    Columns,
    FileLayout,
    Geometry,
    Options,
    declared,
    fan,
    flat_columns,
    logger,
    short,
    table_of,
    warn_lost,
)
from ifdefense.geometry.mesh import Mesh

KIND = "ply"
TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4",
    "float": "f4", "double": "f8",
    "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float32": "f4", "float64": "f8", "int64": "i8", "uint64": "u8",
}  # fmt: skip
NAMES = {code: name for name, code in reversed(list(TYPES.items()))}
ORDERS = {"ascii": "=", "binary_little_endian": "<", "binary_big_endian": ">"}

Lists = dict[str, list[list[int]]]
"""The lists of an element, by property."""


@dataclasses.dataclass(frozen=True)
class Property:
    """A property of an element; ``length`` is the type of a list's length."""

    name: str
    kind: str
    length: str | None = None


@dataclasses.dataclass(frozen=True)
class Element:
    """An element of the header."""

    name: str
    count: int
    properties: list[Property]

    @property
    def smallest(self) -> int:
        """Smallest number of bytes of each in a binary file."""
        return sum(np.dtype(prop.length or prop.kind).itemsize for prop in self.properties)


def decode(data: bytes, options: Options) -> Geometry:
    """Reads vertices with all their scalar properties, and faces.

    Raises:
        DataError: if the file is damaged, its size differs from the header, or it has no vertices.
    """
    order, elements, body = _header(data)
    names = [element.name for element in elements]
    if names.count("vertex") != 1 or names.count("face") > 1:
        raise DataError("a ply file must have one element vertex and at most one element face")
    if "tristrips" in names:
        raise DataError("triangle strips are not read")
    for element in elements:
        if element.name == "vertex":
            options.check_points(element.count)
    read = _Ascii(body) if order == "=" else _Binary(body, order)
    columns: Columns = {}
    faces = np.zeros((0, 3), np.int64)
    for element in elements:
        scalars, lists = read.element(element)
        if element.name == "vertex":
            columns = scalars
            warn_lost(list(lists), KIND)
        elif element.name == "face" and element.count:
            faces = _triangles(element, lists)
    read.finish()
    table, coordinates, _ = table_of(columns, options, drop_missing=not len(faces))
    (vertex,) = (element for element in elements if element.name == "vertex")
    single = all(prop.kind == "f4" for prop in vertex.properties if prop.name in coordinates)
    layout = FileLayout(
        kind=KIND,
        columns=tuple(columns),
        coordinates=coordinates,
        named=True,
        text=order == "=",
        single=single,
    )
    return Geometry(table, faces, layout)


def _triangles(element: Element, lists: Lists | dict[str, NDArray[np.int64]]) -> NDArray[np.int64]:
    whole = [prop.name for prop in element.properties if prop.length and prop.kind[0] != "f"]
    known = [name for name in ("vertex_indices", "vertex_index") if name in whole] or whole
    if not known:
        raise DataError("its faces have no list of whole numbers, which are their vertices")
    corners = lists[known[0]]
    for row, polygon in enumerate(corners):
        if len(polygon) < 3:
            raise DataError(f"face {row} has {len(polygon)} corners")
        if isinstance(corners, np.ndarray):
            break  # all have one length
    return fan(corners)


def _header(data: bytes) -> tuple[str, list[Element], bytes]:
    """Byte order, elements and the data after the header."""
    data = without_mark(data)
    start = re.match(rb"ply[ \t]*(\r\n|\n|\r)", data)
    if start is None:
        raise DataError("not a ply file: it does not start with 'ply'")
    newline = rb"\r" if start[1] == b"\r" else rb"\r?\n"
    end = re.compile(rb"[\r\n]end_header[ \t]*(%b|$)" % newline).search(data, 0, 1 << 20)
    if end is None:
        raise DataError("not a complete ply file: its header does not end")
    order, elements = "", list[Element]()
    for line in decoded_text(data[: end.start()]).split("\n")[1:]:
        words = line.split()
        if not words or words[0] not in ("format", "element", "property"):
            logger.debug("%s: the line %r of its header is ignored", FILE.get(), line[:60])
        elif words[0] == "format" and len(words) in (2, 3) and words[1] in ORDERS:
            order = ORDERS[words[1]]
        elif words[0] == "element" and len(words) == 3:
            elements.append(Element(words[1], declared(words[2], f"{words[1]} elements"), []))
        elif words[0] == "property" and elements and len(words) == 3 and words[1] in TYPES:
            elements[-1].properties.append(Property(words[2], TYPES[words[1]]))
        elif (
            words[:2] == ["property", "list"]
            and elements
            and len(words) == 5
            and words[2] in TYPES
            and words[3] in TYPES
            and TYPES[words[2]][0] != "f"
        ):
            elements[-1].properties.append(Property(words[4], TYPES[words[3]], TYPES[words[2]]))
        else:
            raise DataError(f"not a ply file: its header has the line {line[:60]!r}")
    if not order:
        raise DataError("not a ply file: its header names no known format")
    for element in elements:
        names = [prop.name for prop in element.properties]
        if len(set(names)) < len(names):
            raise DataError(f"not a ply file: element {element.name} has a property twice")
    return order, elements, data[end.end() :]


class _Ascii:
    """Elements from lines."""

    def __init__(self, body: bytes) -> None:
        try:
            lines = body.decode("ascii").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"not an ascii ply file: {error}") from None
        self.lines = [line for line in lines if line.strip()]
        self.start = 0

    def element(self, element: Element) -> tuple[Columns, Lists]:
        lines = self.lines[self.start : self.start + element.count]
        if len(lines) < element.count:
            raise short(element.count, len(lines), f"{element.name} elements")
        self.start += element.count
        if any(prop.length for prop in element.properties):
            return self._with_lists(element, lines)
        width = len(element.properties)
        if not lines or not width:
            return {prop.name: np.zeros(0, prop.kind) for prop in element.properties}, {}
        try:
            block = np.loadtxt(lines, ndmin=2, comments=None, dtype=np.float64)
        except ValueError as error:
            raise DataError(f"the file is truncated or damaged: element {element.name}: {error}") from None
        if block.shape[1] != width:
            raise short(width, block.shape[1], f"numbers per {element.name}")
        return {
            prop.name: _cast(column, prop) for prop, column in zip(element.properties, block.T, strict=True)
        }, {}

    def _with_lists(self, element: Element, lines: Iterable[str]) -> tuple[Columns, Lists]:
        scalars: dict[str, list[float]] = {p.name: [] for p in element.properties if p.length is None}
        lists: Lists = {p.name: [] for p in element.properties if p.length is not None}
        for row, line in enumerate(lines):
            words = line.split()
            at = 0
            try:
                for prop in element.properties:
                    if prop.length is None:
                        scalars[prop.name].append(float(words[at]))
                        at += 1
                        continue
                    size = int(words[at])
                    if not 0 <= size <= len(words) - at - 1:
                        raise ValueError(f"a list of {size} in a line of {len(words)} words")
                    part = words[at + 1 : at + 1 + size]
                    lists[prop.name].append([int(word) for word in part] if prop.kind[0] != "f" else [])
                    at += 1 + size
                if at != len(words):
                    raise ValueError(f"{len(words)} words, {at} are expected")
            except (ValueError, IndexError) as error:
                raise DataError(f"the file is truncated or damaged: {element.name} {row}: {error}") from None
        kinds = {prop.name: prop for prop in element.properties}
        return {name: _cast(np.array(values), kinds[name]) for name, values in scalars.items()}, lists

    def finish(self) -> None:
        if self.start < len(self.lines):
            raise DataError(
                f"the file is damaged: {len(self.lines) - self.start} lines follow what its header declares"
            )


def _cast(values: NDArray[np.float64], prop: Property) -> NDArray[np.generic]:
    """Converts values to the declared type; x, y and z keep all written digits."""
    if prop.kind[0] == "f":
        return values if prop.name in ("x", "y", "z") else values.astype(prop.kind)
    limits = np.iinfo(prop.kind)
    if len(values) and not (
        np.array_equal(values, np.round(values)) and values.min() >= limits.min and values.max() <= limits.max
    ):
        raise DataError(f"property {prop.name} has values that are no {NAMES[prop.kind]}")
    return values.astype(prop.kind)


class _Binary:
    """Elements from bytes."""

    def __init__(self, body: bytes, order: str) -> None:
        self.body, self.order, self.at = body, order, 0

    def element(self, element: Element) -> tuple[Columns, Lists | dict[str, NDArray[np.int64]]]:
        left = len(self.body) - self.at
        if element.count * element.smallest > left:
            size = element.smallest
            raise short(element.count, left // size, f"{element.name} elements")
        if all(prop.length is None for prop in element.properties):
            fields = [(prop.name, self.order + prop.kind) for prop in element.properties]
            table = self._table(fields, element.count)
            return {name: _native(table[name]) for name, _ in fields}, {}
        found = self._uniform(element)
        return ({}, found) if found is not None else self._ragged(element)

    def _table(self, fields: list[tuple[str, str]], count: int) -> NDArray[np.void]:
        dtype = np.dtype(fields)
        table = np.frombuffer(self.body, dtype, count, self.at) if count else np.zeros(0, dtype)
        self.at += count * dtype.itemsize
        return table

    def _uniform(self, element: Element) -> dict[str, NDArray[np.int64]] | None:
        """Lists of equal length, as in a mesh of triangles; else ``None``."""
        if len(element.properties) != 1 or not element.count:
            return None
        (prop,) = element.properties
        length = np.dtype(self.order + (prop.length or ""))
        size = int(np.frombuffer(self.body, length, 1, self.at)[0])
        item = np.dtype(self.order + prop.kind).itemsize
        if size < 1 or element.count * (length.itemsize + size * item) > len(self.body) - self.at:
            return None
        dtype = np.dtype([("n", length), ("items", self.order + prop.kind, (size,))])
        table = np.frombuffer(self.body, dtype, element.count, self.at)
        if not (table["n"] == size).all():
            return None
        self.at += element.count * dtype.itemsize
        return {prop.name: table["items"].astype(np.int64)}

    def _ragged(self, element: Element) -> tuple[Columns, Lists]:
        lists: Lists = {prop.name: [] for prop in element.properties if prop.length is not None}
        codes = {
            "i1": "b",
            "u1": "B",
            "i2": "h",
            "u2": "H",
            "i4": "i",
            "u4": "I",
            "i8": "q",
            "u8": "Q",
            "f4": "f",
            "f8": "d",
        }
        body, at, order = self.body, self.at, self.order
        scalars: dict[str, list[float]] = {p.name: [] for p in element.properties if p.length is None}
        try:
            for row in range(element.count):
                for prop in element.properties:
                    size = 1
                    if prop.length is not None:
                        (size,) = struct.unpack_from(order + codes[prop.length], body, at)
                        at += np.dtype(prop.length).itemsize
                    item = np.dtype(prop.kind).itemsize
                    if size < 0 or size * item > len(body) - at:
                        raise DataError(
                            f"the file is truncated or damaged: {element.name} {row} has a list of {size}"
                        )
                    values = struct.unpack_from(f"{order}{size}{codes[prop.kind]}", body, at)
                    at += size * item
                    if prop.length is None:
                        scalars[prop.name].append(values[0])
                    else:
                        lists[prop.name].append(list(values) if prop.kind[0] != "f" else [])
        except struct.error:
            raise DataError(f"the file is truncated: it ends within element {element.name}") from None
        self.at = at
        kinds = {prop.name: prop.kind for prop in element.properties}
        return {name: np.array(values, kinds[name]) for name, values in scalars.items()}, lists

    def finish(self) -> None:
        if self.body[self.at :].strip(b"\0\r\n\t "):
            raise DataError(
                f"the file is damaged: {len(self.body) - self.at} bytes follow what its header declares"
            )


def _native(values: NDArray[np.generic]) -> NDArray[np.generic]:
    return np.ascontiguousarray(values, values.dtype.newbyteorder("="))


def encode(file: CloudFile, suffix: str) -> bytes:
    """Encodes as little-endian binary, or as ascii if the source was."""
    (table,) = file.clouds
    layout = file.laid_out(KIND)
    columns = {_word(name): _storable(values) for name, values in flat_columns(table, layout).items()}
    return _encode(columns, [], layout.text)


def encode_mesh(mesh: Mesh, suffix: str) -> bytes:
    """Encodes vertices in their precision and faces as int32; binary."""
    columns: Columns = dict(zip("xyz", mesh.vertices.T, strict=True))
    dtype = np.dtype([("n", "u1"), ("corners", "<i4", (3,))])
    faces = np.zeros(len(mesh.faces), dtype)
    faces["n"], faces["corners"] = 3, mesh.faces
    lines = [f"element face {len(faces)}", "property list uchar int vertex_indices"]
    return _encode(columns, lines, False) + faces.tobytes()


def _encode(columns: Columns, more: list[str], text: bool) -> bytes:
    count = len(next(iter(columns.values())))
    properties = [f"property {NAMES[values.dtype.str[1:]]} {name}" for name, values in columns.items()]
    form = "ascii" if text else "binary_little_endian"
    head = ["ply", f"format {form} 1.0", f"element vertex {count}", *properties, *more, "end_header\n"]
    header = "\n".join(head).encode("utf-8")
    if text:
        cells = [[str(value) for value in values] for values in columns.values()]
        return header + "".join(" ".join(row) + "\n" for row in zip(*cells, strict=True)).encode("ascii")
    table = np.empty(count, [(name, values.dtype.newbyteorder("<")) for name, values in columns.items()])
    for name, values in columns.items():
        table[name] = values
    return header + table.tobytes()


def _word(name: str) -> str:
    """A property name without spaces."""
    return "_".join(name.split()) or "column"


def _storable(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """Converts values to a type of the format."""
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "b":
        return values.astype(np.uint8)
    if kind == "f" and size not in (4, 8):
        return values.astype(np.float32 if size < 4 else np.float64)
    if kind in "iu" and size == 8:
        fits = not len(values) or (values.min() >= -(2**31) and values.max() < 2**31)
        return values.astype(np.int32 if fits else np.float64)
    return values.astype(values.dtype.newbyteorder("="))
