"""Unsafe files: false sizes, external references, truncation, failed writes."""

from __future__ import annotations

import io
import json
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from ifdefense.data.formats import (
    CLOUD_SUFFIXES,
    DataError,
    files,
    read_cloud,
    read_clouds,
    read_mesh,
    write_cloud,
    write_clouds,
)

POINTS = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)


def npy_header(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def npz_bomb(path: Path) -> None:
    """Both the header of the array and the archive claim 3.6 GB."""
    header = npy_header((300_000_000, 3))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("points.npy", header + bytes(1_000_000))
    old = struct.pack("<I", len(header) + 1_000_000)
    new = struct.pack("<I", len(header) + 3_600_000_000)
    data = path.read_bytes()
    assert data.count(old) == 2
    path.write_bytes(data.replace(old, new))


def npz_false_header(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("points.npy", npy_header((300_000_000, 3)) + POINTS.tobytes())


def h5_bomb(path: Path) -> None:
    with h5py.File(path, "w") as out:
        out.create_dataset("points", (300_000_000, 3), "f4", chunks=(1000, 3), compression="gzip")


def h5_small_bomb(path: Path) -> None:
    with h5py.File(path, "w") as out:  # below the limit, yet nothing of it is stored
        out.create_dataset("points", (5_000_000, 3), "f4", chunks=(1000, 3), compression="gzip")


def h5_contiguous_bomb(path: Path) -> None:
    with h5py.File(path, "w") as out:
        out.create_dataset("points", (5_000_000, 3), "f4")


def ply_bomb(path: Path) -> None:
    axes = "".join(f"property float {axis}\n" for axis in "xyz")
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex 300000000\n{axes}end_header\n"
    path.write_bytes(header.encode() + POINTS.tobytes())


def ply_face_bomb(path: Path) -> None:
    axes = "".join(f"property float {axis}\n" for axis in "xyz")
    path.write_text(
        f"ply\nformat ascii 1.0\nelement vertex 3\n{axes}element face 1000000000000\n"
        "property list uchar int vertex_indices\nend_header\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"
    )


def pcd_bomb(path: Path) -> None:
    path.write_text(
        "FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nWIDTH 10000000\nHEIGHT 1\nPOINTS 10000000\n"
        "DATA binary_compressed\n"
    )
    with path.open("ab") as out:
        out.write(struct.pack("<II", 8, 120_000_000) + bytes(8))


def glb_bomb(path: Path) -> None:
    """An accessor without a buffer stands for zeros."""
    document = {
        "asset": {"version": "2.0"},
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"mode": 0, "attributes": {"POSITION": 0}}]}],
        "accessors": [{"componentType": 5126, "count": 10_000_000, "type": "VEC3"}],
    }
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    path.write_bytes(
        struct.pack("<4sII", b"glTF", 2, 20 + len(text)) + struct.pack("<II", len(text), 0x4E4F534A) + text
    )


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


def binary(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


BOMBS = [
    (npz_bomb, "a.npz", "declares 3600000128 bytes, has"),
    (npz_false_header, "a.npz", "declares 3600000000 bytes, has 2400"),
    (h5_bomb, "a.h5", "more than the limit"),
    (h5_small_bomb, "a.h5", "declares 5000 chunks, has 0"),
    (h5_contiguous_bomb, "a.h5", "declares 60000000 bytes"),
    (ply_bomb, "a.ply", "300000000 points, more than the limit"),
    (ply_face_bomb, "a.ply", "declares 1000000000000 face elements, has 1"),
    (pcd_bomb, "a.pcd", "declares 120000000 bytes, has"),
    (glb_bomb, "a.glb", "sparse accessors are not read"),
    (text("OFF\n300000000 0 0\n0 0 0\n"), "a.off", "more than the limit"),
    (text("OFF\n1 1000000000000 0\n0 0 0\n"), "a.off", "1000000000000 faces, has 0"),
    (text("OFF\n1 99999999999999999999999 0\n0 0 0\n"), "a.off", "more than any file"),
    (binary(npy_header((10**12, 3))), "a.npy", "more than the limit"),
    (binary(npy_header((10**6, 3))), "a.npy", "declares 12000000 bytes, has 0"),
    (binary(bytes(80) + b"\xff\xff\xff\xff" + bytes(50)), "a.stl", "4294967295 triangles"),
]


@pytest.mark.parametrize(("write", "name", "match"), BOMBS)
def test_sizes_that_are_only_claimed_are_refused_before_they_are_read(write, name, match, tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / name
    write(path)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=rf"{name}: .*(?:{match})"):
            read_cloud(path)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".xyz", ".ply", ".pcd", ".npy", ".npz", ".h5", ".off", ".obj", ".glb"])
