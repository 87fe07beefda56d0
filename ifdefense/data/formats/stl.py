"""Stereolithography .stl: binary, and ascii with any number of solids."""

from __future__ import annotations

import re
import struct

import numpy as np
from numpy.typing import NDArray

from ifdefense.data.errors import DataError
from ifdefense.data.formats.files import decoded_text, without_mark
from ifdefense.data.formats.table import (
    FILE,
    FileLayout,
    Geometry,
    Options,
    PointTable,
    checked_points,
    logger,
    short,
)
from ifdefense.geometry.mesh import Mesh

KIND = "stl"
TRIANGLE = np.dtype([("normal", "<f4", (3,)), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
NUMBER = r"\s+([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?nan|[+-]?inf)"


def decode(data: bytes, options: Options) -> Geometry:
    """Reads triangles; equal corners are merged.

    Raises:
        DataError: if the file is damaged or its size differs from the header.
    """
    declared = struct.unpack_from("<I", data, 80)[0] if len(data) >= 84 else -1
    has = max(0, len(data) - 84) // TRIANGLE.itemsize
    if 0 <= declared <= has:  # read as a count, the letters of a text file exceed any file size
        rest = data[84 + declared * TRIANGLE.itemsize :]
        if has > declared and rest.strip(b"\0\r\n"):
            raise short(declared, has, "triangles")
        if rest:
            logger.debug("%s: %d bytes behind its last triangle are ignored", FILE.get(), len(rest))
        corners = np.frombuffer(data, TRIANGLE, declared, 84)["corners"]
    elif re.match(rb"\s*solid\b", text := without_mark(data), re.IGNORECASE) and b"\0" not in text:
        corners = _ascii(decoded_text(text))
    elif declared < 0:
        raise DataError("not a complete stl file: it is shorter than a header")
    else:
        raise short(declared, has, "triangles")
    if not len(corners):
        raise DataError("not a complete stl file, or there is no triangle in it")
    options.check_points(3 * len(corners))
    points = checked_points(corners.reshape(-1, 3))
    vertices, index = np.unique(points, axis=0, return_inverse=True)
    faces = index.reshape(-1, 3).astype(np.int64)
    return Geometry(PointTable(vertices), faces, FileLayout(kind=KIND, single=True))


def _ascii(text: str) -> NDArray[np.float64]:
    """Corners ``(F, 3, 3)`` of all solids."""
    rows: list[tuple[float, float, float]] = []
    vertex = re.compile(rf"vertex{NUMBER}{NUMBER}{NUMBER}$", re.IGNORECASE)
    # Statements allowed after each; a solid may have any name.
    follow = {
        "": ("solid",),
        "solid": ("facet", "endsolid"),
        "facet": ("outer",),
        "outer": ("vertex",),
        "vertex": ("vertex", "endloop"),
        "endloop": ("endfacet",),
        "endfacet": ("facet", "endsolid"),
        "endsolid": ("solid",),
    }
    last = ""
    corners = 0
    for number, line in enumerate(text.split("\n"), 1):
        words = line.split(maxsplit=1)
        if not words:
            continue
        word = words[0].lower()
        if word not in follow[last]:
            raise DataError(f"not a complete stl file: line {number}: {line.strip()[:60]!r}")
        if word == "vertex":
            match = vertex.match(line.strip())
            corners += 1
            if match is None or corners > 3:
                raise DataError(f"not a complete stl file: line {number}: {line.strip()[:60]!r}")
            rows.append((float(match[1]), float(match[2]), float(match[3])))
        elif word == "endloop":
            if corners != 3:
                raise DataError(f"not a complete stl file: line {number}: a facet of {corners} corners")
            corners = 0
        last = word
    if last != "endsolid":
        raise DataError("the file is truncated: its last solid does not end")
    return np.array(rows, dtype=np.float64).reshape(-1, 3, 3)


def encode_mesh(mesh: Mesh, suffix: str) -> bytes:
    """Encodes as binary, float32."""
    rows = np.zeros(len(mesh.faces), TRIANGLE)
    rows["corners"] = mesh.triangles()
    rows["normal"] = mesh.face_normals()
    return b"ifdefense".ljust(80) + struct.pack("<I", len(rows)) + rows.tobytes()
