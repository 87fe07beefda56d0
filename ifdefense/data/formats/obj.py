"""Wavefront .obj: vertices, with normals and colours, and faces; materials and textures are left out."""

from __future__ import annotations

import numpy as np

from ifdefense.data.errors import DataError
from ifdefense.data.formats.off import COLOURS, NORMALS, rows_of
from ifdefense.data.formats.table import (
    CloudFile,
    Columns,
    Geometry,
    Layout,
    Options,
    decoded_text,
    fan,
    flat_columns,
    table_of,
    warn_lost,
)
from ifdefense.geometry.mesh import Mesh

KIND = "obj"
IGNORED = set(
    """
    bevel bmat bsp bzp c_interp call cdc cdp con csh cstype ctech curv curv2 d_interp deg end g hole l lod
    maplib mg mtllib o p parm res s scmp scrv shadow_obj sp stech step surf trace_obj trim usemap usemtl vp vt
    """.split()  # noqa: SIM905
)
"""Statements that have nothing to do with vertices and faces."""


def decode(data: bytes, options: Options) -> Geometry:
    """Reads the vertices and faces of all objects, groups and materials of a file.

    Raises:
        DataError: if a line is no statement of the format, or a face names a vertex that is not there.
    """
    vertices: list[list[float]] = []
    normals: list[list[float]] = []
    polygons: list[list[int]] = []
    text = decoded_text(data).replace("\\\r\n", " ").replace("\\\n", " ")
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        keyword, values = words[0], words[1:]
        try:
            if keyword == "v":
                vertices.append(_numbers(values, (3, 4, 6, 7)))
            elif keyword == "vn":
                normals.append(_numbers(values, (3,)))
            elif keyword in ("f", "fo"):
                polygons.append(_corners(values, len(vertices)))
            elif keyword not in IGNORED:
                raise ValueError(f"{keyword[:40]!r} is no statement of an obj file")
        except ValueError as error:
            raise DataError(f"not a complete obj file: line {number}: {error}") from None
    if not vertices:
        raise DataError("there are no points in it")
    options.check_points(len(vertices))
    width = len(vertices[0])
    if any(len(row) != width for row in vertices):
        raise DataError("not a complete obj file: its vertices differ in their number of values")
    block = np.array(vertices)
    columns: Columns = dict(zip("xyz", block.T[:3], strict=True))
    if width >= 6:
        columns |= dict(zip(COLOURS, block.T[3:6], strict=False))
    if len(normals) == len(vertices):
        columns |= dict(zip(NORMALS, np.array(normals).T, strict=True))
    table, coordinates, _ = table_of(columns, options)
    faces = fan(polygons)
    if len(faces) and (faces.min() < 0 or faces.max() >= len(vertices)):
        raise DataError(f"a face names a vertex outside 1..{len(vertices)}")
    return Geometry(table, faces, Layout(KIND, tuple(columns), coordinates, named=True))


def _numbers(words: list[str], sizes: tuple[int, ...]) -> list[float]:
    if len(words) not in sizes:
        raise ValueError(f"{len(words)} numbers, {' or '.join(map(str, sizes))} are expected")
    return [float(word) for word in words]


def _corners(words: list[str], count: int) -> list[int]:
    """Vertices of a face, from 0; they are written from 1, or backwards from the last with a minus."""
    if len(words) < 3:
        raise ValueError(f"a face of {len(words)} corners")
    numbers = [int(word.split("/")[0]) for word in words]
    if 0 in numbers:
        raise ValueError("a face names vertex 0, they count from 1")
    return [number - 1 if number > 0 else count + number for number in numbers]


def encode(file: CloudFile, suffix: str) -> bytes:
    """Vertices, with colours and normals as far as there are any, no faces."""
    (table,) = file.clouds
    layout = file.laid_out(KIND)
    columns = flat_columns(table, layout)
    normals = list(NORMALS) if set(NORMALS) <= columns.keys() else []
    colours = list(COLOURS[:3]) if set(COLOURS[:3]) <= columns.keys() else []
    names = [*layout.coordinates, *colours]
    warn_lost([name for name in columns if name not in (*names, *normals)], KIND)
    text = rows_of([columns[name] for name in names], "v ")
    if normals:
        text += rows_of([columns[name] for name in normals], "vn ")
    return text.encode("ascii")


def encode_mesh(mesh: Mesh, suffix: str) -> bytes:
    """Vertices in all their digits, and triangles."""
    return (rows_of(list(mesh.vertices.T), "v ") + rows_of(list((mesh.faces + 1).T), "f ")).encode("ascii")
