from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from attack_checks import check, linear_case

from attacks.base import ThreatModel
from attacks.optimised import advpc
from attacks.optimised.advpc import AdvPC
from ifdefense.checkpoints import save_safetensors
from ifdefense.point_networks.autoencoder import AutoEncoder
from ifdefense.provenance import digest


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
    monkeypatch.setattr(advpc, "SHIPPED", tmp_path / "a.safetensors")
    advpc.pretrained.cache_clear()
    attack = AdvPC(restarts=1, iterations=2)
    result = attack(model, points, labels)
    weights = AutoEncoder.load(tmp_path / "a.safetensors").double()
    named = AdvPC(restarts=1, iterations=2, autoencoder=lambda x: weights(x))
    assert torch.equal(result.points, named(model, points, labels).points)
    assert attack.autoencoder is AdvPC().autoencoder
    assert next(attack.autoencoder.parameters()).dtype == torch.float32  # a copy computes in float64
    advpc.pretrained.cache_clear()


def test_the_weights_of_the_auto_encoder_count_in_a_digest() -> None:
    attack = AdvPC()
    other = copy.deepcopy(attack)
    assert digest(attack) == digest(other) == digest(AdvPC())
    other.autoencoder.code.bias[0] += 1e-6
    assert digest(attack) != digest(other)


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
