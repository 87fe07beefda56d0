from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import classifiers
from classifiers import train
from classifiers.pointnet import PointNet
from classifiers.train import Clouds, Options, Run, accuracy, augment, clouds_from
from ifdefense.shapes.procedural import CLASSES

TINY = Options(schedule=((8, 2), (32, 2)), batch=8, rate=1e-3)


def blobs(count: int, seed: int) -> Clouds:
    """Two classes that differ in shape: flat and long clouds."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    points = (
        rng.normal(size=(count, 32, 3)) * np.where(labels[:, None] == 0, [1, 1, 0.1], [0.2, 0.2, 1])[:, None]
    )
    return clouds_from(points, labels)


def run(folder: Path, options: Options = TINY) -> Run:
    torch.manual_seed(0)
    model = PointNet(2, feature_transform=False)
    return Run(model, blobs(40, 0), {"validation": blobs(20, 1)}, options, folder)


def test_training_learns_and_keeps_what_validates_best(tmp_path: Path) -> None:
    trained = run(tmp_path, dataclasses.replace(TINY, schedule=((32, 6),)))
    best = trained()
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert best["mean"] == pytest.approx(max(entry["mean"] for entry in entries), abs=1e-4)
    assert best["mean"] > 0.8
    kept = classifiers.load("pointnet", tmp_path / "best.safetensors")
    assert accuracy(kept, trained.validation["validation"]) == pytest.approx(best["mean"], abs=0.051)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole")
    whole()
    interrupted = run(tmp_path / "parts")
    save = Run.keep

    def crash(self: Run) -> None:
        save(self)
        if self.epoch == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "keep", crash)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    monkeypatch.undo()
    resumed = run(tmp_path / "parts")
    assert resumed.resume()
    assert resumed.epoch == 3
    assert resumed() == whole.best
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_run_does_not_go_on_with_other_settings(tmp_path: Path) -> None:
    run(tmp_path, dataclasses.replace(TINY, schedule=((16, 1),)))()
    with pytest.raises(ValueError, match="belongs to a run with other options"):
        run(tmp_path).resume()


def test_schedule_gives_the_points_of_each_epoch() -> None:
    assert TINY.epochs == 4
    assert [TINY.points_at(epoch) for epoch in range(4)] == [8, 8, 32, 32]
    with pytest.raises(ValueError, match="epoch 4 lies after the schedule"):
        TINY.points_at(4)


def test_a_fraction_is_an_epoch_of_a_part_of_the_clouds() -> None:
    options = Options(((8, 1.5), (32, 0.25)), batch=4)
    assert options.epochs == 3
    assert [options.points_at(epoch) for epoch in range(3)] == [8, 8, 32]
    assert [options.batches_at(epoch, 40) for epoch in range(3)] == [10, 5, 2]
    assert options.batches_at(2, 5) == 1


def test_augmentation_without_changes_takes_a_part_of_each_cloud() -> None:
    still = Options(scale=1, shift=0, jitter=0)
    points = torch.randn(2, 20, 3)
    taken = augment(points, 7, still, torch.Generator().manual_seed(0))
    assert taken.shape == (2, 7, 3)
    for cloud, part in zip(points.tolist(), taken.tolist(), strict=True):
        assert len({cloud.index(point) for point in part}) == 7


def test_augmentation_turns_about_the_up_axis() -> None:
    points = torch.randn(5, 20, 3)
    options = Options(scale=1, shift=0, jitter=0, turn=180)
    turned = augment(points, 20, options, torch.Generator().manual_seed(0))
    torch.testing.assert_close(turned.norm(dim=2).sort(1).values, points.norm(dim=2).sort(1).values)
    torch.testing.assert_close(turned[..., 2].sort(1).values, points[..., 2].sort(1).values)
    assert (turned[..., 0].sort(1).values - points[..., 0].sort(1).values).abs().amax(1).min() > 0.01


def test_jitter_and_shift_stay_in_their_bounds() -> None:
    points = torch.zeros(50, 20, 3)
    moved = augment(points, 20, Options(shift=0.1, jitter=0.01), torch.Generator().manual_seed(0))
    assert moved.abs().max() <= 0.15
    assert moved.std(1).max() < 0.05


def test_purified_copies_are_trained_and_validated_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(per_class: int, num_points: int, seed: int) -> object:
        clouds = blobs(2 * len(CLASSES), seed)
        return type(
            "Set", (), {"points": clouds.points.numpy(), "labels": clouds.labels.numpy(), "classes": CLASSES}
        )

    monkeypatch.setattr("ifdefense.data.sets.make_dataset", small)
    np.savez(
        tmp_path / "copies.npz",
        points=np.random.default_rng(0).normal(size=(10, 32, 3)) * 9,
        label=np.zeros(10),
    )
    clouds, validation, classes = train.load_data(
        "procedural", tmp_path / "copies.npz", tmp_path / "copies.npz"
    )
    assert (len(clouds), classes) == (2 * len(CLASSES) + 10, len(CLASSES))
    assert {name: len(part) for name, part in validation.items()} == {
        "validation": 2 * len(CLASSES),
        "purified": 10,
    }
    assert clouds.points.norm(dim=2).max() <= 1 + 1e-6
    args = [
        "--data",
        "procedural",
        "--no-feature-transform",
        "--out",
        str(tmp_path / "run"),
        "--schedule",
        "16x1",
    ]
    args += [
        "--hybrid",
        str(tmp_path / "copies.npz"),
        "--export",
        str(tmp_path / "weights" / "a.safetensors"),
    ]
    outcome = CliRunner().invoke(train.main, args)
    assert outcome.exit_code == 0, outcome.output
    assert classifiers.load("pointnet", tmp_path / "weights" / "a.safetensors")(clouds.points[:2]).shape == (
        2,
        len(CLASSES),
    )
    assert f"{2 * len(CLASSES) + 10} training clouds" in (tmp_path / "weights" / "a.md").read_text()


def test_a_bad_schedule_is_refused(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(train.main, ["--out", str(tmp_path), "--schedule", "many"])
    assert outcome.exit_code == 2
    assert "'many' is no schedule such as" in outcome.output
