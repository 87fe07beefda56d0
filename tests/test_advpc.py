from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from attack_checks import check, clouds, linear_case
from click.testing import CliRunner
from torch import Tensor

from attacks.autoencoder import network, train
from attacks.autoencoder.network import AutoEncoder
from attacks.autoencoder.train import AutoencoderOptions, AutoencoderRun, reconstruction_error
from attacks.base import ThreatModel
from attacks.functional.distances import chamfer
from attacks.optimised.advpc import AdvPC
from ifdefense.checkpoints import CheckpointError, save_safetensors
from ifdefense.data.modelnet import load_modelnet40
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.geometry.points import chamfer_distance
from ifdefense.training.clouds import TrainingClouds

TINY = AutoencoderOptions(epochs=3, batch_size=4, points=20)


def small() -> AutoEncoder:
    torch.manual_seed(1)
    return AutoEncoder(code=8, points=20).double()


@pytest.mark.parametrize("targeted", [False, True])
def test_it_is_a_sound_attack_that_fools_an_easy_victim(targeted: bool) -> None:
    attack = AdvPC(epsilon=0.3, iterations=12, rate=0.03, autoencoder=small())
    assert check(attack, targeted).success.all()


def test_defaults_are_the_published_ones() -> None:
    attack = AdvPC()
    assert (attack.epsilon, attack.kappa, attack.gamma) == (0.18, 30, 0.25)
    assert (attack.restarts, attack.iterations, attack.rate) == (2, 200, 1e-2)
    assert attack.threat == ThreatModel("white-box", "both", "shift", "linf", 0.18)


def test_it_comes_near_the_optimum_of_a_linear_classifier() -> None:
    """Adam's steps are equal in every coordinate, as those of the optimum in L-infinity are."""
    model, points, labels, normal = linear_case()
    result = AdvPC(autoencoder=lambda x: x, restarts=1, iterations=20)(model, points, labels)
    assert result.success.all()
    optimum = 1 / normal.abs().sum()
    assert (result.distances["linf"] >= optimum * (1 - 1e-6)).all()
    assert (result.distances["linf"] <= optimum + 0.01).all()  # a step of Adam


def test_what_fools_the_reconstruction_too_is_preferred() -> None:
    """The auto-encoder undoes the first 0.05 of a shift along x."""
    model, points, labels, _ = linear_case()
    shrink = torch.tensor([0.05, 0.0, 0.0], dtype=torch.float64)
    plain = AdvPC(gamma=0, restarts=1, iterations=40)(model, points, labels)
    both = AdvPC(autoencoder=lambda x: x - shrink, restarts=1, iterations=40)(model, points, labels)
    assert (model(plain.points - shrink).argmax(1) == labels).all()
    assert (model(both.points - shrink).argmax(1) != labels).all()
    assert both.success.all()
    assert (both.distances["linf"] > plain.distances["linf"]).all()


def test_a_success_is_kept_even_if_no_reconstruction_succeeds() -> None:
    model, points, labels, _ = linear_case()
    result = AdvPC(autoencoder=lambda x: 0 * x, restarts=1, iterations=40)(model, points, labels)
    assert result.success.all()
    assert (result.distances["linf"] < 0.08).all()  # the nearest, not the last at 0.18


def test_the_shipped_weights_are_used_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, points, labels, _ = linear_case()
    save_safetensors(small(), tmp_path / "a.safetensors")
    monkeypatch.setattr(network, "shipped", lambda package, name: tmp_path / "a.safetensors")
    network.pretrained.cache_clear()
    attack = AdvPC(restarts=1, iterations=2)
    result = attack(model, points, labels)
    named = AdvPC(
        restarts=1, iterations=2, autoencoder=AutoEncoder.from_file(tmp_path / "a.safetensors").double()
    )
    assert torch.equal(result.points, named(model, points, labels).points)
    network.pretrained.cache_clear()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": -1.0}, "epsilon must be a finite number >= 0"),
        ({"gamma": -0.1}, r"gamma must be a number in \[0, 1\], got -0.1"),
        ({"iterations": 0}, "iterations must be an integer >= 1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdvPC(**settings)


def test_an_auto_encoder_without_gradient_is_named() -> None:
    model, points, labels, _ = linear_case()
    with pytest.raises(ValueError, match="the auto-encoder passes no gradient"):
        AdvPC(autoencoder=lambda x: x.detach())(model, points, labels)


# The auto-encoder


def test_the_reconstruction_has_its_own_number_of_points_and_ignores_order() -> None:
    model, points = small(), clouds()
    assert model(points).shape == model(points[:, :7]).shape == (6, 20, 3)
    torch.testing.assert_close(model(points.flip(1)), model(points))


def test_the_shipped_size_stays_under_four_megabytes(tmp_path: Path) -> None:
    save_safetensors(AutoEncoder(), tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size < 4e6


def test_chamfer_is_that_of_the_point_operations() -> None:
    one = clouds()[:2].requires_grad_()
    other = clouds()[2:4, :31]
    torch.testing.assert_close(chamfer(one, other), chamfer_distance(one, other))
    (found,) = torch.autograd.grad(chamfer(one, other).sum(), one)
    (expected,) = torch.autograd.grad(chamfer_distance(one, other).sum(), one)
    torch.testing.assert_close(found, expected)


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
    kept = AutoEncoder.from_file(tmp_path / "best.safetensors")
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
    outcome = CliRunner().invoke(train.main, args)
    assert outcome.exit_code == 0, outcome.output
    assert AutoEncoder.from_file(out)(torch.randn(12, 30, 3)).shape == (12, 1024, 3)
    assert "12 training clouds" in out.with_suffix(".md").read_text()
    outcome = CliRunner().invoke(train.main, args)
    assert outcome.exit_code == 1 and "exists already; --force replaces it" in outcome.output
    outcome = CliRunner().invoke(train.main, ["--run", str(tmp_path / "run"), "--epochs", "0"])
    assert outcome.exit_code == 1 and "epochs must be at least 1, got 0" in outcome.output


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_safetensors(torch.nn.Linear(2, 2), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="does not fit AutoEncoder"):
        AutoEncoder.from_file(tmp_path / "a.safetensors")


@pytest.mark.skipif("IFDEFENSE_DATA" not in os.environ, reason="IFDEFENSE_DATA is not set: no ModelNet40")
def test_the_shipped_auto_encoder_rebuilds_validation_clouds() -> None:
    whole = load_modelnet40(split="validation")
    points = to_unit_sphere(torch.from_numpy(whole[np.arange(0, len(whole.labels), 50)].points))
    model = network.pretrained(points.device, points.dtype)
    error = reconstruction_error(model, points)
    assert error < 0.01
    assert chamfer(points.roll(1, 0), points).mean() > 5 * error
