"""Binary glTF 2.0 (.glb): points and triangles of a scene; materials and textures are left out."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ifdefense.data.errors import DataError
from ifdefense.data.formats.table import (
    CloudFile,
    Geometry,
    Layout,
    Options,
    PointTable,
    checked_points,
    flat_columns,
    needs_double,
    short,
    warn,
    warn_lost,
)
from ifdefense.geometry.mesh import Mesh

KIND = "glb"
JSON, BINARY = 0x4E4F534A, 0x004E4942
COMPONENTS = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
POINTS, TRIANGLES = 0, 4
MAX_NODES = 100_000


def decode(data: bytes, options: Options) -> Geometry:
    """Reads the points, or else the triangles, of a scene, in the frame of the scene.

    Raises:
        DataError: if the file is damaged, refers to other files, is compressed, or has neither.
    """
    document, binary = _chunks(data)
    reader = _Reader(document, binary, options)
    clouds: list[PointTable] = []
    parts: list[NDArray[np.float64]] = []
    faces: list[NDArray[np.int64]] = []
    start = 0
    total = 0
    for mesh, matrix in reader.placed():
        for primitive in mesh["primitives"]:
            mode = primitive.get("mode", TRIANGLES)
            if mode not in (POINTS, TRIANGLES):
                raise DataError(f"primitives of mode {mode} are not read, only points and triangles")
            if "extensions" in primitive:
                raise DataError(f"the extension {', '.join(primitive['extensions'])} is not read")
            names = primitive["attributes"]
            total += int(reader.items("accessors")[names["POSITION"]]["count"])
            options.check_points(total)
            positions = checked_points(_moved(reader.array(names["POSITION"], 3), matrix))
            if mode == POINTS:
                clouds.append(PointTable(positions, reader.fields(names, len(positions))))
                continue
            index = np.arange(len(positions))
            if "indices" in primitive:
                index = reader.array(primitive["indices"], 1).reshape(-1)
            if len(index) % 3 or (len(index) and not 0 <= index.min() <= index.max() < len(positions)):
                raise DataError("the file is damaged: its triangles do not fit its vertices")
            parts.append(positions)
            faces.append(index.astype(np.int64).reshape(-1, 3) + start)
            start += len(positions)
    layout = Layout(kind=KIND, named=True, single=True)
    if parts:
        if clouds:
            warn("the scene has a mesh and points; its points are left out")
        return Geometry(PointTable(np.concatenate(parts)), np.concatenate(faces), layout)
    if not clouds:
        raise DataError("there are neither points nor triangles in it")
    shared = [name for name in clouds[0].fields if all(name in cloud.fields for cloud in clouds)]
    table = PointTable(
        np.concatenate([cloud.points for cloud in clouds]),
        {name: np.concatenate([cloud.fields[name] for cloud in clouds]) for name in shared},
    )
    return Geometry(table, np.zeros((0, 3), np.int64), layout)


def _chunks(data: bytes) -> tuple[dict[str, Any], bytes]:
    if len(data) < 20 or data[:4] != b"glTF":
        raise DataError("not a glb file: it does not start with glTF")
    version, length = struct.unpack_from("<II", data, 4)
    if version != 2:
        raise DataError(f"glTF of version {version} is not read, only 2")
    if length != len(data):
        raise short(length, len(data), "bytes")
    chunks: dict[int, bytes] = {}
    at = 12
    while at < length:
        if at + 8 > length:
            raise DataError("the file is truncated: it ends within a chunk")
        size, kind = struct.unpack_from("<II", data, at)
        if size > length - at - 8:
            raise short(size, length - at - 8, "bytes of a chunk")
        chunks.setdefault(kind, data[at + 8 : at + 8 + size])
        at += 8 + size
    if JSON not in chunks:
        raise DataError("not a glb file: it has no json")
    try:
        document = json.loads(chunks[JSON].decode("utf-8"))
    except ValueError as error:
        raise DataError(f"not a complete glb file: its json is damaged: {error}") from None
    if not isinstance(document, dict):
        raise DataError("not a glb file: its json is no object")
    if required := document.get("extensionsRequired"):
        raise DataError(f"the extension {', '.join(map(str, required))} is not read")
    return document, chunks.get(BINARY, b"")


class _Reader:
    """Looks things up in the json and the buffer."""

    def __init__(self, document: dict[str, Any], binary: bytes, options: Options) -> None:
        self.document, self.binary, self.options = document, binary, options

    def items(self, name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.document.get(name, [])
        return found

    def placed(self) -> list[tuple[dict[str, Any], NDArray[np.float64]]]:
        """Every mesh of the scene with its transformation."""
        nodes = self.items("nodes")
        scenes = self.items("scenes")
        roots = scenes[self.document.get("scene", 0)].get("nodes", []) if scenes else range(len(nodes))
        stack = [(index, np.eye(4)) for index in roots]
        seen: set[int] = set()
        result = []
        while stack:
            index, above = stack.pop()
            if index in seen or len(seen) > MAX_NODES:
                raise DataError("the file is damaged: its nodes are no tree")
            seen.add(index)
            node = nodes[index]
            matrix = above @ _matrix(node)
            if "mesh" in node:
                result.append((self.items("meshes")[node["mesh"]], matrix))
            stack += [(child, matrix) for child in node.get("children", [])]
        return result

    def array(self, number: int, width: int | None = None) -> NDArray[Any]:
        """The values ``(N, width)`` of an accessor.

        Raises:
            DataError: if they are not in the buffer of this file.
        """
        accessor = self.items("accessors")[number]
        if "sparse" in accessor or "bufferView" not in accessor:
            raise DataError("sparse accessors are not read")
        view = self.items("bufferViews")[accessor["bufferView"]]
        buffer = self.items("buffers")[view.get("buffer", 0)]
        if "uri" in buffer or view.get("buffer", 0) != 0:
            raise DataError("it refers to another file, which is not read")
        dtype = np.dtype(COMPONENTS[accessor["componentType"]])
        columns, count = WIDTHS[accessor["type"]], int(accessor["count"])
        if width is not None and columns != width:
            raise DataError(f"the file is damaged: {columns} values in place of {width}")
        row = columns * dtype.itemsize
        stride = int(view.get("byteStride", row))
        offset, length = int(view.get("byteOffset", 0)), int(view["byteLength"])
        first = offset + int(accessor.get("byteOffset", 0))
        end = first + (count - 1) * stride + row
        if count < 1 or stride < row or first < offset or offset < 0:
            raise DataError("the file is damaged: an accessor makes no sense")
        if end > offset + length or offset + length > len(self.binary):
            raise short(end, min(offset + length, len(self.binary)), "bytes of points")
        values = np.ndarray((count, columns), dtype, self.binary, first, (stride, dtype.itemsize)).copy()
        return values / np.iinfo(dtype).max if accessor.get("normalized") else values

    def fields(self, names: dict[str, int], count: int) -> dict[str, NDArray[Any]]:
        """Normals, colours and attributes of an application's own."""
        known = {"NORMAL": "normals", "COLOR_0": "colors"}
        result = {}
        for name, number in names.items():
            if name in known or name.startswith("_"):
                accessor = self.items("accessors")[number]
                values = self.array(number)
                if accessor.get("normalized") and accessor["componentType"] == 5121:
                    values = np.round(values * 255).astype(np.uint8)
                if len(values) != count:
                    raise short(count, len(values), f"values of {name}")
                result[known.get(name, name[1:])] = values[:, 0] if values.shape[1] == 1 else values
        return result


