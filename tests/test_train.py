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
from classifiers.augmentation import augment
from classifiers.options import ClassifierOptions
from classifiers.pointnet import PointNet
from classifiers.run import ClassifierRun, accuracy
from ifdefense.data.errors import DataError
from ifdefense.shapes.procedural import CLASSES
from ifdefense.training.data.clouds import TrainingClouds
from ifdefense.training.runs import RunError

TINY = ClassifierOptions(schedule=((8, 2), (32, 2)), batch_size=8, lr=1e-3)


def blobs(count: int, seed: int) -> TrainingClouds:
    """Two classes that differ in shape: flat and long clouds."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    points = (
        rng.normal(size=(count, 32, 3)) * np.where(labels[:, None] == 0, [1, 1, 0.1], [0.2, 0.2, 1])[:, None]
    )
    return TrainingClouds.of_arrays(points, labels)


def blob_set(seed: int = 0) -> object:
    clouds = blobs(2 * len(CLASSES), seed)
    content = {"points": clouds.points.numpy(), "labels": clouds.labels.numpy(), "classes": CLASSES}
    return type("Set", (), content)


def run(folder: Path, options: ClassifierOptions = TINY) -> ClassifierRun:
    torch.manual_seed(0)
    model = PointNet(2, feature_transform=False)
    return ClassifierRun(model, blobs(40, 0), {"validation": blobs(20, 1)}, options, folder)


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
    save = ClassifierRun.save

    def crash(self: ClassifierRun) -> None:
        save(self)
        if self.position == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(ClassifierRun, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    monkeypatch.undo()
    resumed = run(tmp_path / "parts")
    assert resumed.resume()
    assert resumed.position == 3
    assert resumed() == whole.best
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_run_is_not_resumed_with_other_settings_or_data(tmp_path: Path) -> None:
    run(tmp_path, dataclasses.replace(TINY, schedule=((16, 1),)))()
    with pytest.raises(
        RunError, match=r"belongs to a run with other settings: schedule was \[\[16, 1\]\], not"
    ):
        run(tmp_path).resume()
    same = dataclasses.replace(TINY, schedule=((16, 1),))
    assert run(tmp_path, same).resume()
    for train_set, validation in ((blobs(40, 7), blobs(20, 1)), (blobs(40, 0), blobs(20, 8))):
        model = PointNet(2, feature_transform=False)
        with pytest.raises(RunError, match="data was"):
            ClassifierRun(model, train_set, {"validation": validation}, same, tmp_path).resume()


def test_schedule_gives_the_points_of_each_epoch() -> None:
    assert TINY.epochs == 4
    assert [TINY.points_at(epoch) for epoch in range(4)] == [8, 8, 32, 32]
    with pytest.raises(ValueError, match="epoch 4 lies after the schedule"):
        TINY.points_at(4)


def test_a_fraction_is_an_epoch_of_a_part_of_the_clouds() -> None:
    options = ClassifierOptions(((8, 1.5), (32, 0.25)), batch_size=4)
    assert options.epochs == 3
    assert [options.points_at(epoch) for epoch in range(3)] == [8, 8, 32]
    assert [options.batches_at(epoch, 40) for epoch in range(3)] == [10, 5, 2]
    assert options.batches_at(2, 5) == 1


def test_augmentation_without_changes_takes_a_part_of_each_cloud() -> None:
    still = ClassifierOptions(max_scale=1, max_shift=0, jitter=0)
    points = torch.randn(2, 20, 3)
    taken = augment(points, 7, still, torch.Generator().manual_seed(0))
    assert taken.shape == (2, 7, 3)
    for cloud, part in zip(points.tolist(), taken.tolist(), strict=True):
        assert len({cloud.index(point) for point in part}) == 7


def test_augmentation_rotates_about_the_up_axis() -> None:
    points = torch.randn(5, 20, 3)
    options = ClassifierOptions(max_scale=1, max_shift=0, jitter=0, max_rotation=180)
    turned = augment(points, 20, options, torch.Generator().manual_seed(0))
    torch.testing.assert_close(turned.norm(dim=2).sort(1).values, points.norm(dim=2).sort(1).values)
    torch.testing.assert_close(turned[..., 2].sort(1).values, points[..., 2].sort(1).values)
    assert (turned[..., 0].sort(1).values - points[..., 0].sort(1).values).abs().amax(1).min() > 0.01


def test_jitter_and_shift_stay_in_their_bounds() -> None:
    points = torch.zeros(50, 20, 3)
    moved = augment(
        points, 20, ClassifierOptions(max_shift=0.1, jitter=0.01), torch.Generator().manual_seed(0)
    )
    assert moved.abs().max() <= 0.15
    assert moved.std(1).max() < 0.05


def test_purified_copies_are_trained_and_validated_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ifdefense.training.data.clouds.make_dataset", lambda *_, seed: blob_set(seed))
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
        "--run",
        str(tmp_path / "run"),
        "--schedule",
        "16x1",
    ]
    args += [
        "--hybrid",
        str(tmp_path / "copies.npz"),
        "--out",
        str(tmp_path / "weights" / "a.safetensors"),
    ]
    outcome = CliRunner().invoke(train.main, args)
    assert outcome.exit_code == 0, outcome.output
    assert classifiers.load("pointnet", tmp_path / "weights" / "a.safetensors")(clouds.points[:2]).shape == (
        2,
        len(CLASSES),
    )
    assert f"{2 * len(CLASSES) + 10} training clouds" in (tmp_path / "weights" / "a.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--schedule many", "'many' is not a schedule such as"),
        ("--batch-size 0", "batch_size must be at least 1, got 0"),
        ("--lr nan", "lr must be from 1e-12 to 10, got nan"),
        ("--model pointnet3", "'pointnet3' is not one of"),
        ("--out weights.pth", "weights are written as .safetensors"),
        ("--out there.safetensors", "exists already; --force replaces it"),
        ("--out file/w.safetensors", "file cannot be written: "),
        ("--run file", "file cannot be written: "),
        ("--data procedural --test", "--test measures on ModelNet40, not on procedural"),
        ("", "set the variable IFDEFENSE_DATA"),
        ("--data procedural --hybrid file", "the file is empty"),
    ],
)
def test_the_command_refuses_bad_options_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IFDEFENSE_DATA", raising=False)
    monkeypatch.setattr("ifdefense.training.data.clouds.make_dataset", lambda *_, **__: blob_set())
    monkeypatch.setattr(ClassifierRun, "__call__", lambda *_: pytest.fail("a training began"))
    for name in ("file", "there.safetensors"):
        (tmp_path / name).touch()
    outcome = CliRunner().invoke(train.main, ["--run", "run", *arguments.split()])
    assert outcome.exit_code in (1, 2) and message in outcome.output, outcome.output
    assert isinstance(outcome.exception, SystemExit)


def test_damaged_purified_copies_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", points=np.zeros((2, 5, 3)))
    with pytest.raises(DataError, match=r"a\.npz: label missing"):
        TrainingClouds.of_file(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", points=np.zeros((2, 5, 3)), label=np.zeros(3))
    with pytest.raises(DataError, match=r"points must be \(S, N, 3\) and label \(S,\)"):
        TrainingClouds.of_file(tmp_path / "a.npz")
    with pytest.raises(DataError, match="clouds of 32 and of 5 points cannot be joined"):
        blobs(2, 0).joined(TrainingClouds(torch.zeros(1, 5, 3), torch.zeros(1)))


def test_the_short_help_option_works() -> None:
    outcome = CliRunner().invoke(train.main, ["-h"])
    assert outcome.exit_code == 0 and "-h, --help" in outcome.output