def test_the_limit_on_points_can_be_moved(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    write_cloud(path, POINTS)
    with pytest.raises(DataError, match=r"more than the limit of .*--max-points"):
        read_cloud(path, max_points=150)
    assert len(read_cloud(path, max_points=200)) == 200


def external_link(path: Path, secret: Path) -> None:
    with h5py.File(secret.with_suffix(".h5"), "w") as out:
        out["points"] = POINTS
    with h5py.File(path, "w") as out:
        out["points"] = h5py.ExternalLink(secret.with_suffix(".h5"), "points")


def external_link_in_group(path: Path, secret: Path) -> None:
    external_link(path, secret)
    with h5py.File(path, "a") as out:
        del out["points"]
        out.create_group("scans")["points"] = h5py.ExternalLink(secret.with_suffix(".h5"), "points")


def external_storage(path: Path, secret: Path) -> None:
    secret.write_bytes(b"root:x:0:0:root" * 200)
    with h5py.File(path, "w") as out:
        out.create_dataset("points", (100, 3), "u1", external=[(str(secret), 0, 300)])


def virtual(path: Path, secret: Path) -> None:
    external_link(path, secret)
    layout = h5py.VirtualLayout((200, 3), "f4")
    layout[:] = h5py.VirtualSource(secret.with_suffix(".h5"), "points", (200, 3))
    with h5py.File(path, "w") as out:
        out.create_virtual_dataset("points", layout)


@pytest.mark.parametrize("write", [external_link, external_link_in_group, external_storage, virtual])
def test_hdf5_reads_no_other_file(write, tmp_path) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path / "a.h5", tmp_path / "secret.bin")
    with pytest.raises(DataError, match=r"a\.h5: .*(?:not followed|not read)"):
        read_clouds(tmp_path / "a.h5")


def test_soft_links_within_a_file_change_nothing(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as out:
        out["points"] = POINTS
        out["data"] = h5py.SoftLink("/points")
    np.testing.assert_array_equal(read_cloud(tmp_path / "a.h5"), POINTS)


def test_an_array_is_chosen_by_its_key(tmp_path: Path) -> None:
    arrays = {"train_pc": POINTS[None], "test_pc": POINTS[None] + 1, "other": POINTS}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=r"test_pc and train_pc may be the clouds; key \(--key\) says which"):
        read_cloud(tmp_path / "a.npz")
    np.testing.assert_array_equal(read_cloud(tmp_path / "a.npz", key="other"), POINTS)
    with pytest.raises(DataError, match="no array none in it; it holds other, test_pc, train_pc"):
        read_cloud(tmp_path / "a.npz", key="none")
    with h5py.File(tmp_path / "a.h5", "w") as out:
        out["scans/first"], out["scans/second"] = POINTS, POINTS + 1
    np.testing.assert_array_equal(read_cloud(tmp_path / "a.h5", key="scans/second"), (POINTS + 1))


def test_transposed_clouds_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", POINTS.T)
    with pytest.raises(DataError, match=r"\(3, 200\): points must be rows, this looks transposed"):
        read_cloud(tmp_path / "a.npy")


