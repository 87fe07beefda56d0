"""Object File Format (.off), ascii, with normals, colours and texture coordinates (STCNOFF)."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from ifdefense.data.errors import DataError
from ifdefense.data.formats.files import decoded_text
from ifdefense.data.formats.table import (
    CloudFile,
    Columns,
    FileLayout,
    Geometry,
    Options,
    declared,
    fan,
    flat_columns,
    short,
    table_of,
    warn_lost,
)
from ifdefense.geometry.mesh import Mesh

KIND = "off"
NORMALS = ("nx", "ny", "nz")
COLOURS = ("red", "green", "blue", "alpha")
EXACT = 2**53
"""Whole numbers up to this are exact in float64."""


def decode(data: bytes, options: Options) -> Geometry:
    """Reads vertices, with normals and colours, and faces.

    Raises:
        DataError: if the file is damaged or its size differs from the header.
    """
    lines = [line.partition("#")[0].strip() for line in decoded_text(data).split("\n")]
    lines = [line for line in lines if line]
    # Some files of ModelNet have no line break between header and counts.
    start = re.match(r"((?:ST|C|N)*)OFF(?:\b|(?=\d))\s*", lines[0].upper() if lines else "")
    if start is None:
        raise DataError("not an off file: it does not start with OFF")
    rest = lines[0][start.end() :].strip()
    if rest.upper().startswith("BINARY"):
        raise DataError("binary off files are not read")
    lines = [rest, *lines[1:]] if rest else lines[1:]
    counts = lines[0].split() if lines else []
    if len(counts) not in (2, 3):
        raise DataError("not a complete off file: its numbers of vertices, faces and edges are missing")
    vertices, faces = declared(counts[0], "vertices"), declared(counts[1], "faces")
    options.check_points(vertices)
    body = lines[1:]
    if len(body) < vertices:
        raise short(vertices, len(body), "vertices")
    if len(body) - vertices != faces:
        raise short(faces, len(body) - vertices, "faces")
    columns = _vertices(body[:vertices], start[1])
    table, coordinates, _ = table_of(columns, options)
    layout = FileLayout(kind=KIND, columns=tuple(columns), coordinates=coordinates, named=True)
    return Geometry(table, _faces(body[vertices:]), layout)


def _vertices(lines: list[str], prefix: str) -> Columns:
    if not lines:
        raise DataError("there are no points in it")
    try:
        block = np.loadtxt(lines, ndmin=2, comments=None, dtype=np.float64)
    except ValueError as error:
        raise DataError(f"the file is truncated or damaged: vertices: {error}") from None
    normals = NORMALS if "N" in prefix else ()
    texture = ("s", "t") if "ST" in prefix else ()
    more = block.shape[1] - 3 - len(normals) - len(texture)
    if more not in (0, 3, 4) or ("C" in prefix and not more):
        raise DataError(f"the file is truncated or damaged: its vertices have {block.shape[1]} numbers")
    colours = COLOURS[:more]
    # MeshLab writes NC with the colours first; the specification has CN with the normals first.
    middle = (*colours, *normals) if prefix.startswith("NC") else (*normals, *colours)
    names = ["x", "y", "z", *middle, *texture]
    columns: Columns = {}
    for name, values in zip(names, block.T, strict=True):
        whole = (
            name in COLOURS
            and np.isfinite(values).all()
            and np.array_equal(values, np.round(values))
            and 1 < values.max() < EXACT
        )
        columns[name] = values.astype(np.int64) if whole else values
    return columns


def _faces(lines: list[str]) -> NDArray[np.int64]:
    polygons = []
    for row, line in enumerate(lines):
        words = line.split()
        try:
            size = int(words[0])
            corners = [int(word) for word in words[1 : size + 1]]
        except ValueError as error:
            raise DataError(f"the file is truncated or damaged: face {row}: {error}") from None
        if size < 1 or len(corners) != size:
            raise DataError(
                f"the file is truncated or damaged: face {row} has {len(corners)} of {size} corners"
            )
        polygons.append(corners)
    return fan(polygons)


def encode(file: CloudFile, suffix: str) -> bytes:
    """Encodes vertices, with normals and colours if there are any; no faces."""
    (table,) = file.clouds
    layout = file.laid_out(KIND)
    columns = flat_columns(table, layout)
    normals = NORMALS if set(NORMALS) <= columns.keys() else ()
    colours: tuple[str, ...] = COLOURS[:3] if set(COLOURS[:3]) <= columns.keys() else ()
    if colours and "alpha" in columns:
        colours = COLOURS
    names = [*layout.coordinates, *normals, *colours]
    warn_lost([name for name in columns if name not in names], KIND)
    head = f"{'C' if colours else ''}{'N' if normals else ''}OFF\n{len(table.points)} 0 0\n"
    return (head + rows_of([columns[name] for name in names])).encode("ascii")


def encode_mesh(mesh: Mesh, suffix: str) -> bytes:
    """Encodes vertices with all digits, and triangles."""
    head = f"OFF\n{len(mesh.vertices)} {len(mesh.faces)} 0\n"
    return (head + rows_of(list(mesh.vertices.T)) + rows_of(list(mesh.faces.T), "3 ")).encode("ascii")


def rows_of(columns: list[NDArray[np.generic]], before: str = "") -> str:
    """One line per row, numbers in their shortest exact form."""
    cells = [[str(value) for value in column] for column in columns]
    return "".join(f"{before}{' '.join(row)}\n" for row in zip(*cells, strict=True))
