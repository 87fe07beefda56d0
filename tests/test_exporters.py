"""Files as other programs write them: the geometry is read, whatever else they hold."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ifdefense.data.formats import DataError, read_cloud, read_cloud_file, read_mesh
from ifdefense.data.formats.table import PointTable

XYZ = [[0.5, 1, 2], [3, 4, 5]]
CUBE = [[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]
QUADS = [[1, 2, 4, 3], [5, 7, 8, 6], [1, 5, 6, 2], [3, 4, 8, 7], [1, 3, 7, 5], [2, 6, 8, 4]]
OUT = [[-1, 0, 0], [1, 0, 0], [0, -1, 0], [0, 1, 0], [0, 0, -1], [0, 0, 1]]


def cloud(path: Path, data: str | bytes, **options: Any) -> PointTable:
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    (table,) = read_cloud_file(path, **options).clouds
    return table


def lines(keyword: str, rows: Any) -> str:
    return "".join(f"{keyword} {' '.join(map(str, row))}\n" for row in rows)


def blender_cube() -> str:
    """Flat normals, of which Blender writes each once; faces with texture and normal."""
    text = "# Blender 4.2\n# www.blender.org\nmtllib cube.mtl\no Cube\n" + lines("v", CUBE) + lines("vn", OUT)
    text += "vt 0.0 0.0\ns off\nusemtl Material\n"
    faces = [[f"{v}/1/{number}" for v in quad] for number, quad in enumerate(QUADS, 1)]
    return text + lines("f", faces[:3]) + "g rest\nusemtl Other\n" + lines("f", faces[3:])


def test_normals_of_an_obj_belong_to_the_corners_of_its_faces(tmp_path: Path) -> None:
    table = cloud(tmp_path / "a.obj", blender_cube(), mesh_points=400)
    normals = np.stack([table.fields[name] for name in ("nx", "ny", "nz")], axis=1)
    face = np.abs(table.points).argmax(axis=1)
    expected = np.zeros((400, 3))
    expected[np.arange(400), face] = np.sign(table.points[np.arange(400), face])
    np.testing.assert_array_equal(normals, expected)
    mesh = read_mesh(tmp_path / "a.obj")
    np.testing.assert_array_equal(mesh.vertices, CUBE)  # as in the file, though their normals differ
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(8)


def test_smooth_normals_in_another_order_than_the_vertices(tmp_path: Path) -> None:
    import trimesh

    ball = trimesh.creation.icosphere(2)
    order = np.random.default_rng(0).permutation(len(ball.vertices))
    number = np.argsort(order) + 1  # of the normal of each vertex
    faces = [[f"{v + 1}//{number[v]}" for v in face] for face in ball.faces]
    text = lines("v", ball.vertices) + lines("vn", ball.vertices[order]) + lines("f", faces)
    table = cloud(tmp_path / "a.obj", text, mesh_points=500)
    normals = np.stack([table.fields[name] for name in ("nx", "ny", "nz")], axis=1)
    cosine = (normals * table.points).sum(1) / np.linalg.norm(table.points, axis=1)
    assert np.degrees(np.arccos(cosine.clip(-1, 1))).max() < 15  # half a side of a triangle


TWO = "o a\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf -3 -2 -1\no b\nv 0 0 5\nv 1 0 5\nv 0 1 5\nf -3 -2 -1\n"


@pytest.mark.parametrize(
    ("text", "faces"),
    [
        (TWO, [[0, 1, 2], [3, 4, 5]]),
        (
            TWO.replace("-3 -2 -1", "-3/-3/-1 -2/-2/-1 -1/-1/-1").replace("f", "vn 0 0 1\nf"),
            [[0, 1, 2], [3, 4, 5]],
        ),
        ("v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nv -1 .5 0\nf 1 2 3 4 5\n", [[0, 1, 2], [0, 2, 3], [0, 3, 4]]),
        ("v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf 1 2 3 4\nf 1 2 4\n", None),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 \\\n2 3\n", [[0, 1, 2]]),
        ("\tv\t0 0 0 # a\n  v 1 0 0 1.0\nv 0 1 0\nf 1 2 3 # b\n", [[0, 1, 2]]),
        (TWO.replace("\n", "\r\n"), [[0, 1, 2], [3, 4, 5]]),
        (TWO.replace("\n", "\r"), [[0, 1, 2], [3, 4, 5]]),
        (
            "v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvn 0 0 1\nf 1/1 2/1 3/1\nf 1//1 2//1 3//1\n",
            [[0, 1, 2], [0, 1, 2]],
        ),
    ],
)
def test_faces_of_an_obj(text: str, faces: list[list[int]] | None, tmp_path: Path) -> None:
    (tmp_path / "a.obj").write_bytes(text.encode())
    mesh = read_mesh(tmp_path / "a.obj")
    assert [0, 1, 2] in mesh.faces.tolist()
    if faces is None:  # a quad is cut along either diagonal
        assert mesh.area == pytest.approx(1.5)
    else:
        np.testing.assert_array_equal(mesh.faces, faces)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 0 1 2\n", "line 4: a face names vertex 0, they count from 1"),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\nf -4 1 2\n", "line 4: a face names vertex 0"),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", r"names a vertex outside 1\.\.3"),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\nvn 0 0 1\nf 1//1 2//1 3//7\n", r"names a normal outside 1\.\.1"),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1//1 2//1 3//1\n", r"names a normal outside 1\.\.0"),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\nvn 0 0 1\nf 1//0 2//1 3//1\n", "names vertex 1//0, they count from 1"),
        ("v 0 0 0\nv 1 x 0\nv 0 1 0\nf 1 2 3\n", "line 2: 'x' is not a number"),
        ("v 0 0 0\nv 1 0 0\nf 1 2\n", "line 3: a face of 2 corners"),
        ("v 0 0 0\nv nan 0 0\n", "point 1 is not finite"),
    ],
)
def test_an_obj_is_refused_for_the_true_reason(text: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"a\.obj: .*{match}"):
        cloud(tmp_path / "a.obj", text)


@pytest.mark.parametrize(
    ("rows", "fields", "warning"),
    [
        ("v 0.5 1 2 1 0 0.25\nv 3 4 5 0 1 0.5\n", {"red": [1, 0], "blue": [0.25, 0.5]}, ""),
        ("v 0.5 1 2 255 0 7\nv 3 4 5 0 255 9\n", {"red": [255, 0], "blue": [7, 9]}, ""),
        ("v 0.5 1 2 1 0 0\nv 3 4 5\n", {}, "only 1 of 2 vertices have colours; they are left out"),
        ("v 0.5 1 2\nvn 0 0 1\nv 3 4 5\nvn 1 0 0\n", {"nx": [0, 1], "nz": [1, 0]}, ""),  # MeshLab
        ("v 0.5 1 2\nv 3 4 5\nvn 1 0 0\n", {}, "1 normals do not fit 2 vertices; they are left out"),
    ],
)
def test_points_of_an_obj_without_faces(
    rows: str, fields: dict[str, list[float]], warning: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = cloud(tmp_path / "a.obj", "# MeshLab\n\n" + rows + "# 2 vertices\n")
    np.testing.assert_array_equal(table.points, XYZ)
    for name, values in fields.items():
        np.testing.assert_array_equal(table.fields[name], values)
    assert bool(table.fields) == bool(fields)
    assert (warning in caplog.text) if warning else not caplog.text


PLY = (
    "ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nproperty float y\nproperty float z\n"
    "end_header\n0.5 1 2\n3 4 5\n"
)
PCD = (
    "VERSION .7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH 2\nHEIGHT 1\n"
    "POINTS 2\nDATA ascii\n0.5 1 2\n3 4 5\n"
)
STL = (
    "solid a\nfacet normal 0 0 1\nouter loop\nvertex 0 0 0\nvertex 1 0 0\nvertex 0 1 0\n"
    "endloop\nendfacet\nendsolid a\n"
)
TEXTS = {
    ".obj": "# made in X\nv 0.5 1 2\nv 3 4 5\n",
    ".ply": PLY.replace("element", "comment made in X\nelement", 1),
    ".off": "OFF\n# made in X\n2 0 0\n0.5 1 2\n3 4 5\n",
    ".xyz": "# made in X\n0.5 1 2\n3 4 5\n",
    ".csv": "x,y,z,X\n0.5,1,2,7\n3,4,5,8\n",
    ".pcd": "# made in X\n" + PCD,
    ".stl": STL.replace("solid a", "solid X"),
}


@pytest.mark.parametrize("suffix", TEXTS)
@pytest.mark.parametrize(
    ("encoding", "word"),
    [
        ("latin-1", "Größe"),
        ("cp1252", "… end"),  # its byte is the end of a line to Unicode
        ("gbk", "点云表"),
        ("shift-jis", "表"),  # ends in a backslash
        ("utf-16", "Größe 点"),
        ("utf-8-sig", "点"),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_comments_and_names_in_any_encoding(
    suffix: str, encoding: str, word: str, end: str, tmp_path: Path
) -> None:
    data = TEXTS[suffix].replace("X", word).replace("\n", end).encode(encoding)
    (tmp_path / f"a{suffix}").write_bytes(data)
    if suffix == ".stl":
        np.testing.assert_array_equal(read_mesh(tmp_path / "a.stl").area, 0.5)
    else:
        np.testing.assert_array_equal(read_cloud(tmp_path / f"a{suffix}"), XYZ)


def test_a_column_named_in_utf16_keeps_its_name(tmp_path: Path) -> None:
    table = cloud(tmp_path / "a.csv", "x,y,z,点\n0.5,1,2,7\n3,4,5,8\n".encode("utf-16"))
    assert table.fields["点"].tolist() == [7, 8]


@pytest.mark.parametrize("suffix", [".obj", ".off", ".xyz", ".csv", ".stl"])
def test_bytes_are_no_text(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a{suffix}").write_bytes(b"solid \xff\xd8" + bytes(range(32)) * 9)
    with pytest.raises(DataError, match=r"not a text file: it holds the byte 0|declares .* triangles, has"):
        read_cloud(tmp_path / f"a{suffix}")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("element", "obj_info num_cols 400\nelement"),
        ("element", "Created by Scanner 1.2\n\nelement"),
        ("format ascii 1.0", "format ascii 1.0 "),
        ("ply\n", "ply \n"),
        ("element", "comment end_header comes later\nelement"),
        ("end_header", "end_header "),
        ("float", "double"),
        ("float", "float32"),
        ("0.5 1 2\n", "0.5 1 2 \n\n"),
    ],
)
def test_lines_of_a_ply_that_say_nothing_of_its_points(old: str, new: str, tmp_path: Path) -> None:
    np.testing.assert_array_equal(
        cloud(tmp_path / "a.ply", PLY.replace(old, new, 1 + (old == "float") * 2)).points, XYZ
    )


def test_ignored_lines_of_a_ply_are_logged_for_debugging(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG"):
        cloud(tmp_path / "a.ply", PLY.replace("element", "Created by Scanner 1.2\nelement"))
    (record,) = [record for record in caplog.records if "Scanner" in record.getMessage()]
    assert record.levelname == "DEBUG"
    assert "a.ply: the line 'Created by Scanner 1.2' of its header is ignored" in record.getMessage()


def test_padding_behind_a_binary_ply(tmp_path: Path) -> None:
    header = PLY[: PLY.index("0.5 1 2")].replace("ascii", "binary_little_endian").encode()
    data = header + np.float32(XYZ).tobytes()
    np.testing.assert_array_equal(cloud(tmp_path / "a.ply", data + b"\0\0").points, XYZ)
    with pytest.raises(DataError, match="2 bytes follow what its header declares"):
        cloud(tmp_path / "a.ply", data + b"xx")


def test_a_binary_ply_with_carriage_returns_in_its_header(tmp_path: Path) -> None:
    header = PLY[: PLY.index("0.5 1 2")].replace("ascii", "binary_little_endian")
    body = b"\n" + np.float32(XYZ).tobytes()[1:]  # x begins with the byte of a newline
    for end in ("\n", "\r\n", "\r"):
        points = cloud(tmp_path / "a.ply", header.replace("\n", end).encode() + body).points
        np.testing.assert_array_equal(points[:, 1:], np.float64(XYZ)[:, 1:])


def test_a_ply_with_lists_alpha_and_doubles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = PLY.replace("float", "double").replace(
        "end_header",
        "property uchar red\nproperty uchar alpha\nproperty int64 id\n"
        "property list uchar int near\nend_header",
    )
    text = text.replace("0.5 1 2", "0.5 1 2 9 255 5000000000 2 0 1").replace("3 4 5", "3 4 5 8 254 6 0")
    table = cloud(tmp_path / "a.ply", text)
    np.testing.assert_array_equal(table.points, XYZ)
    assert {name: values.tolist() for name, values in table.fields.items()} == {
        "red": [9, 8], "alpha": [255, 254], "id": [5_000_000_000, 6],
    }  # fmt: skip
    assert "near" in caplog.text


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".xyz", "0.5 1 2\nnan nan nan\n3 4 5\n"),
        (".csv", "x,y,z\n0.5,1,2\nNaN,NaN,NaN\n3,4,5\n"),
        (".xyz", "0.5 1 2\n-nan(ind) -nan(ind) -nan(ind)\n3 4 5\n"),
        (".pts", "3\n0.5 1 2\n1.#QNAN 1.#QNAN 1.#QNAN\n3 4 5\n"),
        (".ply", PLY.replace("vertex 2", "vertex 3").replace("3 4 5", "nan nan nan\n3 4 5")),
        (
            ".pcd",
            PCD.replace("WIDTH 2", "WIDTH 3")
            .replace("POINTS 2", "POINTS 3")
            .replace("3 4 5", "nan nan nan\n3 4 5"),
        ),
    ],
)
def test_rows_where_a_scanner_saw_nothing(
    suffix: str, text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    np.testing.assert_array_equal(cloud(tmp_path / f"a{suffix}", text).points, XYZ)
    assert f"a{suffix}: 1 of 3 points have no coordinates (NaN) and are left out" in caplog.text


@pytest.mark.parametrize(
    ("suffix", "text", "fields"),
    [
        (".txt", "//X Y Z R\n2\n0.5 1 2 255\n3 4 5 7\n", {"R": [255, 7]}),  # CloudCompare
        (".csv", "//X,Y,Z,Scalar field\r\n0.5,1,2,0.25\r\n3,4,5,nan\r\n", {"Scalar field": [0.25, np.nan]}),
        (".csv", "sep=;\nx;y;z\n0.5;1;2\n3;4;5\n", {}),  # for Excel
        (".csv", "X (m),Y (m),Z (m),I [dB]\n0.5,1,2,6\n3,4,5,7\n", {"I [dB]": [6, 7]}),
        (".xyz", "% MATLAB\n0.5 1 2\n3 4 5\n", {}),
        (".xyz", "! Fortran\n 0.5000E+00 1.0 2.0\n 3.0 4.0 5.0\n", {}),
        (".xyz", "0.5 1 2\r\n3 4 5\r\n\x1a", {}),  # DOS
        (".pts", "2\r\n0.5 1 2 -1500 10 20 30\r\n3 4 5 -1400 1 2 3\r\n", {"column_3": [-1500, -1400]}),
        (".xyz", "0.5 1 2 9007199254740993\n3 4 5 6\n", {"column_3": [9007199254740993, 6]}),
        (".pcd", PCD.replace("FIELDS", "COLUMNS"), {}),  # version .5
        (".pcd", PCD + "# end\n", {}),
        (
            ".pcd",  # by NumPy's savetxt
            PCD.replace("x y z", "x y z label").replace("SIZE", "SIZE").replace("4 4 4\n", "4 4 4 4\n")
            .replace("F F F", "F F F U").replace("1 1 1", "1 1 1 1")
            .replace("0.5 1 2", "0.5 1 2 7.000000e+00").replace("3 4 5", "3 4 5 1.200000e+01"),
            {"label": [7, 12]},
        ),
        (".off", "NCOFF 2 0\n0.5 1 2 255 0 7 9 0 0 1\n3 4 5 1 2 3 9 1 0 0\n", {"blue": [7, 3], "nx": [0, 1]}),
        (".off", "CNOFF 2 0\n0.5 1 2 0 0 1 255 0 7 9\n3 4 5 1 0 0 1 2 3 9\n", {"blue": [7, 3], "nx": [0, 1]}),
        (".off", "STOFF\n2 0 0\n0.5 1 2 0 1\n3 4 5 1 0\n", {"t": [1, 0]}),
        (".off", "off\n2 0 0\n0.5 1 2\n3 4 5\n", {}),
    ],
)  # fmt: skip
def test_points_of_other_programs(
    suffix: str, text: str, fields: dict[str, list[float]], tmp_path: Path
) -> None:
    table = cloud(tmp_path / f"a{suffix}", text)
    np.testing.assert_array_equal(table.points, XYZ)
    for name, values in fields.items():
        np.testing.assert_array_equal(table.fields[name], values)


def binary_stl(count: int, declared: int, more: bytes = b"", head: bytes = b"exported") -> bytes:
    corners = np.zeros((count, 12), "<f4")
    corners[:, 3:] = np.random.default_rng(0).normal(size=(count, 9))
    body = b"".join(row.tobytes() + b"\0\0" for row in corners)
    return head.ljust(80, b"\0") + struct.pack("<I", declared) + body + more


@pytest.mark.parametrize("more", [b"\0\0", b"\r\n", b"xx", bytes(512)])
@pytest.mark.parametrize("head", [b"exported", b"solid of a program"])
def test_bytes_behind_the_last_triangle(more: bytes, head: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.stl").write_bytes(binary_stl(320, 320, more, head))
    assert len(read_mesh(tmp_path / "a.stl").faces) == 320


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (binary_stl(319, 320), "declares 320 triangles, has 319"),
        (binary_stl(320, 320)[:-2], "declares 320 triangles, has 319"),
        (binary_stl(319, 320, head=b"solid"), "declares 320 triangles, has 319"),
        (binary_stl(320, 10), "declares 10 triangles, has 320"),
    ],
)
def test_an_stl_of_another_number_of_triangles(data: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "a.stl").write_bytes(data)
    with pytest.raises(DataError, match=match):
        read_mesh(tmp_path / "a.stl")


Json = dict[str, Any]
TYPES = {1: "SCALAR", 3: "VEC3", 4: "VEC4"}
CODES = {"int8": 5120, "uint8": 5121, "int16": 5122, "uint16": 5123, "uint32": 5125, "float32": 5126}
CORNERS = np.float32([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
INDEX = np.uint16([[0], [1], [2], [0], [1], [3]])


def glb(
    attributes: dict[str, NDArray[Any]], index: NDArray[Any] | None = None, mode: int = 4, **changes: Any
) -> bytes:
    """A file of one node, mesh and primitive; ``changes`` are parts of the document, or of its primitive."""
    binary, views, accessors = b"", list[Json](), list[Json]()
    for name, values in [*attributes.items(), *([("", index)] if index is not None else [])]:
        views.append({"buffer": 0, "byteOffset": len(binary), "byteLength": values.nbytes})
        accessors.append({
            "bufferView": len(accessors), "componentType": CODES[values.dtype.name],
            "count": len(values), "type": TYPES[values.shape[1]],
            "normalized": name in changes.get("normalized", ()),
        })  # fmt: skip
        binary += values.tobytes() + b"\0" * (-values.nbytes % 4)
    primitive: Json = {"mode": mode, "attributes": {name: number for number, name in enumerate(attributes)}}
    if index is not None:
        primitive["indices"] = len(attributes)
    primitive |= changes.pop("primitive", {})
    changes.pop("normalized", None)
    document = {
        "asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}], "accessors": accessors, "bufferViews": views,
        "buffers": [{"byteLength": len(binary)}], **changes,
    }  # fmt: skip
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<II", len(text), 0x4E4F534A) + text + struct.pack("<II", len(binary), 0x004E4942)
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks) + len(binary)) + chunks + binary


MESH = {"POSITION": CORNERS}
TRANSFORM = {"KHR_texture_transform": {"scale": [2, 2]}}
LOOKS = {
    "materials": [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0, "extensions": TRANSFORM}}}],
    "textures": [{"extensions": {"EXT_texture_webp": {"source": 0}}}],
    "images": [{"uri": "gone.webp"}],
    "extensions": {"KHR_materials_variants": {"variants": [{"name": "red"}]}},
    "primitive": {"material": 0, "extensions": {"KHR_materials_variants": {"mappings": []}}},
}


@pytest.mark.parametrize("where", ["extensionsUsed", "extensionsRequired"])
@pytest.mark.parametrize(
    "name", ["KHR_texture_transform", "EXT_texture_webp", "KHR_materials_variants", "KHR_lights_punctual"]
)
def test_a_glb_with_extensions_for_its_looks(where: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "a.glb").write_bytes(glb(MESH, INDEX, **{where: [name], **LOOKS}))
    mesh = read_mesh(tmp_path / "a.glb")
    np.testing.assert_array_equal(mesh.vertices, CORNERS)
    np.testing.assert_array_equal(mesh.faces, [[0, 1, 2], [0, 1, 3]])


DRACO = {"KHR_draco_mesh_compression": {"bufferView": 0, "attributes": {"POSITION": 0}}}
EMPTY = [
    {"componentType": 5126, "count": 4, "type": "VEC3"},
    {"componentType": 5123, "count": 6, "type": "SCALAR"},
]
MESHOPT = {
    "EXT_meshopt_compression": {
        "buffer": 0,
        "byteLength": 9,
        "byteStride": 12,
        "count": 4,
        "mode": "ATTRIBUTES",
    }
}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"extensionsRequired": ["KHR_draco_mesh_compression"]},
            "it needs the extension KHR_draco_mesh_compression",
        ),
        (
            {"extensionsRequired": ["EXT_meshopt_compression"]},
            "it needs the extension EXT_meshopt_compression",
        ),
        (
            {"primitive": {"extensions": DRACO}, "accessors": EMPTY},
            "compressed by KHR_draco_mesh_compression",
        ),
        (
            {
                "bufferViews": [{"buffer": 1, "byteLength": 48, "extensions": MESHOPT}] * 2,
                "buffers": [{}, {}],
            },
            "compressed by EXT_meshopt_compression",
        ),
        ({"nodes": [{"mesh": 0, "children": [0]}]}, "its nodes are not a tree"),
        ({"primitive": {"mode": 6}}, "triangle fans are not read"),
        ({"primitive": {"mode": 1}}, "neither points nor triangles"),
        ({"accessors": EMPTY, **LOOKS}, "empty and sparse accessors are not read"),
    ],
)
def test_a_glb_is_refused_for_the_true_reason(changes: Json, match: str, tmp_path: Path) -> None:
    (tmp_path / "a.glb").write_bytes(glb(MESH, INDEX, **changes))
    with pytest.raises(DataError, match=rf"a\.glb: .*{match}"):
        read_cloud(tmp_path / "a.glb")


@pytest.mark.parametrize(
    ("stored", "normalized"),
    [
        (np.uint16(CORNERS * 65535), True),
        (np.int16(CORNERS * 32767), True),
        (np.uint8(CORNERS * 255), True),
        (np.uint16(CORNERS * 500), False),
    ],
)  # fmt: skip
def test_quantised_positions(stored: NDArray[Any], normalized: bool, tmp_path: Path) -> None:
    node = {"mesh": 0, "scale": [2, 2, 2] if normalized else [0.004] * 3, "translation": [1, 0, 0]}
    padded = np.zeros((4, 4), stored.dtype)  # rows begin at multiples of four bytes
    padded[:, :3] = stored
    stride = {"buffer": 0, "byteLength": padded.nbytes, "byteStride": padded.itemsize * 4}
    data = glb({"POSITION": padded}, INDEX, nodes=[node], normalized=("POSITION",) * normalized,
               extensionsRequired=["KHR_mesh_quantization"])  # fmt: skip
    at = data.index(b'"type": "VEC4"')
    data = data[:at] + b'"type": "VEC3"' + data[at + 14 :]
    old = json.dumps({"buffer": 0, "byteOffset": 0, "byteLength": padded.nbytes}).encode()
    assert old in data
    data = data.replace(old, json.dumps(stride).encode().ljust(len(old)))
    (tmp_path / "a.glb").write_bytes(data)
    np.testing.assert_allclose(read_mesh(tmp_path / "a.glb").vertices, 2 * CORNERS + [1, 0, 0], rtol=1e-12)


TURN = [np.sqrt(0.5), 0, 0, np.sqrt(0.5)]  # y becomes z


def test_points_of_a_glb_with_all_their_attributes_in_the_frame_of_the_scene(tmp_path: Path) -> None:
    colours = np.arange(16, dtype=np.uint8).reshape(4, 4)
    attributes = {
        "POSITION": CORNERS, "NORMAL": CORNERS[[1, 2, 3, 2]], "COLOR_0": colours,
        "_LABEL": np.float32([[4], [5], [6], [7]]), "TEXCOORD_0": CORNERS,
    }  # fmt: skip
    nodes = [{"children": [1], "rotation": TURN, "camera": 0}, {"mesh": 0, "translation": [0, 0, 3]}]
    table = cloud(tmp_path / "a.glb", glb(attributes, mode=0, nodes=nodes, normalized=("COLOR_0",)))
    x, y, z = CORNERS.T
    np.testing.assert_allclose(table.points, np.stack([x, -(z + 3), y], axis=1), atol=1e-12)
    np.testing.assert_allclose(
        table.fields["normals"], [[1, 0, 0], [0, 0, 1], [0, -1, 0], [0, 0, 1]], atol=1e-7
    )
    np.testing.assert_array_equal(table.fields["colors"], colours)
    assert table.fields["LABEL"].tolist() == [4, 5, 6, 7]
    assert set(table.fields) == {"normals", "colors", "LABEL"}


def test_a_mesh_of_a_glb_has_attributes_too(tmp_path: Path) -> None:
    attributes = {"POSITION": CORNERS, "_LABEL": np.float32([[4], [5], [6], [7]])}
    table = cloud(tmp_path / "a.glb", glb(attributes, INDEX), mesh_points=100)
    assert set(table.fields["LABEL"][table.points[:, 1] > 0.6]) == {6}


def test_strips_scenes_that_are_not_named_and_bytes_at_the_end(tmp_path: Path) -> None:
    strip = glb(MESH, np.uint16([[0], [1], [2], [3]]), mode=5, scenes=[], extras={"a": 1})
    (tmp_path / "a.glb").write_bytes(strip + b"\0\0")
    mesh = read_mesh(tmp_path / "a.glb")
    assert sorted(map(sorted, mesh.faces.tolist())) == [[0, 1, 2], [1, 2, 3]]


def test_a_mesh_that_is_placed_too_often_is_refused(tmp_path: Path) -> None:
    nodes = [{"mesh": 0} for _ in range(1000)]
    (tmp_path / "a.glb").write_bytes(glb(MESH, INDEX, nodes=nodes, scenes=[{"nodes": list(range(1000))}]))
    assert len(read_mesh(tmp_path / "a.glb").vertices) == 4000
    with pytest.raises(DataError, match="more than the limit of 3000"):
        read_mesh(tmp_path / "a.glb", max_points=3000)


def test_accessors_that_share_a_buffer_are_counted_each(tmp_path: Path) -> None:
    attributes = {"POSITION": np.zeros((1000, 3), np.float32)}
    more = {f"_A{number}": 0 for number in range(100)}
    data = glb(attributes, mode=0, primitive={"attributes": {"POSITION": 0, **more}})
    (tmp_path / "a.glb").write_bytes(data)
    with pytest.raises(DataError, match=r"bytes, more than the limit of 32000"):
        read_cloud(tmp_path / "a.glb", max_points=1000)