def _matrix(node: dict[str, Any]) -> NDArray[np.float64]:
    """A node's transformation."""
    if "matrix" in node:
        return np.array(node["matrix"], np.float64).reshape(4, 4).T
    x, y, z, w = (float(value) for value in node.get("rotation", (0, 0, 0, 1)))
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * np.array(node.get("scale", (1, 1, 1)), np.float64)
    matrix[:3, 3] = np.array(node.get("translation", (0, 0, 0)), np.float64)
    return matrix


def _moved(points: NDArray[Any], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    wide = points.astype(np.float64)
    if np.array_equal(matrix, np.eye(4)):
        return wide
    moved: NDArray[np.float64] = wide @ matrix[:3, :3].T + matrix[:3, 3]
    return moved


def encode(file: CloudFile, suffix: str) -> bytes:
    """Points with normals, colours and other numbers; float32 is all that the format has.

    Raises:
        DataError: if float32 would blur the cloud.
    """
    (table,) = file.clouds
    _refuse_far(table.points)
    arrays: list[tuple[str, NDArray[Any]]] = [("POSITION", table.points.astype("<f4"))]
    columns = flat_columns(table, file.laid_out(KIND))
    rest = [name for name in columns if name not in ("x", "y", "z")]
    for target, parts in (("NORMAL", ("nx", "ny", "nz")), ("COLOR_0", ("red", "green", "blue", "alpha"))):
        found = [part for part in parts if part in columns]
        if len(found) >= 3:
            values = np.stack([columns[part] for part in found], axis=1)
            if target == "COLOR_0" and values.dtype == np.uint8 and len(found) == 3:
                values = np.column_stack([values, np.full(len(values), 255, np.uint8)])
            eight_bit = target == "COLOR_0" and values.dtype == np.uint8
            arrays.append((target, values if eight_bit else values.astype("<f4")))
            rest = [name for name in rest if name not in found]
    warn_lost([name for name in rest if not _plain(name)], KIND)
    arrays += [(f"_{name}", columns[name].astype("<f4")[:, None]) for name in rest if _plain(name)]
    return _encode(arrays, {"mode": POINTS})


def _plain(name: str) -> bool:
    return name.isascii() and name.isidentifier()


def _refuse_far(points: NDArray[np.floating]) -> None:
    if len(points) and needs_double(points):
        raise DataError("a glb file holds float32, which would blur coordinates this far from the origin")


def encode_mesh(mesh: Mesh, suffix: str) -> bytes:
    """Vertices as float32, and triangles.

    Raises:
        DataError: if float32 would blur the vertices, or there are none.
    """
    if not len(mesh.faces):
        raise DataError("a glb file holds no mesh without faces")
    _refuse_far(mesh.vertices)
    index = mesh.faces.astype("<u4").reshape(-1, 1)
    return _encode([("POSITION", mesh.vertices.astype("<f4")), ("", index)], {"mode": TRIANGLES})


def _encode(arrays: list[tuple[str, NDArray[Any]]], primitive: dict[str, Any]) -> bytes:
    names = {
        values.dtype.str.lstrip("|"): code
        for code, values in ((c, np.zeros(0, k)) for c, k in COMPONENTS.items())
    }
    types = {width: name for name, width in WIDTHS.items()}
    binary, views, accessors = b"", list[dict[str, Any]](), list[dict[str, Any]]()
    attributes: dict[str, int] = {}
    for number, (name, values) in enumerate(arrays):
        views.append({"buffer": 0, "byteOffset": len(binary), "byteLength": values.nbytes})
        accessor = {
            "bufferView": number,
            "componentType": names[values.dtype.str.lstrip("|")],
            "count": len(values),
            "type": types[values.shape[1]],
        }
        if name == "POSITION":
            accessor |= {"min": values.min(axis=0).tolist(), "max": values.max(axis=0).tolist()}
        if values.dtype == np.uint8:
            accessor["normalized"] = True
        accessors.append(accessor)
        if name:
            attributes[name] = number
        else:
            primitive = {**primitive, "indices": number}
        binary += values.tobytes()
        binary += b"\0" * (-len(binary) % 4)
    document = {
        "asset": {"version": "2.0", "generator": "ifdefense"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{**primitive, "attributes": attributes}]}],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": len(binary)}],
    }
    text = json.dumps(document, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 4)
    length = 12 + 8 + len(text) + 8 + len(binary)
    header = struct.pack("<4sII", b"glTF", 2, length)
    return (
        header + struct.pack("<II", len(text), JSON) + text + struct.pack("<II", len(binary), BINARY) + binary
    )
