"""Labelled clouds in every supported layout, and the splits of ModelNet40."""

from __future__ import annotations

import json
import sys

import h5py
import numpy as np
import pytest
import torch
import trimesh

from ifdefense.data.cloudset import CloudSet
from ifdefense.data.formats import write_cloud, write_mesh
from ifdefense.data.layouts import LAYOUTS, MODELNET40_CLASSES, detect_layout, load_part
from ifdefense.data.modelnet import holdout, load_modelnet40
from ifdefense.data.packed import DataError, load_packed_meshes
from ifdefense.geometry.axes import turned
from ifdefense.geometry.mesh import Mesh
from ifdefense.training.data.clouds import training_sets

CLASSES = ("bed", "night_stand", "sofa")
POINTS = 32


def clouds_and_labels(count=6, num_points=POINTS, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (count, num_points, 3)).astype(np.float32), np.arange(count) % len(CLASSES)


def steps_of(points):
    return np.round(points * 32767 / 1.02).astype(np.int16)


def names_of(labels):
    return [f"{CLASSES[label]}_{index:04d}" for index, label in enumerate(labels)]


def write_packed(root):
    for part, seed in (("train_0", 1), ("train_1", 2), ("test", 0)):
        points, labels = clouds_and_labels(seed=seed)
        names = np.array(names_of(labels))
        np.savez(root / f"{part}.npz", points=steps_of(points), label=labels.astype(np.uint8), name=names)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def write_hdf5(root):
    (root / "shape_names.txt").write_text("\n".join(CLASSES) + "\n")
    points, labels = clouds_and_labels(num_points=POINTS + 8)
    for part in ("train", "test"):
        for number, rows in enumerate((slice(0, 4), slice(4, 6))):
            with h5py.File(root / f"ply_data_{part}{number}.h5", "w") as file:
                file["data"], file["label"] = points[rows], labels[rows, None].astype(np.uint8)
            names = [f"{name.rsplit('_', 1)[0]}/{name}.ply" for name in names_of(labels)[rows]]
            (root / f"ply_data_{part}_{number}_id2file.json").write_text(json.dumps(names))
    return root


def write_resampled(root):
    points, labels = clouds_and_labels(num_points=POINTS + 8)
    names = names_of(labels)
    for number, classes, count in (("10", CLASSES[:2], 2), ("40", CLASSES, 6)):
        (root / f"modelnet{number}_shape_names.txt").write_text("\n".join(classes) + "\n")
        for part in ("train", "test"):
            (root / f"modelnet{number}_{part}.txt").write_text("\n".join(names[:count]) + "\n")
    for name, cloud in zip(names, points, strict=True):
        folder = root / name.rpartition("_")[0]
        folder.mkdir(exist_ok=True)
        rows = np.concatenate([cloud, cloud], axis=1)
        np.savetxt(folder / f"{name}.txt", rows, fmt="%.9g", delimiter=",")
    return root


def write_folders(root):
    points, labels = clouds_and_labels()
    for part in ("train", "test"):
        for name, label, cloud in zip(names_of(labels), labels, points, strict=True):
            folder = root / CLASSES[label] / part
            folder.mkdir(parents=True, exist_ok=True)
            write_cloud(folder / f"{name}.ply", cloud)
            (folder / ".DS_Store").touch()
    return root


def write_if_defense(root):
    points, labels = clouds_and_labels()
    parts = {f"{part}_pc": points for part in ("train", "test")}
    path = root / "MI-FGM.npz"
    np.savez(path, **parts, train_label=labels, test_label=labels, target_label=(labels + 1) % 40)
    return path


WRITERS = {
    "packed": write_packed,
    "modelnet40_ply_hdf5_2048": write_hdf5,
    "modelnet40_normal_resampled": write_resampled,
    "CLASS/train|test/*": write_folders,
    "IF-Defense npz": write_if_defense,
}


