"""Files of clouds and meshes: round trips, and errors on damaged files."""

from __future__ import annotations

import sys

import h5py
import numpy as np
import pytest
import torch
import trimesh
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ifdefense.data.formats import (
    BATCH_SUFFIXES,
    MESH_SUFFIXES,
    WRITABLE_SUFFIXES,
    DataError,
    read_cloud,
    read_clouds,
    read_mesh,
    replacing,
    write_cloud,
    write_clouds,
    write_mesh,
)
from ifdefense.geometry.mesh import Mesh

WRITABLE = WRITABLE_SUFFIXES
CUBE = trimesh.creation.box((1, 1, 1))
TRIANGLE_TO_VERTEX_9 = b"""ply
format ascii 1.0
element vertex 3
property float x
property float y
property float z
element face 1
property list uchar int vertex_indices
end_header
0 0 0
1 0 0
0 1 0
3 0 1 9
"""


@pytest.fixture
def cloud():
    return np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)


@pytest.fixture
def cube():
    return Mesh(np.asarray(CUBE.vertices, np.float32), CUBE.faces)


@pytest.mark.parametrize("suffix", WRITABLE)
def test_a_cloud_comes_back_bit_for_bit(tmp_path, cloud, suffix):
    path = tmp_path / f"cloud{suffix}"
    write_cloud(path, cloud)
    found = read_cloud(path)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found.astype(np.float32), cloud)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]  # no temporary file is left


@pytest.mark.parametrize("suffix", [suffix for suffix in WRITABLE if suffix != ".glb"])
def test_a_scan_far_from_its_origin_keeps_its_detail(tmp_path, cloud, suffix):
    far = cloud.astype(np.float64) + np.array([500_000.0, 5_000_000.0, 100.0])
    path = tmp_path / f"scan{suffix.upper()}"
    write_cloud(path, far)
    found = read_cloud(path)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, far, rtol=0, atol=1e-8)


def test_a_tensor_is_written_as_an_array_is(tmp_path, cloud):
    write_cloud(tmp_path / "a.ply", torch.from_numpy(cloud))
    np.testing.assert_array_equal(read_cloud(tmp_path / "a.ply"), cloud)


@pytest.mark.parametrize("suffix", MESH_SUFFIXES)
def test_a_mesh_comes_back_closed(tmp_path, cube, suffix):
    write_mesh(tmp_path / f"cube{suffix}", cube)
    found = read_mesh(tmp_path / f"cube{suffix}")
    assert len(found.vertices) == 8
    assert found.is_watertight
    assert found.volume == pytest.approx(1)


@pytest.mark.parametrize("suffix", MESH_SUFFIXES)
def test_a_mesh_is_sampled_where_a_cloud_is_asked_for(tmp_path, cube, suffix):
    write_mesh(tmp_path / f"cube{suffix}", cube)
    points = read_cloud(tmp_path / f"cube{suffix}", mesh_points=700, seed=3)
    assert points.shape == (700, 3)
    np.testing.assert_allclose(np.abs(points).max(axis=1), 0.5, atol=1e-6)
    np.testing.assert_array_equal(points, read_cloud(tmp_path / f"cube{suffix}", mesh_points=700, seed=3))
    assert not np.array_equal(points, read_cloud(tmp_path / f"cube{suffix}", mesh_points=700, seed=4))


@pytest.mark.parametrize(
    "text",
    [
        "0 1 2\n3 4 5\n",
        "0,1,2\n3,4,5\n",
        "0, 1, 2, 0.5, 0.5, 0.7\n3, 4, 5, 0.5, 0.5, 0.7",
        "0;1;2\r\n3;4;5\r\n",
        "\t0\t1\t2 \n\n  3\t4\t5\n\n",
        "# exported\n0 1 2 # first\n// a comment\n3 4 5\n",
        "x y z nx ny nz\n0 1 2 0 0 1\n3 4 5 0 0 1\n",
        "2\n0 1 2\n3 4 5\n",
        "\ufeff0 1 2\n3e0 4.0 +5\n",
    ],
)
def test_text_is_read_however_its_columns_are_set(tmp_path, text):
    path = tmp_path / "cloud.xyz"
    path.write_bytes(text.encode("utf-8"))
    np.testing.assert_array_equal(read_cloud(path), [[0, 1, 2], [3, 4, 5]])


def test_normals_and_colours_are_left_out(tmp_path, cloud):
    wide = np.concatenate([cloud, cloud], axis=1)
    np.save(tmp_path / "a.npy", wide)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["data"] = wide
    for name in ("a.npy", "b.h5"):
        np.testing.assert_array_equal(read_cloud(tmp_path / name), cloud)


