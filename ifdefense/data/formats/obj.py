"""Wavefront .obj, through trimesh: vertices, normals, colours and faces, without materials and textures.

trimesh passes over lines that are indented, counts negative numbers from the end of the file, takes 0 for the
first vertex, and mixes the normals of a vertex. So it is given checked statements in one spelling, and
normals are read per corner.
"""

from __future__ import annotations

import io
import re

import numpy as np
from numpy.typing import NDArray

from ifdefense.data.errors import DataError
from ifdefense.data.formats.files import decoded_text
from ifdefense.data.formats.off import COLOURS, NORMALS, rows_of
from ifdefense.data.formats.table import (
    CloudFile,
    Columns,
    Geometry,
    Layout,
    Options,
    fan,
    flat_columns,
    table_of,
    warn,
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
CORNER = r"[1-9]\d{0,17}(?:/\d*(?:/(?:[1-9]\d{0,17})?)?)?"
"""A vertex, vertex/texture, vertex//normal or vertex/texture/normal."""
FACE = re.compile(f"{CORNER}(?: {CORNER}){{2,}}")


def decode(data: bytes, options: Options) -> Geometry:
    """Reads the vertices and faces of all objects, groups and materials of a file.

    Raises:
        DataError: if a line is no statement of the format, or a face names a vertex that is not there.
    """
    vertices, normals, faces = _statements(decoded_text(data))
    if not vertices:
        raise DataError("there are no points in it")
    options.check_points(len(vertices))
    coloured = sum(len(words) >= 6 for words in vertices)
    if 0 < coloured < len(vertices):
        warn(f"only {coloured} of {len(vertices)} vertices have colours; they are left out")
    width = 6 if coloured == len(vertices) else 3
    text = "\n".join(faces)
    points, colours, triangles = _load(vertices, width, re.sub(r"/\S*", "", text), "vertex")
    columns: Columns = dict(zip("xyz", points.T, strict=True))
    if colours is not None:
        columns |= dict(zip(COLOURS, colours.T, strict=False))
    corners: Columns = {}
    numbers, count = re.subn(r"\d+/\d*/(?=\d)", "", text)
    if count:
        if count < len(text.split()):
            warn("only some corners of its faces have normals; they are left out")
        else:
            values, _, index = _load(normals, 3, numbers, "normal")
            corners = dict(zip(NORMALS, values[index].transpose(2, 0, 1), strict=True))
    elif len(normals) == len(vertices):
        columns |= dict(zip(NORMALS, _load(normals, 3, "", "normal")[0].T, strict=True))
    elif normals:
        warn(f"{len(normals)} normals do not fit {len(vertices)} vertices; they are left out")
    table, coordinates, _ = table_of(columns, options)
    layout = Layout(KIND, (*columns, *corners), coordinates, named=True)
    return Geometry(table, triangles, layout, corners)


def _statements(text: str) -> tuple[list[list[str]], list[list[str]], list[str]]:
    """The words of vertices and normals, and faces with corners that count from 1."""
    vertices: list[list[str]] = []
    normals: list[list[str]] = []
    faces: list[str] = []
    for number, line in enumerate(re.sub("#.*", "", text).replace("\\\n", " ").split("\n"), 1):
        words = line.split()
        if not words:
            continue
        keyword = words.pop(0)
        try:
            if keyword == "v":
                vertices.append(_counted(words, (3, 4, 6, 7)))
            elif keyword == "vn":
                normals.append(_counted(words, (3,)))
            elif keyword in ("f", "fo"):
                if "-" in line:
                    words = [_from_one(word, len(vertices), len(normals)) for word in words]
                faces.append(_face(words))
            elif keyword not in IGNORED:
                raise ValueError(f"{keyword[:40]!r} is no statement of an obj file")
        except ValueError as error:
            raise DataError(f"not a complete obj file: line {number}: {error}") from None
    return vertices, normals, faces


def _counted(words: list[str], sizes: tuple[int, ...]) -> list[str]:
    if len(words) not in sizes:
        raise ValueError(f"{len(words)} numbers, {' or '.join(map(str, sizes))} are expected")
    return words


def _from_one(corner: str, vertices: int, normals: int) -> str:
    """A corner whose negative numbers, which count backwards from the last so far, are replaced."""
    words = corner.split("/")
    for place, count in ((0, vertices), (2, normals)):
        if words[place:] and words[place].startswith("-"):
            words[place] = str(count + 1 + int(words[place]))
    return "/".join([words[0], "", *words[2:]])


def _face(words: list[str]) -> str:
    face = " ".join(words)
    if not FACE.fullmatch(face):
        if len(words) < 3:
            raise ValueError(f"a face of {len(words)} corners")
        wrong = next(word for word in words if not re.fullmatch(CORNER, word))
        raise ValueError(f"a face names vertex {wrong[:40]}, they count from 1")
    return face


def _load(
    rows: list[list[str]], width: int, faces: str, what: str
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None, NDArray[np.int64]]:
    """Points or normals ``(N, 3)``, their colours, and triangles ``(F, 3)``, in the order of the file.

    Raises:
        DataError: if something is no number, or a face names what is not there.
    """
    from trimesh.exchange.obj import load_obj

    lines = ["v " + " ".join(words[:width]) for words in rows]
    lines += ["f " + face for face in faces.splitlines()]
    try:
        if not rows:
            raise IndexError
        found = load_obj(io.StringIO("\n".join(lines)), maintain_order=True)
        (found,) = found.get("geometry", {"": found}).values()
    except IndexError:
        raise DataError(f"a face names a {what} outside 1..{len(rows)}") from None
    except ValueError:
        wrong = next((word for words in rows for word in words[:width] if not _is_number(word)), "a word")
        raise DataError(f"not a complete obj file: a {what} has {wrong[:40]!r} for a number") from None
    index = found.get("faces", np.zeros((0, 3), np.int64))
    return found["vertices"], found.get("vertex_colors"), fan(index)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def encode(file: CloudFile, suffix: str) -> bytes:
    """Vertices, with colours and normals as far as there are any, no faces.

    trimesh would write a fixed number of decimals, which small coordinates do not survive.
    """
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