@pytest.mark.parametrize("layout", WRITERS)
def test_a_layout_is_recognised_and_read(tmp_path, layout):
    root = WRITERS[layout](tmp_path)
    assert detect_layout(root) == layout
    points, labels = clouds_and_labels(num_points=POINTS + 8 * (layout in list(LAYOUTS)[1:3]))
    found = load_part(root, "test", POINTS)
    order = np.argsort(labels, kind="stable") if layout.startswith("CLASS") else np.arange(6)
    expected = points[order, :POINTS]
    if layout == "packed":
        expected = steps_of(expected) * np.float32(1.02 / 32767)
    expected = turned(expected, LAYOUTS[layout].up or "z")
    limit = {"rtol": 0, "atol": 0 if layout != "packed" else 1e-7}
    np.testing.assert_allclose(found.points, expected, **limit)
    np.testing.assert_array_equal(found.labels, labels[order])
    assert found.points.dtype == np.float32
    assert found.labels.dtype == np.int64
    if layout == "IF-Defense npz":
        assert found.classes == MODELNET40_CLASSES
        np.testing.assert_array_equal(found.targets, labels + 1)
    else:
        assert found.classes == CLASSES
        assert list(found.names) == [names_of(labels)[index] for index in order]
        assert found.targets is None


def test_meshes_in_folders_are_sampled(tmp_path):
    for part in ("train", "test"):
        (tmp_path / "box" / part).mkdir(parents=True)
        for side in (1, 2):
            box = trimesh.creation.box((side, side, side))
            write_mesh(tmp_path / "box" / part / f"box_{side}.off", Mesh(box.vertices, box.faces))
    found = load_part(tmp_path, "train", 100)
    assert list(found.names) == ["box_1", "box_2"]
    np.testing.assert_allclose(np.abs(found.points).max(axis=2), [[0.5] * 100, [1.0] * 100], atol=1e-6)