def test_quads_become_triangles_and_a_torn_header_is_read(tmp_path):
    (tmp_path / "torn.off").write_text("OFF4 1 0\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n4 0 1 2 3\n")
    mesh = read_mesh(tmp_path / "torn.off")  # some files of ModelNet run header and counts together
    assert len(mesh.faces) == 2
    assert mesh.area == pytest.approx(1)


@pytest.mark.parametrize("suffix", BATCH_SUFFIXES)
def test_a_batch_comes_back_as_its_clouds(tmp_path, cloud, suffix):
    path = tmp_path / f"batch{suffix}"
    write_clouds(path, [cloud, cloud + 1, cloud + 2])
    for number, found in enumerate(read_clouds(path)):
        np.testing.assert_array_equal(found, cloud + number)
    with pytest.raises(DataError, match=f"batch{suffix}: it holds 3 clouds, not one"):
        read_cloud(path)


@pytest.mark.parametrize("key", ["points", "test_pc", "data", "arr_0"])
def test_clouds_in_an_npz_are_found_by_the_names_in_use(tmp_path, cloud, key):
    np.savez(tmp_path / "a.npz", **{key: cloud[None]})
    np.testing.assert_array_equal(read_clouds(tmp_path / "a.npz")[0], cloud)


def test_only_this_projects_packed_files_are_unpacked(tmp_path):
    steps = np.int16([[[32767, 0, -32767], [0, 0, 0]]])
    np.savez(tmp_path / "ours.npz", points=steps, label=np.uint8([1]), name=np.array(["bed_1"]))
    unpacked = [[1.02, 0, -1.02], [0, 0, 0]]
    np.testing.assert_allclose(read_clouds(tmp_path / "ours.npz")[0], unpacked, rtol=1e-6)
    # Millimetres in int16 are what they say.
    np.savez(tmp_path / "other.npz", points=steps, label=np.uint8([1]))
    np.save(tmp_path / "other.npy", steps[0])
    for name in ("other.npz", "other.npy"):
        np.testing.assert_array_equal(read_clouds(tmp_path / name)[0], steps[0])


def test_a_file_that_is_there_stays_unless_forced(tmp_path, cloud, cube):
    (tmp_path / "a.ply").write_text("mine")
    for write, value in ((write_cloud, cloud), (write_mesh, cube)):
        with pytest.raises(DataError, match=r"a\.ply: it exists already; force replaces it"):
            write(tmp_path / "a.ply", value)
        assert (tmp_path / "a.ply").read_text() == "mine"
    write_cloud(tmp_path / "a.ply", cloud, force=True)
    np.testing.assert_array_equal(read_cloud(tmp_path / "a.ply"), cloud)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    target = tmp_path / "report.html"
    target.write_text("old")

    def fail():
        with replacing(target, force=True) as temporary:
            temporary.write_text("half of the n")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda d: read_cloud(d / "none.ply"), r"none\.ply: there is no such file"),
        (lambda d: read_mesh(d), "it is a folder"),
        (lambda d: read_cloud(d / "a.docx"), r"a\.docx: no cloud is read from \.docx; known are \.ply"),
        (lambda d: read_mesh(d / "a.xyz"), r"a\.xyz: no mesh is read from \.xyz"),
        (lambda d: read_mesh(d / "cloud.ply"), r"cloud\.ply: it has no face"),
        (lambda d: write_cloud(d / "b.stl", np.zeros((4, 3))), r"b\.stl: no cloud is written to \.stl"),
        (lambda d: write_cloud(d / "b", np.zeros((4, 3))), "to a file without suffix"),
        (
            lambda d: write_cloud(d / "b.ply", np.zeros((4, 2))),
            r"b\.ply: a cloud must be \(N, 3\), got \(4, 2\)",
        ),
        (lambda d: write_clouds(d / "b.ply", np.zeros((2, 4, 3))), r"several clouds are written to \.npy"),
        (lambda d: write_clouds(d / "b.npz", [np.zeros((4, 3)), np.zeros((5, 3))]), "must have one shape"),
        (lambda d: write_cloud(d / "no" / "b.ply", np.zeros((4, 3))), "there is no folder"),
        (lambda d: write_mesh(d / "b.xyz", Mesh.empty()), r"no mesh is written to \.xyz"),
    ],
)
def test_misuse_is_refused_by_name(tmp_path, call, match):
    (tmp_path / "a.docx").write_text("x")
    (tmp_path / "a.xyz").write_text("0 0 0\n")
    write_cloud(tmp_path / "cloud.ply", np.eye(3))
    with pytest.raises(ValueError, match=match):
        call(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.xyz", b"", "the file is empty"),
        ("a.xyz", b"0 1 2\n3 4\n", "line 2 has 2 columns, 3 are expected"),
        (
            "a.xyz",
            b"0 1 2\n3 four 5\n",
            "not numbers in columns: line 2, column column_1: 'four' is not a number",
        ),
        ("a.xyz", b"0 1 2\n3 nan 5\n", "point 1 is not finite"),
        ("a.xyz", b"\xff\xfe\x00", "not a text file: 'utf-16"),
        ("a.ply", b"ply\nformat ascii 1.0\nelement vertex 0\nend_header\n", "no column x among "),
        ("a.off", b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n", "mesh face 0 names a vertex outside"),
        ("a.ply", TRIANGLE_TO_VERTEX_9, "mesh face 0 names a vertex outside"),
        ("a.off", b"OFF\n3 1 0\n0 0 0\n0 0 0\n0 0 0\n3 0 1 2\n", "the mesh has no area"),
        ("a.stl", b"solid nothing\nendsolid\n", "not a complete stl file"),
        ("a.npy", b"\x93NUMPY\x01\x00v\x00{'descr'", "not a complete npy file"),
        ("a.npz", b"PK\x03\x04 and no more", "not a complete npz file"),
        ("a.h5", b"\x89HDF\r\n\x1a\n and no more", "not a complete h5 file"),
    ],
)
def test_damage_is_named(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: .*{match}"):
        read_cloud(tmp_path / name)


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"weights": np.zeros(3), "bias": np.zeros(3)}, "no array of clouds .* it holds bias, weights"),
        ({"points": np.zeros((4, 2))}, r"points must be \(N, 3\) or \(S, N, 3\) and not empty, got \(4, 2\)"),
        ({"points": np.zeros((2, 0, 3))}, "and not empty"),
        ({"points": np.array([["a", "b", "c"]])}, "points must be real numbers, got <U1"),
        ({"points": np.full((2, 4, 3), np.inf)}, "cloud 0, point 0 is not finite"),
    ],
)
def test_arrays_that_are_no_clouds_are_refused(tmp_path, arrays, match):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=f"a.npz: .*{match}"):
        read_clouds(tmp_path / "a.npz")


