"""Binary glTF 2.0 (.glb), through trimesh: points and triangles of a scene, without materials and textures.

trimesh does not check declared sizes, so they are compared with the file first, and trimesh only gets the
geometry.
"""

from __future__ import annotations

import io
import json
import re
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ifdefense.data.errors import DataError
from ifdefense.data.formats.table import (
    CloudFile,
    FileLayout,
    Geometry,
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
COMPONENTS = {5120: "i1", 5121: "u1", 5122: "i2", 5123: "u2", 5125: "u4", 5126: "f4"}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
POINTS, TRIANGLES, STRIP, FAN = 0, 4, 5, 6
NAMES = {"NORMAL": "normals", "COLOR_0": "colors"}
HARMLESS = re.compile(
    r"_(materials?|techniques?|textures?|lights?|image|animation|xmp|metadata|features|outline)(_|$)"
    r"|^KHR_mesh_quantization$"
)
"""Required extensions that leave the geometry unchanged or only quantise it."""

Json = dict[str, Any]


def decode(data: bytes, options: Options) -> Geometry:
    """Reads the triangles, or else the points, of a scene, in the frame of the scene.

    Raises:
        DataError: if the file is damaged, refers to other files, is compressed, or has neither.
    """
    from trimesh.exchange.gltf import load_gltf

    source, binary = _chunks(data)
    document = _Plain(source, len(binary), options).document
    text = io.BytesIO(json.dumps(document).encode())
    scene = load_gltf(text, resolver={"binary": binary}, skip_materials=True)  # no other file is accessible
    primitives = [primitive for mesh in document["meshes"] for primitive in mesh["primitives"]]
    loaded = {
        name: (_table(primitive, found, document["accessors"]), found["faces"], primitive["points"])
        for primitive, (name, found) in zip(primitives, scene["geometry"].items(), strict=True)
    }
    frames = {scene["base_frame"]: np.eye(4)}
    clouds: list[PointTable] = []
    parts: list[PointTable] = []
    faces = [np.zeros((0, 3), np.int64)]
    points = size = start = 0
    for edge in scene["graph"]:
        matrix = frames[edge["frame_to"]] = frames[edge["frame_from"]] @ edge["matrix"]
        if "geometry" not in edge:
            continue
        table, index, is_cloud = loaded[edge["geometry"]]
        if index.max(initial=0) >= len(table.points):
            raise DataError("the file is damaged: its triangles do not fit its vertices")
        points += len(table.points)  # a mesh may have many instances
        options.check_points(points)
        size += 12 * len(index)
        options.check_bytes(size)
        (clouds if is_cloud else parts).append(_moved(table, matrix))
        if not is_cloud:
            faces.append(index.astype(np.int64) + start)
            start += len(table.points)
    if parts and clouds:
        warn("the scene has a mesh and points; its points are left out")
    if not (parts or clouds):
        raise DataError("there are neither points nor triangles in it")
    layout = FileLayout(kind=KIND, named=True, single=True)
    return Geometry(_joined(parts or clouds), np.concatenate(faces), layout)


def _chunks(data: bytes) -> tuple[Json, bytes]:
    """The json and the binary chunk of a file."""
    if len(data) < 20 or data[:4] != b"glTF":
        raise DataError("not a glb file: it does not start with glTF")
    version, length = struct.unpack_from("<II", data, 4)
    if version != 2:
        raise DataError(f"glTF of version {version} is not read, only 2")
    if length > len(data):  # fewer is harmless
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
        raise DataError("not a glb file: its json is not an object")
    return document, chunks.get(BINARY, b"")


class _Plain:
    """Document with the geometry only; sizes are checked against the binary chunk.

    Points become triangles without corners, and normals and colours become custom attributes, because trimesh
    keeps those unchanged.
    """

    def __init__(self, source: Json, size: int, options: Options) -> None:
        self.source, self.size, self.options = source, size, options
        required = [str(name) for name in source.get("extensionsRequired", [])]
        if unknown := [name for name in required if not HARMLESS.search(name)]:
            raise DataError(f"it needs the extension {', '.join(unknown)}, which is not read")
        blank = {"componentType": 5121, "type": "SCALAR", "count": 0}
        self.accessors = [blank] * (len(source.get("accessors", [])) + 1)  # the last has no corners
        self.views: list[Json] = [{"buffer": 0, "byteLength": 0}] * len(source.get("bufferViews", []))
        self.bytes = 0
        meshes = [
            {
                "primitives": [
                    plain for primitive in mesh["primitives"] if (plain := self._primitive(primitive))
                ]
            }
            for mesh in source.get("meshes", [])
        ]
        self.document = {
            **self._scene(),
            "meshes": meshes,
            "accessors": self.accessors,
            "bufferViews": self.views,
            "buffers": [{"uri": "binary"}],
        }

    def _primitive(self, primitive: Json) -> Json | None:
        mode = primitive.get("mode", TRIANGLES)
        if mode == FAN:
            raise DataError("triangle fans are not read")
        if mode not in (POINTS, TRIANGLES, STRIP):
            warn("lines are left out")
            return None
        names = primitive["attributes"]
        extensions = primitive.get("extensions", {})
        count = self._take(names["POSITION"], extensions, 3)
        attributes = {"POSITION": names["POSITION"]}
        for name, number in names.items():
            if name in NAMES or (name[0] == "_" and self.source["accessors"][number]["type"] in WIDTHS):
                if (found := self._take(number, extensions)) != count:
                    raise short(count, found, f"values of {name}")
                attributes[f"_{name}" if name in NAMES else name] = number
        plain = {"attributes": attributes, "mode": mode, "points": mode == POINTS}
        if mode == POINTS:
            return plain | {"mode": TRIANGLES, "indices": len(self.accessors) - 1}
        if "indices" in primitive:
            plain["indices"] = primitive["indices"]
            count = self._take(primitive["indices"], extensions, 1)
        if count < 3 or (mode == TRIANGLES and count % 3):
            raise DataError("the file is damaged: its triangles do not fit its vertices")
        return plain

    def _take(self, number: int, extensions: Json, width: int | None = None) -> int:
        """Copies an accessor and its part of the buffer; returns its number of values.

        Raises:
            DataError: if the data is not in this file.
        """
        accessor = self.source["accessors"][number]
        view = self.source["bufferViews"][accessor["bufferView"]] if "bufferView" in accessor else {}
        empty = not view or "sparse" in accessor
        if empty or view.get("buffer", 0) != 0 or "uri" in self.source["buffers"][0]:
            names = [name for name in (*extensions, *view.get("extensions", {})) if not HARMLESS.search(name)]
            if names:
                raise DataError(f"it is compressed by {', '.join(names)}, which is not read")
            if empty:
                raise DataError("empty and sparse accessors are not read")
            raise DataError("it refers to another file or buffer, which is not read")
        columns, count = WIDTHS[accessor["type"]], int(accessor["count"])
        if columns != (width or columns):
            raise DataError(f"the file is damaged: {columns} values in place of {width}")
        row = columns * np.dtype(COMPONENTS[accessor["componentType"]]).itemsize
        stride = int(view.get("byteStride", row))
        offset, length = int(view.get("byteOffset", 0)), int(view["byteLength"])
        first = offset + int(accessor.get("byteOffset", 0))
        end = first + (count - 1) * stride + row
        if count < 1 or stride < row or first < offset or offset < 0:
            raise DataError("the file is damaged: an accessor is invalid")
        if end > offset + length or offset + length > self.size:
            raise short(end, min(offset + length, self.size), "bytes of points")
        self.bytes += count * row + (length if self.views[accessor["bufferView"]] is not view else 0)
        self.options.check_bytes(self.bytes // 2)  # held twice in memory, as file and as array
        self.views[accessor["bufferView"]] = view
        self.accessors[number] = accessor
        return count

    def _scene(self) -> Json:
        """Nodes and scenes.

        Raises:
            DataError: if the nodes are not a tree.
        """
        keys = ("mesh", "children", "matrix", "translation", "rotation", "scale")
        source: list[Json] = self.source.get("nodes", [])
        nodes = [{key: node[key] for key in keys if key in node} for node in source]
        if any("EXT_mesh_gpu_instancing" in node.get("extensions", {}) for node in source):
            warn("of the instances of a mesh (EXT_mesh_gpu_instancing) one is read")
        children = [child for node in nodes for child in node.get("children", [])]
        free = sorted(set(range(len(nodes))) - set(children))
        scenes = self.source.get("scenes") or [{"nodes": free}]
        roots = scenes[self.source.get("scene", 0)].get("nodes", [])
        if len({*children, *roots}) < len(children) + len(roots):
            raise DataError("the file is damaged: its nodes are not a tree")
        return {"nodes": nodes, "scene": 0, "scenes": [{"nodes": roots}]}


def _table(primitive: Json, kwargs: Json, accessors: list[Json]) -> PointTable:
    """Points with normals, colours and custom attributes."""
    numbers = primitive["attributes"]
    fields = {}
    for name, values in kwargs.get("vertex_attributes", {}).items():
        if name != "_COLOR_0" or values.dtype != np.uint8:
            values = _scaled(values, accessors[numbers[name]])
        fields[NAMES.get(name[1:], name[1:])] = values[:, 0] if values.shape[1] == 1 else values
    positions = _scaled(kwargs["vertices"], accessors[numbers["POSITION"]])
    return PointTable(positions.astype(np.float64), fields)


def _scaled(values: NDArray[Any], accessor: Json) -> NDArray[Any]:
    """The values of an accessor; trimesh leaves normalised integers as they are stored."""
    if not accessor.get("normalized") or values.dtype.kind == "f":
        return values
    return np.maximum(values / np.iinfo(values.dtype).max, -1)


def _moved(table: PointTable, matrix: NDArray[np.float64]) -> PointTable:
    """The points and normals in the frame of the scene."""
    if np.array_equal(matrix, np.eye(4)):
        return PointTable(checked_points(table.points), table.fields)
    points = checked_points(table.points @ matrix[:3, :3].T + matrix[:3, 3])
    fields = dict(table.fields)
    if "normals" in fields and np.linalg.det(matrix[:3, :3]):
        normals = fields["normals"]
        with np.errstate(all="ignore"):  # a damaged file may hold any numbers
            turned = normals @ np.linalg.inv(matrix[:3, :3])
            length = np.linalg.norm(turned, axis=1, keepdims=True)
            scale = np.linalg.norm(normals, axis=1, keepdims=True) / np.where(length > 0, length, 1)
            fields["normals"] = (turned * scale).astype(normals.dtype)
    return PointTable(points, fields)


def _joined(tables: list[PointTable]) -> PointTable:
    """Joins tables, with the fields that all have."""
    shared = [name for name in tables[0].fields if all(name in table.fields for table in tables)]
    lost = sorted({name for table in tables for name in table.fields if name not in shared})
    if lost:
        warn(f"only some of its parts have the fields {', '.join(lost)}; they are left out")
    return PointTable(
        np.concatenate([table.points for table in tables]),
        {name: np.concatenate([table.fields[name] for table in tables]) for name in shared},
    )


def encode(file: CloudFile, suffix: str) -> bytes:
    """Encodes points with normals, colours and other numbers, as float32.

    Raises:
        DataError: if float32 is too coarse for the cloud.
    """
    (table,) = file.clouds
    columns = flat_columns(table, file.laid_out(KIND))
    rest = [name for name in columns if name not in ("x", "y", "z")]
    attributes: dict[str, NDArray[Any]] = {}
    for target, parts in (("NORMAL", ("nx", "ny", "nz")), ("COLOR_0", ("red", "green", "blue", "alpha"))):
        found = [part for part in parts if part in columns]
        if len(found) >= 3:
            values = np.stack([columns[part] for part in found], axis=1)
            if target == "COLOR_0" and values.dtype == np.uint8:
                if len(found) == 3:
                    values = np.column_stack([values, np.full(len(values), 255, np.uint8)])
            else:
                values = values.astype("<f4")
            attributes[f"_{target}"] = values
            rest = [name for name in rest if name not in found]
    plain = [name for name in rest if name.isascii() and name.isidentifier()]
    warn_lost([name for name in rest if name not in plain], KIND)
    attributes |= {f"_{name}": columns[name].astype("<f4") for name in plain}
    return _encode(table.points, [[0, 0, 0]], attributes)


def encode_mesh(mesh: Mesh, suffix: str) -> bytes:
    """Vertices as float32, and triangles.

    Raises:
        DataError: if float32 is too coarse for the vertices, or there are none.
    """
    if not len(mesh.faces):
        raise DataError("a glb file holds no mesh without faces")
    return _encode(mesh.vertices, mesh.faces, None)


def _encode(points: NDArray[Any], faces: Any, attributes: dict[str, NDArray[Any]] | None) -> bytes:
    """Encodes a mesh, or points with attributes; trimesh writes attributes only for meshes."""
    from trimesh import Trimesh
    from trimesh.exchange.gltf import export_glb

    if len(points) and needs_double(points):
        raise DataError("a glb file holds float32, which would blur coordinates this far from the origin")

    def as_points(document: Json) -> None:
        (primitive,) = document["meshes"][0]["primitives"]
        primitive["mode"] = POINTS
        del primitive["indices"]
        for name in NAMES:
            if f"_{name}" in primitive["attributes"]:
                number = primitive["attributes"][name] = primitive["attributes"].pop(f"_{name}")
                if document["accessors"][number]["componentType"] == 5121:
                    document["accessors"][number]["normalized"] = True

    mesh = Trimesh(points, faces, process=False, vertex_attributes=attributes)
    post = None if attributes is None else as_points
    data: bytes = export_glb(mesh.scene(), include_normals=False, tree_postprocessor=post)
    return data
