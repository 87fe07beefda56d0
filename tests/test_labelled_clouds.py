"""Labelled clouds of the benchmark: nested order, targets, splits and sources."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.clouds import LabelledClouds, load_clouds
from ifdefense.data import CloudSet, DataError, holdout
from ifdefense.data.packed import save_packed_clouds
from ifdefense.data.selection import nested_order
from ifdefense.shapes.procedural import CLASSES, make_dataset


def test_every_prefix_of_a_nested_order_is_in_proportion_to_the_classes() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [600, 300, 100]))
    order = nested_order(labels, seed=3)
    assert sorted(order.tolist()) == list(range(1000))
    for count in (10, 50, 200, 999):
        share = np.bincount(labels[order[:count]], minlength=3) - count * np.array([0.6, 0.3, 0.1])
        assert np.abs(share).max() <= 2
    assert np.array_equal(order, nested_order(labels, seed=3))
    assert not np.array_equal(order, nested_order(labels, seed=4))
    # Within a class, the order is random.
    assert np.abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1


@pytest.fixture
def folder(tmp_path):
    """A packed set: 40 training and 20 test clouds of four classes, told apart by their height."""
    rng = np.random.default_rng(0)
    for part, count in (("train_0", 40), ("test", 20)):
        labels = np.arange(count) % 4
        points = rng.uniform(-0.5, 0.5, (count, 64, 3)).astype(np.float32)
        points[:, :, 2] *= (1 + labels[:, None]) / 4
        names = np.array([f"{part}_{index}" for index in range(count)])
        save_packed_clouds(CloudSet(points, labels, names, ("a", "b", "c", "d")), tmp_path / f"{part}.npz")
    return tmp_path


def same(one: LabelledClouds, other: LabelledClouds) -> bool:
    return all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in ("points", "labels", "targets")
    )


@pytest.mark.parametrize("source", ["procedural", "folder"])
def test_fewer_clouds_are_the_first_of_more(source, folder) -> None:
    name = source if source == "procedural" else folder
    more = load_clouds(name, clouds=20, seed=1, num_points=64)
    for count in (1, 7, 19):
        assert same(load_clouds(name, clouds=count, seed=1, num_points=64), more[:count])
    assert not same(load_clouds(name, clouds=20, seed=2, num_points=64), more)
    assert not same(load_clouds(name, clouds=20, seed=1, num_points=64, split="validation"), more)
    assert more.points.dtype == torch.float32 and more.points.shape == (20, 64, 3)
    assert more.labels[: len(more.classes)].unique().numel() == len(more.classes)
    assert (more.targets != more.labels).all() and more.targets.max() < len(more.classes)
    torch.testing.assert_close(more.points.mean(1), torch.zeros(20, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(more.points.norm(dim=2).amax(1), torch.ones(20))


def test_procedural_clouds_are_of_shapes_that_no_network_was_trained_on() -> None:
    clouds = load_clouds(clouds=16)
    assert clouds.name == "procedural" and clouds.classes == CLASSES
    assert sorted(clouds.labels.tolist()) == list(range(16))
    made = make_dataset(1, 1024, seed=1_000_000)
    extents = np.ptp(made.points[clouds.labels.numpy()], axis=1)
    ratio = torch.from_numpy(extents) / (clouds.points.amax(1) - clouds.points.amin(1))
    torch.testing.assert_close(ratio, ratio[:, :1].expand(-1, 3))


def test_validation_clouds_are_held_out_from_training(folder) -> None:
    found = load_clouds(folder, split="validation", num_points=64)
    assert len(found) == holdout(np.arange(40) % 4).sum() == 4
    assert len(load_clouds(folder, clouds=1000, num_points=64)) == 20  # at most all


def test_blocks_are_consecutive_clouds() -> None:
    clouds = load_clouds(clouds=10, num_points=32)
    assert same(clouds.block(0, 4), clouds[:4]) and same(clouds.block(2, 4), clouds[8:])
    assert len(clouds.block(2, 4)) == 2
    with pytest.raises(ValueError, match="10 clouds have no block 3 of 4"):
        clouds.block(3, 4)
    assert clouds.digest() == load_clouds(clouds=10, num_points=32).digest() != clouds[:9].digest()


def test_targets_of_a_source_are_kept(tmp_path) -> None:
    points = np.random.default_rng(0).uniform(-1, 1, (6, 64, 3)).astype(np.float32)
    labels, targets = np.arange(6), np.arange(6)[::-1] + 20
    np.savez(tmp_path / "attacked.npz", test_pc=points, test_label=labels, target_label=targets)
    found = load_clouds(tmp_path / "attacked.npz", num_points=64)
    assert dict(zip(found.labels.tolist(), found.targets.tolist(), strict=True)) == {
        label: 25 - label for label in range(6)
    }
    # y up in the file.
    first = found.points[found.labels == 0][0]
    given = torch.from_numpy(points[0])
    given = torch.stack([given[:, 0], -given[:, 2], given[:, 1]], 1)
    given = given - given.mean(0)
    torch.testing.assert_close(first, given / given.norm(dim=1).max())


def test_corrupted_sets_are_chosen_by_name_and_variant(tmp_path) -> None:
    folder = tmp_path / "modelnet40-c"
    folder.mkdir()
    rng = np.random.default_rng(0)
    np.save(folder / "label.npy", np.arange(4))
    for variant in ("original", "gaussian_3"):
        np.save(folder / f"data_{variant}.npy", rng.uniform(-1, 1, (4, 64, 3)))
    clean, noisy = (
        load_clouds(name, root=tmp_path, num_points=64)
        for name in ("modelnet40-c", "modelnet40-c:gaussian_3")
    )
    assert torch.equal(clean.labels, noisy.labels) and not torch.equal(clean.points, noisy.points)
    with pytest.raises(DataError, match="no variant 'gaussian_9'; there are gaussian_3, original"):
        load_clouds("modelnet40-c:gaussian_9", root=tmp_path, num_points=64)


def test_unknown_names_get_the_nearest_match() -> None:
    with pytest.raises(
        DataError, match=r"'modelnet4' \(did you mean 'modelnet40'\?\); data sets are procedural"
    ):
        load_clouds("modelnet4")
    with pytest.raises(ValueError, match="no split 'train'; there are test, validation"):
        load_clouds(split="train")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clouds"):
        load_clouds(clouds=0)


def test_attacked_clouds_are_not_read_as_clean(tmp_path) -> None:
    path = tmp_path / "attacked.npz"
    np.savez(path, points=np.zeros((4, 64, 3), np.float32), label=np.arange(4), about=np.array("{}"))
    with pytest.raises(DataError, match="--attacked"):
        load_clouds(path, num_points=64)