class Bomb:
    """A pickle that would leave a file behind if anything unpickled it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_pickled_objects_are_refused_and_never_run(tmp_path, suffix):
    payload = np.array([Bomb(tmp_path / "ran")], dtype=object)
    if suffix == ".npy":
        np.save(tmp_path / "a.npy", payload, allow_pickle=True)
    else:
        np.savez(tmp_path / "a.npz", points=payload)
    with pytest.raises(DataError, match=f"a{suffix}: .*it holds pickled Python objects"):
        read_clouds(tmp_path / f"a{suffix}")
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def sound_files(tmp_path_factory):
    """A folder with one good file of each kind."""
    folder = tmp_path_factory.mktemp("sound")
    points = np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32)
    for suffix in WRITABLE:
        write_cloud(folder / f"cloud{suffix}", points)
    for suffix in MESH_SUFFIXES:
        write_mesh(folder / f"mesh{suffix}", Mesh(np.asarray(CUBE.vertices, np.float32), CUBE.faces))
    return folder


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files_are_read_as_clouds_or_refused_by_name(tmp_path, sound_files, data):
    source = data.draw(st.sampled_from(sorted(sound_files.iterdir())))
    content = bytearray(source.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / source.name
    path.write_bytes(bytes(content))
    for read in (read_clouds, read_mesh) if path.suffix in MESH_SUFFIXES else (read_clouds,):
        refusal = ""
        try:
            found = read(path)
        except DataError as error:
            refusal = str(error)
        if refusal:
            assert refusal.startswith(f"{path}: ")
            continue
        vertices = found.vertices if isinstance(found, Mesh) else np.concatenate(found)
        assert vertices.shape[1] == 3
        assert len(vertices)
        assert np.isfinite(vertices).all()


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".h5", ".ply"])
def test_every_truncation_of_a_container_is_refused(tmp_path, sound_files, suffix):
    content = (sound_files / f"cloud{suffix}").read_bytes()
    for length in range(0, len(content) - 1, max(1, len(content) // 40)):
        (tmp_path / f"a{suffix}").write_bytes(content[:length])
        with pytest.raises(DataError, match=rf"a\{suffix}"):
            read_clouds(tmp_path / f"a{suffix}")


@pytest.mark.parametrize(("module", "name"), [("h5py", "a.h5")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, module, name):
    (tmp_path / name).write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=f"this needs {module}, which is not installed: pip install {module}"
    ):
        read_cloud(tmp_path / name)