ASCII_PLY = (
    "ply\nformat ascii 1.0\nelement vertex 200\n"
    "property float x\nproperty float y\nproperty float z\nend_header\n"
    + "".join(f"{x} {y} {z}\n" for x, y, z in POINTS.tolist())
)
OFF = "OFF\n4 2 0\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 1 2\n3 0 1 3\n"
STL = (
    "solid a\n"
    + "facet normal 0 0 1\nouter loop\n"
    + "vertex 0 0 1\n" * 3
    + "endloop\nendfacet\nendsolid a\n"
)


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.ply", ASCII_PLY[: len(ASCII_PLY) * 9 // 10], "truncated or damaged: .*"),
        ("a.ply", ASCII_PLY.rsplit("\n", 2)[0] + "\n", "declares 200 vertex elements, has 199"),
        ("a.ply", ASCII_PLY + "1 2 3\n", "1 lines follow what its header declares"),
        ("a.off", OFF[:-10], "declares 2 faces, has 1"),
        ("a.off", OFF.replace("3 0 1 3\n", "3 0\n"), "face 1 has 1 of 3 corners"),
        ("a.off", OFF + "3 1 2 3\n", "declares 2 faces, has 3"),
        ("a.off", "OFF\n4 2 0\n0 0 0\n", "declares 4 vertices, has 1"),
        ("a.stl", STL[:-12], "truncated: its last solid does not end"),
        ("a.stl", STL.replace("vertex 0 0 1\n", "", 1), "a facet of 2 corners"),
        ("a.obj", "v 0 0 0\nv 1 0\n", "line 2: 2 numbers"),
        ("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 4\n", "names a vertex outside 1..3"),
        ("a.obj", "this is no obj\n", "'this' is not a statement"),
    ],
)
def test_text_that_is_cut_or_inconsistent_is_refused(
    name: str, text: str, match: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"{name}: .*{match}"):
        read_cloud(tmp_path / name)


@pytest.mark.parametrize("suffix", CLOUD_SUFFIXES)
def test_messages_speak_of_the_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    contents = (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        b"<!DOCTYPE html><html>404</html>",
        b"\x80\x04\x95pickled",
        b"PK\x05\x06" + bytes(18),
        bytes(range(256)) * 4,
        b"",
    )
    for number, content in enumerate(contents):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"a\{suffix}: ") as caught:
            read_clouds(path)
        text = str(caught.value)
        assert not any(
            word in text for word in ("charset_normalizer", "allow_pickle", "weights_only", "No module")
        )
        if number == 0:
            assert "git-lfs" in text


def test_a_zip_without_arrays_is_an_error(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(DataError, match=r"a\.npz: there are no arrays in it"):
        read_clouds(tmp_path / "a.npz")


def test_a_lack_of_memory_is_an_error_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cloud(tmp_path / "a.npy", POINTS)

    def fail(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "frombuffer", fail)
    with pytest.raises(DataError, match=r"a\.npy: there is not enough memory"):
        read_cloud(tmp_path / "a.npy")


def test_a_pipe_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.ply")
    with pytest.raises(DataError, match=r"a\.ply: not a regular file"):
        read_mesh(tmp_path / "a.ply")


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".npy", ".ply", ".xyz", ".pcd", ".glb"])
@pytest.mark.parametrize("room", [0, 10, 60, 200])
def test_a_full_disk_is_an_error_and_leaves_no_file(suffix: str, room: int, small_disk: Path) -> None:
    (small_disk / "full").write_bytes(bytes((256 - room) * 1024))
    clouds = np.random.default_rng(0).normal(size=(2, 20_000, 3)).astype(np.float32)
    path = small_disk / f"a{suffix}"
    with pytest.raises(DataError, match=rf"a\{suffix}: it could not be written: No space left"):
        write_clouds(path, clouds) if suffix in (".h5", ".npz", ".npy") else write_cloud(path, clouds[0])
    assert os.listdir(small_disk) == ["full"]


def test_what_is_on_the_disk_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.h5").write_text("old")

    def lose(descriptor: int) -> None:
        os.truncate(descriptor, 100)

    monkeypatch.setattr(files.os, "fsync", lose)
    with pytest.raises(DataError, match=r"a\.h5: it could not be written: it is not what was written"):
        write_cloud(tmp_path / "a.h5", POINTS, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]
    assert (tmp_path / "a.h5").read_text() == "old"
