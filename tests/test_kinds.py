"""Formats against hand-made files and against other writers and readers."""

from __future__ import annotations

import dataclasses
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import trimesh

from ifdefense.data.formats import (
    DataError,
    pcd,
    read_cloud,
    read_cloud_file,
    read_mesh,
    write_cloud,
    write_cloud_file,
    write_mesh,
)
from ifdefense.geometry.mesh import Mesh

POINTS = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
BOX = trimesh.creation.box((1, 1, 1))
PCD_HEADER = """# .PCD v.7 - Point Cloud Data file format
VERSION .7
FIELDS x y z rgb
SIZE 4 4 4 4
TYPE F F F F
COUNT 1 1 1 1
WIDTH 3
HEIGHT 1
VIEWPOINT 0 0 0 1 0 0 0
POINTS 3
"""


def test_an_ascii_pcd_as_pcl_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "a.pcd"
    path.write_text(PCD_HEADER + "DATA ascii\n0.5 0 1 4.2108e+06\n1 2 3 4.2108e+06\n-1 0 1 4.808e+06\n")
    (cloud,) = read_cloud_file(path).clouds
    np.testing.assert_array_equal(cloud.points, [[0.5, 0, 1], [1, 2, 3], [-1, 0, 1]])
    np.testing.assert_array_equal(cloud.fields["rgb"], np.float32([4.2108e06, 4.2108e06, 4.808e06]))


def test_a_binary_pcd_with_padding(tmp_path: Path) -> None:
    header = (
        PCD_HEADER.replace("x y z rgb", "x y z _ curvature")
        .replace("VIEWPOINT 0 0 0", "VIEWPOINT 1 2 3")
        .replace("SIZE 4 4 4 4", "SIZE 4 4 4 1 8")
        .replace("F F F F", "F F F U F")
        .replace("COUNT 1 1 1 1", "COUNT 1 1 1 4 1")
    )
    rows = [(0.5, 0, 1), (1, 2, 3), (-1, 0, 1)]
    body = b"".join(struct.pack("<fff4xd", *row, index) for index, row in enumerate(rows))
    (tmp_path / "a.pcd").write_bytes(header.encode() + b"DATA binary\n" + body)
    file = read_cloud_file(tmp_path / "a.pcd")
    np.testing.assert_array_equal(file.clouds[0].points, rows)
    assert {name: values.tolist() for name, values in file.clouds[0].fields.items()} == {
        "curvature": [0, 1, 2]
    }
    write_cloud_file(tmp_path / "b.pcd", file)
    assert b"VIEWPOINT 1 2 3 1 0 0 0\nPOINTS 3\nDATA binary\n" in (tmp_path / "b.pcd").read_bytes()
    np.testing.assert_array_equal(read_cloud(tmp_path / "b.pcd"), rows)


def test_lzf_unpacks_runs_and_overlapping_copies() -> None:
    # "ab" as it is; 9 bytes from 2 back: "ababababa"; 12 bytes from 1 back by the long form.
    packed = b"\x01ab" + bytes([7 << 5, 0, 1]) + bytes([7 << 5, 3, 0])
    assert pcd.unpack_lzf(packed, 23) == b"ab" + b"ababababa" + b"a" * 12
    for damaged in (packed[:-1], b"\x05ab", bytes([1 << 5, 5]), packed + b"\x00z"):
        with pytest.raises(DataError, match=r"damaged|truncated"):
            pcd.unpack_lzf(damaged, 23)


def test_a_compressed_pcd(tmp_path: Path) -> None:
    # Field after field; the three values of z are one value and a copy of it.
    fields = np.float32([[0.5, 1, -1], [0, 2, 0]]).tobytes() + np.float32([7, 7, 7]).tobytes()
    packed = bytes([23]) + fields[:24] + bytes([3]) + fields[24:28] + bytes([6 << 5, 3])
    header = PCD_HEADER.replace(" rgb", "").replace("4 4 4 4", "4 4 4").replace("F F F F", "F F F")
    header = header.replace("1 1 1 1", "1 1 1") + "DATA binary_compressed\n"
    (tmp_path / "a.pcd").write_bytes(header.encode() + struct.pack("<II", len(packed), 36) + packed)
    np.testing.assert_array_equal(read_cloud(tmp_path / "a.pcd"), [[0.5, 0, 7], [1, 2, 7], [-1, 0, 7]])


