"""Wavefront .obj, through trimesh: vertices, normals, colours and faces, without materials and textures.

trimesh skips indented lines, resolves negative indices from the end of the file, accepts index 0, and mixes
the normals of a vertex. So statements are checked and normalised before, and normals are read per corner.
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
    FileLayout,
    Geometry,
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
"""Statements that are ignored."""
NUMBER = r"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|nan|inf)"
CORNER = r"[1-9]\d{0,17}(?:/\d*(?:/(?:[1-9]\d{0,17})?)?)?"
"""A vertex, vertex/texture, vertex//normal or vertex/texture/normal."""
FORMS = {
    "v": rf"{NUMBER}(?: {NUMBER}){{2}}(?: {NUMBER}(?:(?: {NUMBER}){{2}}(?: {NUMBER})?)?)?",  # 3, 4, 6 or 7
    "vn": rf"{NUMBER}(?: {NUMBER}){{2}}",
    "f": rf"{CORNER}(?: {CORNER}){{2,}}",
}
"""Arguments of the keywords that are read."""


def decode(data: bytes, options: Options) -> Geometry:
    """Reads the vertices and faces of all objects, groups and materials of a file.

    Raises:
        DataError: if a line is not a statement of the format, or a face refers to a missing vertex.
    """
    vertices, normals, faces = _statements(decoded_text(data))
    if not vertices:
        raise DataError("there are no points in it")
    options.check_points(len(vertices))
    coloured = sum(row.count(" ") >= 5 for row in vertices)
    if 0 < coloured < len(vertices):
        warn(f"only {coloured} of {len(vertices)} vertices have colours; they are left out")
    text = "\n".join(faces)
    points, colours, triangles = _load(vertices, re.sub(r"/\S*", "", text), "vertex")
    columns: Columns = dict(zip("xyz", points.T, strict=True))
    if colours is not None:
        columns |= dict(zip(COLOURS, colours.T, strict=False))
    corners: Columns = {}
    numbers, count = re.subn(r"\d+/\d*/(?=\d)", "", text)
    if count:
        if count < len(text.split()):
            warn("only some corners of its faces have normals; they are left out")
        else:
            values, _, index = _load(normals, numbers, "normal")
            corners = dict(zip(NORMALS, values[index].transpose(2, 0, 1), strict=True))
    elif len(normals) == len(vertices):
        columns |= dict(zip(NORMALS, _load(normals, "", "normal")[0].T, strict=True))
    elif normals:
        warn(f"{len(normals)} normals do not fit {len(vertices)} vertices; they are left out")
    table, coordinates, _ = table_of(columns, options)
    layout = FileLayout(KIND, (*columns, *corners), coordinates, named=True)
    return Geometry(table, triangles, layout, corners)


def _statements(text: str) -> tuple[list[str], list[str], list[str]]:
    """Statements of vertices, normals and faces, with indices from 1 and single spaces."""
    rows: dict[str, list[str]] = {keyword: [] for keyword in FORMS}
    forms = {keyword: re.compile(form, re.ASCII | re.IGNORECASE) for keyword, form in FORMS.items()}
    for number, line in enumerate(re.sub("#.*", "", text).replace("\\\n", " ").split("\n"), 1):
        keyword, _, values = " ".join(line.split()).partition(" ")
        keyword = "f" if keyword == "fo" else keyword
        if keyword in rows:
            if keyword == "f" and "-" in values:
                counts = len(rows["v"]), len(rows["vn"])
                values = " ".join(_from_one(corner, *counts) for corner in values.split())
            if not forms[keyword].fullmatch(values):
                raise DataError(f"not a complete obj file: line {number}: {_fault(keyword, values.split())}")
            rows[keyword].append(values)
        elif keyword and keyword not in IGNORED:
            raise DataError(
                f"not a complete obj file: line {number}: {keyword[:40]!r} is not a statement of an obj file"
            )
    return rows["v"], rows["vn"], rows["f"]


def _from_one(corner: str, vertices: int, normals: int) -> str:
    """A corner without texture, with negative indices resolved to indices from 1."""
    words = [*corner.split("/"), "", ""]
    for place, count in ((0, vertices), (2, normals)):
        if re.fullmatch(r"-\d{1,18}", words[place]):
            words[place] = str(count + 1 + int(words[place]))
    return f"{words[0]}//{words[2]}"


def _fault(keyword: str, words: list[str]) -> str:
    """Reason why the arguments of a keyword are invalid."""
    if keyword == "f":
        if len(words) < 3:
            return f"a face of {len(words)} corners"
        wrong = next(word for word in words if not re.fullmatch(CORNER, word, re.ASCII))
        return f"a face names vertex {wrong[:40]}, they count from 1"
    for word in words:
        if not re.fullmatch(NUMBER, word, re.ASCII | re.IGNORECASE):
            return f"{word[:40]!r} is not a number"
    return f"{len(words)} numbers, {'3' if keyword == 'vn' else '3 or 4 or 6 or 7'} are expected"


def _load(
    rows: list[str], faces: str, what: str
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None, NDArray[np.int64]]:
    """Points or normals ``(N, 3)``, their colours, and triangles ``(F, 3)``, in the order of the file.

    Raises:
        DataError: if a face refers to a missing vertex or normal.
    """
    from trimesh.exchange.obj import load_obj

    widths = {row.count(" ") + 1 for row in rows}
    if len(widths) > 1:
        rows = [" ".join(row.split()[: min(widths)]) for row in rows]
    text = "".join(f"v {row}\n" for row in rows) + "".join(f"f {face}\n" for face in faces.splitlines())
    try:
        found = load_obj(io.StringIO(text), maintain_order=True) if rows else {}
        (mesh,) = found.get("geometry", {"": found}).values()
        index = fan(mesh.get("faces", np.zeros((0, 3), np.int64)))
        return mesh["vertices"], mesh.get("vertex_colors"), index
    except (IndexError, KeyError):
        raise DataError(f"a face names a {what} outside 1..{len(rows)}") from None


def encode(file: CloudFile, suffix: str) -> bytes:
    """Encodes vertices, with colours and normals if there are any; no faces.

    trimesh writes a fixed number of decimals, which rounds small coordinates to 0.
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
    """Encodes vertices with all digits, and triangles."""
    return (rows_of(list(mesh.vertices.T), "v ") + rows_of(list((mesh.faces + 1).T), "f ")).encode("ascii")
