"""Labelled sets with their own axes and layouts: ModelNet40-C, ModelNet-C, ScanObjectNN, ShapeNetPart."""

from __future__ import annotations

import dataclasses
import json
import logging

import h5py
import numpy as np
import pytest
import torch

import classifiers
from ifdefense.data.cloudset import CloudSet
from ifdefense.data.layouts import LAYOUTS, MODELNET40_CLASSES, detect_layout, load_part
from ifdefense.data.modelnet import load_modelnet40
from ifdefense.data.orientation import looks_up
from ifdefense.data.packed import DataError
from ifdefense.data.selection import nested_order
from ifdefense.geometry.axes import AXES, turned
from ifdefense.geometry.frame import to_unit_sphere

LOG = "ifdefense.data.layouts"


def clouds(count=4, num_points=40, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, num_points, 3)).astype(np.float32)


def write_h5(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values


def write_modelnet40_c(root):
    """What data/generate_c.py writes: labels in a column, more and fewer points than 1,024."""
    for seed, (name, size) in enumerate([("original", 40), ("background_5", 42), ("lidar_1", 30)]):
        np.save(root / f"data_{name}.npy", clouds(num_points=size, seed=seed))
    np.save(root / "label.npy", np.array([[3], [0], [39], [8]], np.uint8))
    return root


def write_modelnet_c(root):
    """What build/corrupt.py writes."""
    for seed, (name, size) in enumerate([("clean", 40), ("add_global_0", 50), ("add_global_4", 90)]):
        write_h5(
            root / f"{name}.h5",
            data=clouds(num_points=size, seed=seed),
            label=np.int64([[3], [0], [39], [8]]),
        )
    return root


def write_scanobjectnn(root):
    """The folders and names of h5_files.zip; every third point of a scan is background."""
    mask = np.where(np.arange(40) % 3, 7, -1)[None].repeat(4, 0).astype(np.int32)
    names = ("objectdataset", "objectdataset_augmentedrot_scale75")
    for seed, name in enumerate(names):
        for part in ("training", "test"):
            whole = {"data": clouds(seed=seed), "label": np.int32([0, 14, 6, 1]), "mask": mask}
            write_h5(root / "main_split" / f"{part}_{name}.h5", **whole)
    for part in ("training", "test"):
        bare = {"data": clouds(seed=9), "label": np.int32([0, 14, 6, 1]), "mask": np.ones_like(mask)}
        write_h5(root / "main_split_nobg" / f"{part}_objectdataset.h5", **bare)
    return root


def write_shapenet_part_hdf5(root):
    for seed, name in enumerate(("train0", "train1", "val0", "test0")):
        write_h5(
            root / f"ply_data_{name}.h5",
            data=clouds(seed=seed),
            label=np.uint8([[0], [15], [4], [1]]),
            pid=np.zeros((4, 40), np.uint8),
        )
    (root / "all_object_categories.txt").write_text("Airplane\t02691156\nBag\t02773838\n")
    return root


SYNSETS = {"Airplane": "02691156", "Bag": "02773838", "Table": "04379243"}


def write_shapenet_part_text(root):
    (root / "synsetoffset2category.txt").write_text("".join(f"{a}\t{b}\n" for a, b in SYNSETS.items()))
    (root / "train_test_split").mkdir()
    names = {part: [f"{part}{index}" for index in range(3)] for part in ("train", "val", "test")}
    for seed, (part, shapes) in enumerate(names.items()):
        entries = [
            f"shape_data/{synset}/{name}" for synset, name in zip(SYNSETS.values(), shapes, strict=True)
        ]
        listing = root / "train_test_split" / f"shuffled_{part}_file_list.json"
        listing.write_text(json.dumps(entries[::-1]))
        for entry, cloud in zip(entries, clouds(3, seed=seed), strict=True):
            path = root / entry.removeprefix("shape_data/")
            path.parent.mkdir(exist_ok=True)
            rows = np.concatenate([cloud, cloud, np.full((40, 1), 12.0)], 1)
            np.savetxt(path.with_suffix(".txt"), rows, fmt="%.6f")
    return root


def test_modelnet40_c_is_read_by_corruption_and_severity(tmp_path):
    root = write_modelnet40_c(tmp_path)
    assert detect_layout(root) == "ModelNet40-C"
    found = load_part(root, "test", variant="background_5")
    np.testing.assert_array_equal(found.points, turned(clouds(num_points=42, seed=1), "y"))
    np.testing.assert_array_equal(found.labels, [3, 0, 39, 8])
    assert found.classes == MODELNET40_CLASSES
    assert load_part(root, "test", variant="lidar_1").points.shape == (4, 30, 3)
    with pytest.raises(
        DataError, match="variant= says which of these is meant: background_5, lidar_1, original"
    ):
        load_part(root, "test")
    with pytest.raises(DataError, match="no variant 'gaussian_9'; there are background_5, lidar_1, original"):
        load_part(root, "test", variant="gaussian_9")
    with pytest.raises(DataError, match="ModelNet40-C has no part 'train', only test"):
        load_part(root, "train", variant="original")
    with pytest.raises(DataError, match=r"lidar_1\.npy: its clouds have 30 points, 31 are asked for"):
        load_part(root, "test", 31, variant="lidar_1")


def test_fewer_points_of_a_corrupted_cloud_are_drawn_from_all(tmp_path):
    root = write_modelnet_c(tmp_path)
    found = load_part(root, "test", 45, variant="add_global_4")
    stored = turned(clouds(num_points=90, seed=2), "y")
    rows = [np.flatnonzero((stored[0] == point).all(1))[0] for point in found.points[0]]
    assert len(set(rows)) == 45
    assert 5 < sum(row >= 45 for row in rows) < 40  # not the first ones alone
    np.testing.assert_array_equal(found.points, stored[:, rows])


def test_modelnet_c_is_read_by_corruption_and_level(tmp_path):
    root = write_modelnet_c(tmp_path)
    assert detect_layout(root) == "ModelNet-C"
    found = load_part(root, "test", variant="add_global_0")
    np.testing.assert_array_equal(found.points, turned(clouds(num_points=50, seed=1), "y"))
    np.testing.assert_array_equal(found.labels, [3, 0, 39, 8])
    assert found.classes == MODELNET40_CLASSES
    with pytest.raises(DataError, match="no variant 'clean_0'; there are add_global_0, add_global_4, clean"):
        load_part(root, "test", variant="clean_0")


@pytest.mark.parametrize("variant", ["PB_T50_RS", "objectdataset_augmentedrot_scale75"])
def test_scanobjectnn_is_read_by_variant(tmp_path, variant):
    root = write_scanobjectnn(tmp_path)
    assert detect_layout(root) == detect_layout(root / "main_split") == "ScanObjectNN"
    for folder in (root, root / "main_split"):
        found = load_part(folder, "train", 32, variant=variant)
        np.testing.assert_array_equal(found.points, turned(clouds(seed=1)[:, :32], "y"))
        assert [found.classes[label] for label in found.labels] == ["bag", "toilet", "display", "bin"]
    with pytest.raises(DataError, match="variant= says which of these is meant: OBJ_BG, PB_T50_RS"):
        load_part(root, "test", 32)


def test_scanobjectnn_without_background_takes_the_files_without_it_or_the_mask(tmp_path):
    root = write_scanobjectnn(tmp_path)
    bare = load_part(root, "test", 26, variant="OBJ_BG", background=False)
    np.testing.assert_array_equal(bare.points, turned(clouds(seed=9)[:, :26], "y"))
    masked = load_part(root, "test", 26, variant="PB_T50_RS", background=False)
    kept = np.flatnonzero(np.arange(40) % 3)
    np.testing.assert_array_equal(masked.points, turned(clouds(seed=1)[:, kept], "y"))
    with pytest.raises(DataError, match=r"scale75\.h5, .*_0000: it has 26 points, 27 are asked for"):
        load_part(root, "test", 27, variant="PB_T50_RS", background=False)
    only = load_part(root / "main_split_nobg", "test", 40)
    np.testing.assert_array_equal(only.points, turned(clouds(seed=9), "y"))


def test_shapenet_part_is_read_from_hdf5(tmp_path):
    root = write_shapenet_part_hdf5(tmp_path)
    assert detect_layout(root) == "shapenet_part_seg_hdf5_data"
    found = load_part(root, "train", 30)
    expected = np.concatenate([clouds(seed=0), clouds(seed=1)])[:, :30]
    np.testing.assert_array_equal(found.points, turned(expected, "y"))
    assert [found.classes[label] for label in found.labels[:4]] == ["Airplane", "Table", "Chair", "Bag"]
    assert len(load_part(root, "val", 30)) == 4
    np.testing.assert_array_equal(load_part(root, "test", 40).points, turned(clouds(seed=3), "y"))


def test_shapenet_part_is_read_from_text(tmp_path):
    root = write_shapenet_part_text(tmp_path)
    assert detect_layout(root) == "shapenetcore_partanno_segmentation_benchmark_v0_normal"
    found = load_part(root, "val", 40)
    np.testing.assert_allclose(found.points, turned(clouds(3, seed=1)[::-1], "y"), atol=1e-6)
    assert [found.classes[label] for label in found.labels] == ["Table", "Bag", "Airplane"]
    assert list(found.names) == ["val2", "val1", "val0"]
    path = root / "02773838" / "val1.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:25]))
    with pytest.raises(
        DataError, match=r"val1\.txt: it has 25 points, 40 are asked for; of 3 clouds, 1 have"
    ):
        load_part(root, "val", 40)
    (root / "train_test_split" / "shuffled_test_file_list.json").unlink()
    with pytest.raises(DataError, match=r"shuffled_test_file_list\.json: there is no such file"):
        load_part(root, "test", 40)


def test_every_layout_has_an_axis_or_says_that_it_is_unknown():
    assert {name for name, layout in LAYOUTS.items() if layout.up is None} == {
        "CLASS/train|test/*",
        ".npz or .h5 with points and labels",
    }
    assert {layout.up for layout in LAYOUTS.values()} == {"z", "y", None}


def test_turned_clouds_say_so_and_up_overrides(tmp_path, caplog):
    root = write_modelnet40_c(tmp_path)
    stored = clouds(num_points=40)
    with caplog.at_level(logging.INFO, LOG):
        found = load_part(root, "test", variant="original")
    assert (found.up, found.turned_from) == ("z", "y")
    assert (found[:2].up, found[:2].turned_from) == ("z", "y")
    assert caplog.messages == [f"{root}: ModelNet40-C, y up, was turned z up; up='source' leaves it as it is"]
    kept = load_part(root, "test", variant="original", up="source")
    np.testing.assert_array_equal(kept.points, stored)
    assert (kept.up, kept.turned_from) == ("y", None)
    own = load_part(root, "test", variant="original", up="-x")
    np.testing.assert_array_equal(own.points, turned(stored, "-x"))
    assert (own.up, own.turned_from) == ("z", "-x")
    assert load_part(root, "test", variant="original", up="z").turned_from is None
    with pytest.raises(ValueError, match="up must be one of z, y, x, -z, -y, -x, got 'down'"):
        load_part(root, "test", variant="original", up="down")


def test_options_that_a_layout_does_not_have_are_refused(tmp_path):
    write_shapenet_part_hdf5(tmp_path)
    with pytest.raises(DataError, match="has no variants, so there is no 'clean'"):
        load_part(tmp_path, "test", variant="clean")
    with pytest.raises(DataError, match="does not say which points are background"):
        load_part(tmp_path, "test", background=False)


def doors(up, count=24):
    """Doors, keyboards and curtains as boxes of their usual proportions."""
    tall = {"door": 1.85, "keyboard": -2.4, "curtain": 1.67}
    labels = np.arange(count) % 3
    points = clouds(count, 64)
    points[..., 2] *= np.exp(list(tall.values()))[labels, None]
    return CloudSet(turned(points, "z", up), labels, np.arange(count).astype(str), tuple(tall))


@pytest.mark.parametrize("up", ["z", "y", "x"])
def test_a_set_that_looks_turned_is_warned_of(tmp_path, caplog, up):
    boxes = doors(up)
    write_h5(tmp_path / "ply_data_test0.h5", data=boxes.points, label=boxes.labels[:, None])
    (tmp_path / "shape_names.txt").write_text("\n".join(boxes.classes))
    with caplog.at_level(logging.WARNING, LOG):
        load_part(tmp_path, "test", 64)
        warned = list(caplog.messages)
        for override in ("source", "z", "y"):
            load_part(tmp_path, "test", 64, up=override)
    assert caplog.messages == warned
    text = f"is read as y up, but its clouds look {up} up: use up='{up}', or up='y' if that is wrong"
    assert [text in message for message in warned] == ([] if up == "y" else [True])


def test_the_axis_is_only_judged_where_it_is_clear():
    assert looks_up(doors("y"), "z") == "y"
    assert looks_up(doors("z"), "z") is None
    assert looks_up(doors("y", count=18), "z") is None
    assert looks_up(dataclasses.replace(doors("y"), classes=("door", "keyboard", "earphone")), "z") is None


@pytest.fixture(scope="module")
def validation(data_root):
    """ModelNet40's validation set."""
    return load_modelnet40(data_root, "validation")


def test_the_axis_of_modelnet40_is_found_without_false_alarms(validation):
    rng = np.random.default_rng(0)
    for _ in range(4):
        part = validation[rng.choice(len(validation), 60, replace=False)]
        for axis in AXES:
            seen = looks_up(dataclasses.replace(part, points=turned(part.points, "z", axis)), "z")
            allowed = {"z": {None}, "-z": {None, "-z"}}  # upside down is not always clear
            assert seen in allowed.get(axis, {axis})


def test_clouds_stored_y_up_are_recognised(tmp_path, validation):
    part = validation[nested_order(validation.labels)[:60]]
    write_h5(
        tmp_path / "ply_data_test0.h5",
        data=turned(part.points, "z", "y"),
        label=part.labels[:, None].astype(np.uint8),
    )
    (tmp_path / "shape_names.txt").write_text("\n".join(part.classes))
    model = classifiers.load("pointnet-modelnet40")

    def accuracy(points):
        with torch.no_grad():
            logits = model(to_unit_sphere(torch.from_numpy(points)))
        return float((logits.argmax(1).numpy() == part.labels).mean())

    found = load_part(tmp_path, "test")
    np.testing.assert_array_equal(found.points, part.points)
    assert accuracy(found.points) > 0.85
    assert accuracy(load_part(tmp_path, "test", up="source").points) < 0.25


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
@pytest.mark.parametrize(
    ("labels", "names", "classes"),
    [
        ([2, 0, 1], None, ("0", "1", "2")),
        ([2, 0, 1], ["ball", "box", "can", "ring"], ("ball", "box", "can", "ring")),
        (["can", "ball", "box"], None, ("ball", "box", "can")),
    ],
)
def test_your_own_clouds_and_labels_are_read_from_one_file(tmp_path, suffix, labels, names, classes):
    """As stored: neither turned nor cut, unless a number of points is asked for."""
    points = np.random.default_rng(0).uniform(-1, 2, (3, 40, 3)).astype(np.float32)
    arrays = {"data": points, "labels": np.array(labels)[:, None]}
    if names is not None:
        arrays["classes"] = np.array(names)
    path = tmp_path / f"mine{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for name, values in arrays.items():
                file[name] = values.astype("S") if values.dtype.kind == "U" else values
    clouds = load_part(path, "test")
    np.testing.assert_array_equal(clouds.points, points)
    assert clouds.labels.tolist() == [2, 0, 1] and clouds.classes == classes
    assert clouds.up is None and clouds.turned_from is None
    np.testing.assert_array_equal(load_part(path, "test", 16).points, points[:, :16])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"points": np.ones((2, 20, 3))}, "label or labels or y missing; it holds points"),
        ({"label": np.arange(2)}, "points or test_pc .* missing; it holds label"),
        ({"points": np.ones((2, 20, 3)), "label": np.arange(2), "y": np.arange(2)}, "holds label and y, of"),
        ({"points": np.ones((2, 20, 3)), "label": np.arange(3)}, r"labels must be \(2,\), one a cloud"),
        ({"points": np.ones((2, 20, 3)), "label": np.ones(2)}, "label must be integers or names of classes"),
        ({"points": np.ones((2, 20, 3)), "label": np.array([-1, 0])}, "cloud 0: label -1 is not among 1 "),
        (
            {"points": np.ones((2, 20, 3)), "label": np.array(["a", "b"]), "classes": np.array(["a", "c"])},
            "label: 'b' is not among the classes a, c",
        ),
        (
            {"points": np.ones((2, 20, 3), np.int16), "label": np.arange(2), "name": np.arange(2)},
            "its folder",
        ),
    ],
)
def test_arrays_that_are_no_labelled_clouds_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(DataError, match=rf"mine\.npz: .*{message}"):
        load_part(tmp_path / "mine.npz", "test")