def test_what_torch_geometric_leaves_behind_is_read(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torch_geometric.datasets", reason="PyTorch Geometric is not installed")
    classes = ["bathtub", "bed"]
    for name, side in zip(classes, (1.0, 2.0), strict=True):
        for part in ("train", "test"):
            folder = tmp_path / "raw" / name / part
            folder.mkdir(parents=True)
            box = trimesh.creation.box((side, side, side))
            lines = [" ".join(map(str, vertex)) for vertex in box.vertices.tolist()]
            lines += ["3 " + " ".join(map(str, face)) for face in box.faces.tolist()]
            (folder / f"{name}_0001.off").write_text("OFF\n8 12 0\n" + "\n".join(lines) + "\n")
    monkeypatch.setattr(datasets.ModelNet, "raw_file_names", classes)  # else it would download what it misses
    datasets.ModelNet(str(tmp_path), name="10")
    assert detect_layout(tmp_path) == "torch_geometric"
    found = load_part(tmp_path, "test", 50)
    assert found.classes == ("bathtub", "bed")
    np.testing.assert_array_equal(found.labels, [0, 1])
    np.testing.assert_allclose(np.abs(found.points).max(axis=2), [[0.5] * 50, [1.0] * 50], atol=1e-6)


class Bomb:
    """A pickle that would leave a file behind if anything unpickled it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_in_the_place_of_processed_data_is_never_run(tmp_path):
    pytest.importorskip("torch_geometric", reason="PyTorch Geometric is not installed")
    (tmp_path / "processed").mkdir()
    torch.save((Bomb(tmp_path / "ran"), {}), tmp_path / "processed" / "test.pt")
    with pytest.raises(DataError, match=r"test\.pt: not what torch_geometric\.datasets\.ModelNet saves"):
        load_part(tmp_path, "test")
    assert not (tmp_path / "ran").exists()


def test_without_torch_geometric_it_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "processed").mkdir()
    (tmp_path / "processed" / "test.pt").touch()
    monkeypatch.setitem(sys.modules, "torch_geometric.data", None)
    with pytest.raises(ImportError, match="pip install torch-geometric"):
        load_part(tmp_path, "test")


def damage_label(root):
    np.savez(
        root / "test.npz",
        points=np.zeros((1, POINTS, 3), np.int16),
        label=np.uint8([9]),
        name=np.array(["a"]),
    )


def damage_size(root):
    np.savez(
        root / "test.npz",
        points=np.zeros((2, POINTS, 3), np.int16),
        label=np.uint8([1]),
        name=np.array(["a"]),
    )


def damage_key(root):
    np.savez(root / "test.npz", points=np.zeros((2, POINTS, 3), np.int16))


def damage_type(root):
    np.savez(root / "test.npz", points=np.zeros((1, POINTS, 3)), label=np.uint8([0]), name=np.array(["a"]))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (damage_label, "cloud 0: label 9 is not among 3 classes"),
        (damage_size, r"labels must be \(2,\), one a cloud, got \(1,\)"),
        (damage_key, r"test\.npz: label, name missing; it holds points"),
        (damage_type, r"test\.npz: points must be int16, got float64"),
        (lambda root: (root / "test.npz").write_bytes(b"PK"), r"test\.npz: not a complete npz file"),
        (lambda root: (root / "test.npz").unlink(), "there are no files of the test part"),
        (lambda root: (root / "classes.txt").unlink(), r"classes\.txt: there is no such file"),
    ],
)
def test_damaged_packed_files_are_named(tmp_path, damage, match):
    damage(write_packed(tmp_path))
    with pytest.raises(DataError, match=match) as caught:
        load_part(tmp_path, "test", POINTS)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("write", "damage", "match"),
    [
        (
            write_hdf5,
            lambda r: (r / "ply_data_test1.h5").write_bytes(b"x"),
            r"test1\.h5: not a complete h5 file",
        ),
        (write_hdf5, lambda r: (r / "shape_names.txt").unlink(), r"shape_names\.txt: there is no such file"),
        (
            write_resampled,
            lambda r: (r / "bed" / "bed_0003.txt").unlink(),
            r"bed_0003\.txt: there is no such file",
        ),
        (
            write_resampled,
            lambda r: (r / "bed" / "bed_0003.txt").write_text("1,2\n"),
            r"bed_0003\.txt: line 1: three coordinates are needed",
        ),
        (
            write_folders,
            lambda r: write_cloud(r / "bed/test/bed_0000.ply", np.eye(3), force=True),
            r"bed_0000\.ply: .* 3 points, 32",
        ),
    ],
)
def test_damaged_layouts_are_named(tmp_path, write, damage, match):
    damage(write(tmp_path))
    with pytest.raises(DataError, match=match):
        load_part(tmp_path, "test", POINTS)


def test_infinite_clouds_are_named(tmp_path):
    points, labels = clouds_and_labels()
    points[4, 3, 1] = np.inf
    np.savez(tmp_path / "a.npz", test_pc=points, test_label=labels)
    with pytest.raises(DataError, match=r"a\.npz: cloud 4, point 3 is not finite"):
        load_part(tmp_path / "a.npz", "test", POINTS)


def test_more_points_than_are_stored_are_refused(tmp_path):
    with pytest.raises(DataError, match="its clouds have 32 points, 33 are asked for"):
        load_part(write_packed(tmp_path), "test", 33)


def test_an_unknown_layout_says_which_are_known(tmp_path):
    (tmp_path / "readme.md").touch()
    with pytest.raises(
        DataError, match="its layout is not known; known are packed, modelnet40_ply_hdf5_2048"
    ):
        detect_layout(tmp_path)
    with pytest.raises(DataError, match="there is no such file or folder"):
        detect_layout(tmp_path / "none")


def test_the_root_is_an_argument_or_a_variable_and_either_folder(tmp_path, monkeypatch):
    (tmp_path / "modelnet40").mkdir()
    write_packed(tmp_path / "modelnet40")
    monkeypatch.delenv("IFDEFENSE_DATA", raising=False)
    expected = load_modelnet40(tmp_path, "test", POINTS).points
    np.testing.assert_array_equal(load_modelnet40(tmp_path / "modelnet40", "test", POINTS).points, expected)
    with pytest.raises(
        DataError, match=r"no folder of modelnet40 is given: pass root, or set .* IFDEFENSE_DATA"
    ):
        load_modelnet40()
    monkeypatch.setenv("IFDEFENSE_DATA", str(tmp_path))
    np.testing.assert_array_equal(load_modelnet40(None, "test", POINTS).points, expected)
    monkeypatch.setenv("IFDEFENSE_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(DataError, match="elsewhere: there is no such"):
        load_modelnet40()


def test_splits_part_the_official_training_set(tmp_path):
    write_packed(tmp_path)
    parts = [load_modelnet40(tmp_path, split, POINTS) for split in ("train", "validation")]
    whole = load_part(tmp_path, "train", POINTS)
    assert sum(len(part) for part in parts) == len(whole) == 12
    rows = np.concatenate([part.points for part in parts]).reshape(12, -1)
    np.testing.assert_array_equal(np.unique(rows, axis=0), np.unique(whole.points.reshape(12, -1), axis=0))
    np.testing.assert_array_equal(np.sort(parts[1].labels), [0, 1, 2])  # one of four a class


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no split 'dev'; there are train, validation and test"):
        load_modelnet40(tmp_path, "dev")


def test_holdout_takes_its_share_of_every_class():
    labels = np.repeat([3, 5, 7], [100, 30, 1])
    mask = holdout(labels)
    assert [mask[labels == label].sum() for label in (3, 5, 7)] == [10, 3, 0]
    np.testing.assert_array_equal(mask, holdout(labels))
    assert not np.array_equal(mask, holdout(labels, seed=1))


def write_meshes(root):
    vertices = np.uint16(
        [[0, 0, 0], [65535, 0, 0], [0, 65535, 0], [0, 0, 0], [65535, 65535, 0], [0, 65535, 65535]]
    )
    np.savez(
        root / "meshes_0.npz",
        vertices=vertices,
        faces=np.uint16([[0, 1, 2], [0, 2, 1]]),
        vertex_offset=np.int64([0, 3, 6]),
        face_offset=np.int64([0, 1, 2]),
        label=np.uint8([1, 0]),
        name=np.array(["a/1", "b/2"]),
    )
    (root / "classes.txt").write_text("bed\nsofa\n")


def test_packed_meshes_are_cut_into_shapes(tmp_path):
    write_meshes(tmp_path)
    found = load_packed_meshes(tmp_path)
    assert len(found) == 2
    np.testing.assert_array_equal(
        found.meshes[0].vertices, [[-0.5, -0.5, -0.5], [0.5, -0.5, -0.5], [-0.5, 0.5, -0.5]]
    )
    np.testing.assert_array_equal(found.meshes[1].faces, [[0, 2, 1]])
    np.testing.assert_array_equal(found.labels, [1, 0])
    assert list(found.names) == ["a/1", "b/2"]
    assert found.classes == ("bed", "sofa")


def test_packed_meshes_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"there are no meshes_\*\.npz in it"):
        load_packed_meshes(tmp_path)
    write_meshes(tmp_path)
    arrays = dict(np.load(tmp_path / "meshes_0.npz"))
    np.savez(tmp_path / "meshes_0.npz", **{**arrays, "vertex_offset": np.int64([0, 3, 7])})
    with pytest.raises(DataError, match=r"meshes_0\.npz: the offsets do not fit"):
        load_packed_meshes(tmp_path)
    np.savez(tmp_path / "meshes_0.npz", **{**arrays, "faces": np.uint16([[0, 1, 2], [0, 2, 3]])})
    with pytest.raises(DataError, match=r"meshes_0\.npz: mesh face 0 names a vertex outside"):
        load_packed_meshes(tmp_path)


def test_a_set_of_clouds_is_cut_with_its_labels():
    points, labels = clouds_and_labels()
    clouds = CloudSet(points, labels, np.array(names_of(labels)), CLASSES, targets=(labels + 1) % 3)
    some = clouds[labels == 2]
    np.testing.assert_array_equal(some.points, points[labels == 2])
    np.testing.assert_array_equal(some.targets, [0, 0])
    assert list(some.names) == ["sofa_0002", "sofa_0005"]
    assert clouds[:0].points.shape == (0, POINTS, 3)
    with pytest.raises(ValueError, match=r"points must be \(S, N, 3\)"):
        CloudSet(points[0], labels, np.array(names_of(labels)), CLASSES)
    with pytest.raises(ValueError, match="cloud 1: target -1 is not among 3 classes"):
        CloudSet(points, labels, clouds.names, CLASSES, targets=labels - (labels == 1) * 2)


def test_modelnet40_itself_has_its_official_size(data_root):
    splits = {split: load_modelnet40(data_root, split) for split in ("train", "validation", "test")}
    assert len(splits["train"]) + len(splits["validation"]) == 9843
    assert len(splits["test"]) == 2468
    for clouds in splits.values():
        assert clouds.points.shape[1:] == (1024, 3)
        assert clouds.classes == MODELNET40_CLASSES
        assert np.linalg.norm(clouds.points, axis=2).max() < 1.01
        assert all(
            name.startswith(clouds.classes[label])
            for name, label in zip(clouds.names, clouds.labels, strict=True)
        )
    assert not set(splits["train"].names) & set(splits["validation"].names)
    np.testing.assert_array_equal(np.unique(splits["validation"].labels), np.arange(40))


def test_there_is_no_training_set_of_another_name() -> None:
    with pytest.raises(ValueError, match="'modelnet10'; there are modelnet40, procedural"):
        training_sets("modelnet10")
