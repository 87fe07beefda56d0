"""The auto-encoder: shapes, weights and training."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from attack_checks import clouds
from click.testing import CliRunner
from torch import Tensor

from ifdefense.checkpoints import CheckpointError, save_safetensors
from ifdefense.data.modelnet import load_modelnet40
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.geometry.points import chamfer_distance
from ifdefense.point_networks.autoencoder import SHIPPED, AutoEncoder
from ifdefense.training.data.clouds import TrainingClouds
from ifdefense.training.recipes import autoencoder as train
from ifdefense.training.recipes.autoencoder import AutoencoderOptions, AutoencoderRun, reconstruction_error

TINY = AutoencoderOptions(epochs=3, batch_size=4, points=20)


def small() -> AutoEncoder:
    torch.manual_seed(1)
    return AutoEncoder(code=8, points=20).double()


def test_the_reconstruction_has_its_own_number_of_points_and_ignores_order() -> None:
    model, points = small(), clouds()
    assert model(points).shape == model(points[:, :7]).shape == (6, 20, 3)
    torch.testing.assert_close(model(points.flip(1)), model(points))


def test_the_shipped_size_stays_under_four_megabytes(tmp_path: Path) -> None:
    save_safetensors(AutoEncoder(), tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size < 4e6


def run(folder: Path, options: AutoencoderOptions = TINY) -> AutoencoderRun:
    def shapes(seed: int) -> Tensor:
        points = torch.randn(12, 30, 3, generator=torch.Generator().manual_seed(seed))
        return to_unit_sphere(points * torch.tensor([1.0, 0.5, 0.1]))

    torch.manual_seed(0)
    return AutoencoderRun(AutoEncoder(8, 20), shapes(0), shapes(1), options, folder)


def test_training_learns_and_keeps_what_validates_best(tmp_path: Path) -> None:
    trained = run(tmp_path, AutoencoderOptions(epochs=12, batch_size=4, points=20, lr=5e-3))
    untrained = reconstruction_error(trained.model, trained.validation)
    best = trained()
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert best["chamfer"] == pytest.approx(min(entry["chamfer"] for entry in entries), abs=1e-6)
    assert best["chamfer"] < 0.5 * untrained
    kept = AutoEncoder.load(tmp_path / "best.safetensors")
    error = reconstruction_error(kept, trained.validation)
    assert error == pytest.approx(best["chamfer"], rel=0.01)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole")
    whole()
    interrupted = run(tmp_path / "parts")
    save = AutoencoderRun.save

    def crash(self: AutoencoderRun) -> None:
        save(self)
        if self.position == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(AutoencoderRun, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    monkeypatch.undo()
    resumed = run(tmp_path / "parts")
    assert resumed.resume() and resumed.position == 2
    assert resumed() == whole.best
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_run_does_not_go_on_with_other_settings(tmp_path: Path) -> None:
    run(tmp_path, AutoencoderOptions(epochs=1, batch_size=4, points=20))()
    with pytest.raises(ValueError, match="belongs to a run with other settings"):
        run(tmp_path).resume()


def test_the_command_trains_and_exports_with_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(name: str) -> tuple[TrainingClouds, TrainingClouds, int]:
        points = torch.randn(12, 30, 3, generator=torch.Generator().manual_seed(0))
        clouds = TrainingClouds.of_arrays(points.numpy(), np.zeros(12))
        return clouds, clouds, 1

    monkeypatch.setattr(train, "load_training_clouds", small)
    out = tmp_path / "weights" / "a.safetensors"
    args = ["--data", "procedural", "--epochs", "1", "--batch-size", "6", "--points", "16"]
    args += ["--run", str(tmp_path / "run"), "--out", str(out)]
    outcome = CliRunner().invoke(train.train_command, args)
    assert outcome.exit_code == 0, outcome.output
    assert AutoEncoder.load(out)(torch.randn(12, 30, 3)).shape == (12, 1024, 3)
    assert "12 training clouds" in out.with_suffix(".md").read_text()
    outcome = CliRunner().invoke(train.train_command, args)
    assert outcome.exit_code == 1 and "exists already; --force replaces it" in outcome.output
    outcome = CliRunner().invoke(train.train_command, ["--run", str(tmp_path / "run"), "--epochs", "0"])
    assert outcome.exit_code == 1 and "epochs must be at least 1, got 0" in outcome.output


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_safetensors(torch.nn.Linear(2, 2), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="does not fit AutoEncoder"):
        AutoEncoder.load(tmp_path / "a.safetensors")


@pytest.mark.skipif("IFDEFENSE_DATA" not in os.environ, reason="IFDEFENSE_DATA is not set: no ModelNet40")
def test_the_shipped_auto_encoder_rebuilds_validation_clouds() -> None:
    whole = load_modelnet40(split="validation")
    points = to_unit_sphere(torch.from_numpy(whole[np.arange(0, len(whole.labels), 50)].points))
    model = AutoEncoder.load(SHIPPED)
    error = reconstruction_error(model, points)
    assert error < 0.01
    assert chamfer_distance(points.roll(1, 0), points).mean() > 5 * error
