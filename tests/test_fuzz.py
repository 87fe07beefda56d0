"""Damaged files of every format: correct results or errors, within bounds of time and memory."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ifdefense.data.formats import (
    BATCH_SUFFIXES,
    CLOUD_SUFFIXES,
    MESH_SUFFIXES,
    WRITABLE_SUFFIXES,
    CloudFile,
    DataError,
    encode_cloud_file,
    read_cloud_file,
    read_mesh,
    write_cloud,
    write_cloud_file,
    write_clouds,
    write_mesh,
)
from ifdefense.geometry.mesh import Mesh

FILES = 300
SECONDS = 10
MEMORY = 1 << 30
COUNTED = {".ply", ".off", ".stl", ".glb", ".pcd", ".pts", ".npy", ".npz", ".h5", ".hdf5"}
"""Formats that say how much they hold: a shortened file cannot pass for a whole one."""


def lzf(data: bytes) -> bytes:
    """Packs bytes as LZF does, with runs alone."""
    parts = [data[start : start + 32] for start in range(0, len(data), 32)]
    return b"".join(bytes([len(part) - 1]) + part for part in parts)


def compressed_pcd(points: NDArray[np.float32], label: NDArray[np.int32]) -> bytes:
    fields = points.T.astype("<f4").tobytes() + label.astype("<i4").tobytes()
    packed = lzf(fields)
    header = (
        "VERSION 0.7\nFIELDS x y z label\nSIZE 4 4 4 4\nTYPE F F F I\nCOUNT 1 1 1 1\n"
        f"WIDTH {len(points)}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {len(points)}\n"
        "DATA binary_compressed\n"
    )
    return header.encode() + np.array([len(packed), len(fields)], "<u4").tobytes() + packed


ASCII_STL = """solid two triangles
facet normal 0 0 1
 outer loop
  vertex 0 0 0
  vertex 1 0 0
  vertex 0 1 0
 endloop
endfacet
endsolid
solid
facet normal 0 0 1
 outer loop
  vertex 1 0 0
  vertex 1 1 0.5e0
  vertex 0 1 0
 endloop
