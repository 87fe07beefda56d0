"""Point attributes through purification and files of every format."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ifdefense.attributes import transfer_attributes
from ifdefense.data.formats import read_cloud_file, write_cloud, write_cloud_file

POINTS = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
FIELDS = {
    "label": np.arange(60, dtype=np.int32),
    "intensity": np.random.default_rng(1).random(60).astype(np.float32),
    "nx": np.float32([1.0] * 60),
    "ny": np.float32([0.0] * 60),
    "nz": np.float32([0.5] * 60),
    "red": np.arange(60).astype(np.uint8),
    "green": np.arange(60, 120).astype(np.uint8),
    "blue": np.arange(120, 180).astype(np.uint8),
}
GEOMETRIC = ("nx", "ny", "nz", "red", "green", "blue")


def naive(points: NDArray[np.floating], purified: NDArray[np.floating]) -> NDArray[np.int64]:
    return np.array([np.argmin(((points - point) ** 2).sum(1)) for point in purified], np.int64)


def test_new_points_take_the_attributes_of_the_nearest() -> None:
    rng = np.random.default_rng(2)
    purified = np.concatenate([POINTS[10:30].astype(np.float64), rng.normal(size=(40, 3))])
    colours = rng.random((60, 3))
    found = transfer_attributes(POINTS, {"label": FIELDS["label"], "colours": colours}, purified)
    index = naive(POINTS, purified)
    np.testing.assert_array_equal(index[:20], np.arange(10, 30))
    np.testing.assert_array_equal(found["label"], FIELDS["label"][index])
    np.testing.assert_array_equal(found["colours"], colours[index])
    assert found["label"].dtype == np.int32


def test_tensors_stay_tensors() -> None:
    labels = torch.arange(60)
    found = transfer_attributes(torch.from_numpy(POINTS), {"y": labels}, torch.from_numpy(POINTS[5:9]))
    torch.testing.assert_close(found["y"], torch.arange(5, 9))


def test_strings_are_attributes_too() -> None:
    names = np.array([f"p{index}" for index in range(60)])
    assert transfer_attributes(POINTS, {"name": names}, POINTS[[3]])["name"].tolist() == ["p3"]


def test_far_from_the_origin_the_nearest_is_still_the_nearest() -> None:
    far = POINTS.astype(np.float64) + np.array([5e5, 5e6, 100])
    found = transfer_attributes(far, {"label": FIELDS["label"]}, far[::-1])
    np.testing.assert_array_equal(found["label"], FIELDS["label"][::-1])


@pytest.mark.parametrize(
    ("points", "attributes", "purified", "match"),
    [
        (POINTS, {"a": np.zeros(59)}, POINTS, "a must have one row for each of the 60 points"),
        (POINTS, {"a": np.array(1.0)}, POINTS, "a must have one row"),
        (POINTS[:, :2], {}, POINTS, r"points must be \(N, 3\)"),
        (POINTS, {"a": np.zeros(60)}, POINTS * np.float32(np.nan), "purified must be finite"),
        (POINTS[:0], {}, POINTS, "there are no points"),
    ],
)
def test_what_does_not_fit_is_refused(points, attributes, purified, match) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=match):
        transfer_attributes(points, attributes, purified)


@pytest.mark.parametrize("suffix", [".ply", ".pcd", ".csv", ".xyz", ".npz", ".h5", ".glb"])
def test_fields_come_back_under_their_names(suffix: str, tmp_path: Path) -> None:
    fields = dict(FIELDS)
    if suffix == ".glb":  # its vectors have names of their own
        fields = {name: FIELDS[name] for name in ("label", "intensity")}
    write_cloud(tmp_path / f"a{suffix}", POINTS, fields=fields)
    file = read_cloud_file(tmp_path / f"a{suffix}")
    kept = POINTS[[7, 3, 50]].astype(np.float64)
    write_cloud_file(tmp_path / f"b{suffix}", file.moved([kept + 1e-4]))
    (cloud,) = read_cloud_file(tmp_path / f"b{suffix}").clouds
    np.testing.assert_allclose(cloud.points, kept + 1e-4, atol=1e-7)
    assert set(cloud.fields) == set(fields)
    for name, values in fields.items():
        np.testing.assert_allclose(cloud.fields[name], values[[7, 3, 50]])


@pytest.mark.parametrize("suffix", [".off", ".obj"])
def test_mesh_formats_keep_normals_and_colours_and_say_what_they_lose(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_cloud(tmp_path / f"a{suffix}", POINTS, fields=FIELDS)
    assert f"a{suffix}: a {suffix} file cannot hold the fields label, intensity" in caplog.text
    (cloud,) = read_cloud_file(tmp_path / f"a{suffix}").clouds
    for name in GEOMETRIC:
        np.testing.assert_allclose(cloud.fields[name], FIELDS[name])


def test_integer_types_of_a_ply_stay(tmp_path: Path) -> None:
    write_cloud(tmp_path / "a.ply", POINTS, fields=FIELDS)
    (cloud,) = read_cloud_file(tmp_path / "a.ply").clouds
    assert {name: values.dtype for name, values in cloud.fields.items()} == {
        name: values.dtype for name, values in FIELDS.items()
    }


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_arrays_of_a_file_keep_their_names_and_shapes(suffix: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    arrays = {
        "data": rng.normal(size=(2, 20, 6)).astype(np.float32),
        "normal": rng.normal(size=(2, 20, 3)).astype(np.float32),
        "pid": rng.integers(0, 5, (2, 20)),
        "label": np.array([[3], [4]], np.uint8),
        "note": np.array("by hand"),
    }
    path = tmp_path / f"a{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as out:
            for name, values in arrays.items():
                out[name] = values if values.dtype.kind != "U" else "by hand"
    file = read_cloud_file(path)
    index = [4, 11]
    write_cloud_file(
        tmp_path / f"b{suffix}", file.moved([arrays["data"][number, index, :3] for number in range(2)])
    )
    if suffix == ".npz":
        found = dict(np.load(tmp_path / "b.npz"))
    else:
        with h5py.File(tmp_path / "b.h5") as result:
            found = {name: result[name][()] for name in result}
    assert set(found) == set(arrays)
    for name in ("data", "normal", "pid"):
        np.testing.assert_array_equal(found[name], arrays[name][:, index])
        assert found[name].dtype == arrays[name].dtype
    np.testing.assert_array_equal(found["label"], arrays["label"])
    assert found["note"] in (np.array("by hand"), b"by hand")


def test_other_clouds_of_a_file_are_no_attributes(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", train_pc=POINTS[None], test_pc=POINTS[None] + 1)
    file = read_cloud_file(tmp_path / "a.npz", key="test_pc")
    assert not file.clouds[0].fields
    write_cloud_file(tmp_path / "b.npz", file.moved([POINTS[::-1] + 1]))
    np.testing.assert_array_equal(np.load(tmp_path / "b.npz")["train_pc"], POINTS[None])


def test_columns_beyond_the_third_come_back(tmp_path: Path) -> None:
    wide = np.random.default_rng(4).normal(size=(30, 7)).astype(np.float32)
    np.save(tmp_path / "a.npy", wide)
    file = read_cloud_file(tmp_path / "a.npy")
    write_cloud_file(tmp_path / "b.npy", file.moved([wide[5:8, :3]]))
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), wide[5:8])
    write_cloud_file(tmp_path / "b.csv", file.moved([wide[5:8, :3]]))
    np.testing.assert_array_equal(np.loadtxt(tmp_path / "b.csv", delimiter=",", dtype=np.float32), wide[5:8])


def test_records_come_back_as_records(tmp_path: Path) -> None:
    records = np.zeros(20, [("intensity", "f4"), ("z", "f8"), ("y", "f8"), ("x", "f8")])
    for name in "xyz":
        records[name] = np.random.default_rng(ord(name)).normal(size=20)
    records["intensity"] = np.arange(20)
    np.save(tmp_path / "a.npy", records)
    file = read_cloud_file(tmp_path / "a.npy")
    np.testing.assert_array_equal(file.clouds[0].points[:, 2], records["z"])
    write_cloud_file(tmp_path / "b.npy", file.moved([file.clouds[0].points[2:5]]))
    found = np.load(tmp_path / "b.npy")
    assert found.dtype == records.dtype
    np.testing.assert_array_equal(found, records[2:5])