def test_points_that_a_sensor_missed_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = PCD_HEADER.replace("WIDTH 3", "WIDTH 1").replace("HEIGHT 1", "HEIGHT 3")
    (tmp_path / "a.pcd").write_text(text + "DATA ascii\n1 2 3 7\nnan nan nan 8\n4 5 6 9\n")
    (cloud,) = read_cloud_file(tmp_path / "a.pcd").clouds
    np.testing.assert_array_equal(cloud.points, [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(cloud.fields["rgb"], [7, 9])
    assert "a.pcd: 1 of 3 points have no coordinates" in caplog.text
    (tmp_path / "a.pcd").write_text(text + "DATA ascii\n1 2 3 7\n1 nan 3 8\n4 5 6 9\n")
    with pytest.raises(DataError, match="point 1 is not finite"):
        read_cloud(tmp_path / "a.pcd")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda text: text.replace("POINTS 3", "POINTS 4"), "WIDTH x HEIGHT is 3, POINTS 4"),
        (lambda text: text.rsplit("\n", 2)[0] + "\n", "declares 3 points, has 2"),
        (lambda text: text.replace("SIZE 4 4 4 4", "SIZE 4 4 4"), "differ in length"),
        (lambda text: text.replace("TYPE F F F F", "TYPE F F F X"), "type X of size 4"),
        (lambda text: text.replace("FIELDS x y z", "FIELDS a y z"), "no column x among a, y, z, rgb"),
        (lambda text: text.replace("1 2 3 7", "1 2 3"), "point 0 has 3 values, not 4"),
        (lambda text: text.replace("VERSION .7\n", "VERSON .7\n"), "its header has the line 'VERSON .7'"),
        (lambda text: text.replace("DATA ascii", "DATA zip"), "DATA zip"),
    ],
)
def test_a_pcd_that_contradicts_itself_is_refused(change, match, tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "a.pcd"
    path.write_text(change(PCD_HEADER + "DATA ascii\n1 2 3 7\n2 3 4 8\n4 5 6 9\n"))
    with pytest.raises(DataError, match=rf"a\.pcd: .*{match}"):
        read_cloud(path)


@pytest.mark.parametrize("suffix", [".ply", ".pcd"])
def test_text_stays_text(suffix: str, tmp_path: Path) -> None:
    write_cloud(tmp_path / f"a{suffix}", POINTS, fields={"label": np.arange(50)})
    file = read_cloud_file(tmp_path / f"a{suffix}")
    text = dataclasses.replace(file, layout=dataclasses.replace(file.layout, text=True))
    write_cloud_file(tmp_path / f"b{suffix}", text)
    assert (tmp_path / f"b{suffix}").read_bytes().isascii()
    again = read_cloud_file(tmp_path / f"b{suffix}")
    assert again.layout.text
    np.testing.assert_array_equal(again.clouds[0].points.astype(np.float32), POINTS)
    np.testing.assert_array_equal(again.clouds[0].fields["label"], np.arange(50))


def test_trimesh_reads_our_glb_and_we_its(tmp_path: Path) -> None:
    colours = np.random.default_rng(1).integers(0, 255, (50, 3)).astype(np.uint8)
    fields = {name: colours[:, index] for index, name in enumerate(("red", "green", "blue"))}
    write_cloud(tmp_path / "a.glb", POINTS, fields=fields)
    (theirs,) = trimesh.load(tmp_path / "a.glb").geometry.values()
    np.testing.assert_array_equal(theirs.vertices, POINTS)
    np.testing.assert_array_equal(np.asarray(theirs.colors)[:, :3], colours)
    np.testing.assert_array_equal(
        read_cloud_file(tmp_path / "a.glb").clouds[0].fields["colors"][:, :3], colours
    )

    trimesh.PointCloud(POINTS).export(tmp_path / "b.glb")
    np.testing.assert_array_equal(read_cloud(tmp_path / "b.glb"), POINTS)


def test_the_meshes_of_a_scene_are_put_where_they_belong(tmp_path: Path) -> None:
    scene = trimesh.Scene()
    turn = trimesh.transformations.rotation_matrix(0.3, (1, 2, 3))
    turn[:3, 3] = 4, 5, 6
    scene.add_geometry(BOX, node_name="first")
    ball = trimesh.creation.icosphere(1)
    scene.add_geometry(ball, node_name="second", parent_node_name="first", transform=turn)
    scene.export(tmp_path / "a.glb")
    mesh = read_mesh(tmp_path / "a.glb")
    expected = scene.to_mesh()
    assert len(mesh.faces) == len(expected.faces)
    np.testing.assert_allclose(
        np.sort(mesh.face_normals().sum(0)), np.sort(expected.face_normals.sum(0)), atol=1e-5
    )
    np.testing.assert_allclose(mesh.vertices.min(0), expected.bounds[0], atol=1e-6)
    np.testing.assert_allclose(mesh.vertices.max(0), expected.bounds[1], atol=1e-6)
    assert mesh.volume == pytest.approx(expected.volume, rel=1e-5)


def test_a_glb_refers_to_no_other_file(tmp_path: Path) -> None:
    write_cloud(tmp_path / "a.glb", POINTS)
    data = (tmp_path / "a.glb").read_bytes()
    changed, count = re.subn(rb'"buffers":\[{"byteLength":\d{3}}]', rb'"buffers":[{"uri":"a.txt"}]   ', data)
    assert count == 1
    (tmp_path / "a.glb").write_bytes(changed)
    with pytest.raises(DataError, match="refers to another file"):
        read_cloud(tmp_path / "a.glb")


def test_a_glb_too_far_out_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.glb: .* float32, which would blur"):
        write_cloud(tmp_path / "a.glb", POINTS.astype(np.float64) + 5e6)
    assert not list(tmp_path.iterdir())


def test_an_obj_of_two_materials_is_one_mesh(tmp_path: Path) -> None:
    (tmp_path / "a.obj").write_text(
        "mtllib a.mtl\no first\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvn 0 0 1\n"
        "usemtl red\nf 1/1/1 2/1/1 3/1/1\no second\nv 0 0 1 # a comment\n"
        "usemtl blue\nf 1//1 2//1 -1//1\ns off\nl 1 2\n"
    )
    mesh = read_mesh(tmp_path / "a.obj")
    np.testing.assert_array_equal(mesh.vertices, [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(mesh.faces, [[0, 1, 2], [0, 1, 3]])


def test_an_ascii_stl_of_two_solids_is_one_mesh(tmp_path: Path) -> None:
    corners = BOX.vertices[BOX.faces]
    facets = [
        "facet normal 0 0 1\n outer loop\n"
        + "".join(f"  vertex {x:.6e} {y:.6e} {z:.6e}\n" for x, y, z in triangle.tolist())
        + " endloop\nendfacet\n"
        for triangle in corners
    ]
    (tmp_path / "a.stl").write_text(
        f"solid lower part\n{''.join(facets[:6])}endsolid lower part\nsolid\n{''.join(facets[6:])}endsolid\n"
    )
    mesh = read_mesh(tmp_path / "a.stl")
    assert len(mesh.vertices) == 8
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(1)


def test_a_binary_stl_may_begin_with_solid(tmp_path: Path) -> None:
    write_mesh(tmp_path / "a.stl", Mesh(BOX.vertices, BOX.faces))
    data = (tmp_path / "a.stl").read_bytes()
    (tmp_path / "a.stl").write_bytes(b"solid " + data[6:])
    assert read_mesh(tmp_path / "a.stl").is_watertight


@pytest.mark.parametrize("suffix", [".ply", ".off", ".obj", ".stl", ".glb"])
@pytest.mark.parametrize("encoding", ["default", "ascii"])
def test_meshes_of_trimesh_are_read(suffix: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    kind = suffix[1:] if encoding == "default" or suffix != ".stl" else "stl_ascii"
    options = {"encoding": "ascii"} if encoding == "ascii" and suffix == ".ply" else {}
    BOX.export(path, file_type=kind, **options)
    mesh = read_mesh(path)
    assert len(mesh.vertices) == 8
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(1)


@pytest.mark.parametrize("suffix", [".ply", ".off", ".obj"])
def test_a_mesh_far_from_the_origin_keeps_its_detail(suffix: str, tmp_path: Path) -> None:
    far = BOX.vertices + np.array([500_000.123, 5_000_000.456, 100])
    write_mesh(tmp_path / f"a{suffix}", Mesh(far, BOX.faces))
    np.testing.assert_array_equal(read_mesh(tmp_path / f"a{suffix}").vertices, far)
    points = read_cloud(tmp_path / f"a{suffix}", mesh_points=500)
    np.testing.assert_allclose(np.abs(points - far.mean(0)).max(1), 0.5, atol=1e-6)


BIG_ENDIAN = (
    b"ply\r\nformat binary_big_endian 1.0\r\ncomment by hand\r\nelement camera 1\r\nproperty double focus\r\n"
    b"element vertex 2\r\nproperty uchar kind\r\nproperty double x\r\nproperty double y\r\n"
    b"property double z\r\nelement face 0\r\nproperty list uchar int vertex_index\r\nend_header\r\n"
    + struct.pack(">d", 35)
    + struct.pack(">Bddd", 7, 0.5, 1.5, 2.5)
    + struct.pack(">Bddd", 9, 3.5, 4.5, 5.5)
)


def test_a_big_endian_ply_with_other_elements(tmp_path: Path) -> None:
    (tmp_path / "a.ply").write_bytes(BIG_ENDIAN)
    (cloud,) = read_cloud_file(tmp_path / "a.ply").clouds
    np.testing.assert_array_equal(cloud.points, [[0.5, 1.5, 2.5], [3.5, 4.5, 5.5]])
    assert cloud.fields["kind"].tolist() == [7, 9]
    for length in range(len(BIG_ENDIAN)):
        (tmp_path / "a.ply").write_bytes(BIG_ENDIAN[:length])
        with pytest.raises(DataError, match=r"a\.ply"):
            read_cloud(tmp_path / "a.ply")


def test_faces_of_mixed_size_with_attributes(tmp_path: Path) -> None:
    head = (
        "ply\nformat {} 1.0\nelement vertex 5\nproperty float x\nproperty float y\nproperty float z\n"
        "element face 2\nproperty list uchar uint vertex_indices\nproperty float quality\nend_header\n"
    )
    corners = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 0, 1)]
    text = "".join(f"{x} {y} {z}\n" for x, y, z in corners) + "4 0 1 2 3 0.5\n3 0 1 4 0.25\n"
    (tmp_path / "a.ply").write_text(head.format("ascii") + text)
    body = np.float32(corners).tobytes()
    body += struct.pack("<B4If", 4, 0, 1, 2, 3, 0.5) + struct.pack("<B3If", 3, 0, 1, 4, 0.25)
    (tmp_path / "b.ply").write_bytes(head.format("binary_little_endian").encode() + body)
    for name in ("a.ply", "b.ply"):
        np.testing.assert_array_equal(read_mesh(tmp_path / name).faces, [[0, 1, 2], [0, 2, 3], [0, 1, 4]])


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("OFF\n2 0 0\n0 1 2\n3 4 5\n", {}),
        ("COFF\n2 0 0\n0 1 2 255 0 7 255\n3 4 5 1 2 3 4\n", {"red": [255, 1], "alpha": [255, 4]}),
        ("NOFF # normals\n2 0\n0 1 2 0 0 1\n3 4 5 1 0 0\n", {"nx": [0, 1], "nz": [1, 0]}),
        ("OFF 2 0 0\n0 1 2\n3 4 5\n", {}),
        ("OFF2 0 0\n0 1 2\n3 4 5\n", {}),
    ],
)
def test_variants_of_off(text: str, fields: dict[str, list[float]], tmp_path: Path) -> None:
    (tmp_path / "a.off").write_text(text)
    (cloud,) = read_cloud_file(tmp_path / "a.off").clouds
    np.testing.assert_array_equal(cloud.points, [[0, 1, 2], [3, 4, 5]])
    for name, values in fields.items():
        assert cloud.fields[name].tolist() == values


def test_samples_of_a_mesh_have_the_attributes_of_its_vertices(tmp_path: Path) -> None:
    (tmp_path / "a.ply").write_text(
        "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
        "property int part\nelement face 1\nproperty list uchar int vertex_indices\nend_header\n"
        "0 0 0 5\n1 0 0 6\n0 1 0 7\n3 0 1 2\n"
    )
    (cloud,) = read_cloud_file(tmp_path / "a.ply", mesh_points=200).clouds
    right, left = cloud.points[:, 0] > 0.6, cloud.points[:, 1] > 0.6
    assert set(cloud.fields["part"][right]) == {6}
    assert set(cloud.fields["part"][left]) == {7}