endfacet
endsolid
"""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Good files of every format, with and without attributes, text and binary."""
    folder = tmp_path_factory.mktemp("sound")
    rng = np.random.default_rng(0)
    points = rng.normal(size=(40, 3)).astype(np.float32)
    fields = {"label": np.arange(40, dtype=np.int32), "intensity": rng.random(40)}
    colours = {name: rng.integers(0, 255, 40).astype(np.uint8) for name in ("red", "green", "blue")}
    for suffix in WRITABLE_SUFFIXES:
        write_cloud(folder / f"plain{suffix}", points)
        write_cloud(folder / f"fields{suffix}", points, fields=fields if suffix != ".off" else colours)
    for suffix in BATCH_SUFFIXES:
        write_clouds(folder / f"batch{suffix}", [points, points + 1])
    corners = np.float32([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    faces = [[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6]]
    for suffix in MESH_SUFFIXES:
        write_mesh(folder / f"mesh{suffix}", Mesh(corners, np.int64(faces)))
    for suffix in (".ply", ".pcd"):
        file = read_cloud_file(folder / f"fields{suffix}")
        text = dataclasses.replace(file, layout=dataclasses.replace(file.layout, text=True))
        write_cloud_file(folder / f"ascii{suffix}", text)
    (folder / "compressed.pcd").write_bytes(compressed_pcd(points, fields["label"]))
    (folder / "solids.stl").write_text(ASCII_STL)
    rows = "".join(f"{x} {y} {z}\n" for x, y, z in points.tolist())
    (folder / "counted.pts").write_text(f"40\n{rows}40\n{rows}")
    return sorted(folder.iterdir())


Damage = Callable[[bytes, np.random.Generator], bytes]


def truncate(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(0, len(data))]


def flip(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        changed[rng.integers(0, len(data))] = rng.integers(0, 256)
    return bytes(changed)


def flip_header(data: bytes, rng: np.random.Generator) -> bytes:
    return flip(data[:300], rng) + data[300:]


def cut_out(data: bytes, rng: np.random.Generator) -> bytes:
    start, stop = np.sort(rng.integers(0, len(data), 2))
    return data[:start] + data[stop:]


def repeat(data: bytes, rng: np.random.Generator) -> bytes:
    start, stop = np.sort(rng.integers(0, len(data), 2))
    return data[:stop] + data[start:]


def other_number(data: bytes, rng: np.random.Generator) -> bytes:
    """Another number in the place of a run of digits, as a size bomb has."""
    digits = [index for index in range(1, len(data)) if data[index : index + 1].isdigit()]
    if not digits:
        return flip(data, rng)
    start = stop = digits[rng.integers(0, min(len(digits), 200))]
    while stop < len(data) and data[stop : stop + 1].isdigit():
        stop += 1
    number = rng.choice([b"0", b"-1", b"1000000000000", b"300000000", b"nan", b"1e300", b"4294967295", b"x"])
    return data[:start] + bytes(number) + data[stop:]


def huge_word(data: bytes, rng: np.random.Generator) -> bytes:
    """Four or eight bytes of a size as large as they can be."""
    start = rng.integers(0, len(data))
    word = rng.choice([b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\x00\xca\x9a\x3b\0\0\0\0"])
    return data[:start] + bytes(word) + data[start + len(word) :]


def noise(data: bytes, rng: np.random.Generator) -> bytes:
    start = rng.integers(0, len(data))
    return data[:start] + rng.bytes(int(rng.integers(1, 64))) + data[start:]


DAMAGES: tuple[Damage, ...] = (
    truncate, flip, flip_header, cut_out, repeat, other_number, huge_word, noise,
)  # fmt: skip


class TooSlow(BaseException):
    """Not an `Exception`, so that no reader takes it for damage."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Interrupts what takes too long, and makes allocations beyond the limit fail."""

    def stop(signum: int, frame: object) -> None:
        raise TooSlow

    with Path("/proc/self/statm").open() as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))
        signal.signal(signal.SIGALRM, handler)


def check(found: CloudFile, path: Path) -> None:
    """What was read is whole, and comes back when it is written."""
    for cloud in found.clouds:
        assert cloud.points.dtype == np.float64
        assert cloud.points.shape == (len(cloud.points), 3)
        assert len(cloud.points)
        assert np.isfinite(cloud.points).all()
        assert all(len(values) == len(cloud.points) for values in cloud.fields.values())
    suffix = path.suffix if path.suffix != ".stl" else ".ply"
    with contextlib.suppress(DataError):  # some formats cannot hold everything, and say so
        again = path.with_name(f"again{suffix}")
        again.write_bytes(encode_cloud_file(found, suffix))
        for cloud, copy in zip(found.clouds, read_cloud_file(again).clouds, strict=True):
            size = np.abs(cloud.points).max()
            np.testing.assert_allclose(copy.points, cloud.points, rtol=1e-6, atol=1e-6 * size)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_damaged_files_are_read_correctly_or_refused_by_name(
    sound: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {path.suffix for path in sound} == set(CLOUD_SUFFIXES)
    whole = {path: read_cloud_file(path) for path in sound}
    rng = np.random.default_rng(7)
    read = refused = 0
    slowest = 0.0
    for number in range(FILES):
        source = sound[number % len(sound)]
        damage = DAMAGES[rng.integers(0, len(DAMAGES))]
        path = tmp_path / f"damaged{source.suffix}"
        path.write_bytes(damage(source.read_bytes(), rng))
        start = time.perf_counter()
        found, refusal = None, ""
        try:
            with limits():
                found = read_cloud_file(path)
                if path.suffix in MESH_SUFFIXES:
                    with contextlib.suppress(DataError):
                        read_mesh(path)
        except DataError as error:
            refusal = str(error)
        except TooSlow:
            pytest.fail(f"{source.name} after {damage.__name__} takes longer than {SECONDS} s")
        if found is None:
            refused += 1
            assert refusal.startswith(f"{path}: ")
            assert not any(word in refusal for word in ("memory", "weights_only", "allow_pickle"))
        else:
            read += 1
            check(found, path)
            if damage is truncate and source.suffix in COUNTED:
                pairs = zip(found.clouds, whole[source].clouds, strict=True)
                assert all(np.array_equal(a.points, b.points) for a, b in pairs), source.name
        slowest = max(slowest, time.perf_counter() - start)
    assert read + refused == FILES
    assert read > 20
    assert refused > 150
    with capsys.disabled():
        sys.stdout.write(
            f"\n{FILES} damaged files: {read} read, {refused} refused, {slowest:.1f} s at most\n"
        )
