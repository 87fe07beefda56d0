"""Gradients of a surrogate and warm starts, against defences whose own gradients mislead."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from attack_checks import MeanClassifier, check, clouds, victim
from torch import Tensor

from attacks import (
    APGD,
    EOT,
    FGM,
    PGD,
    DefenceAware,
    FunctionPurifier,
    SaliencyDrop,
    SIAdv,
    SurrogateGradient,
    Transfer,
    WarmStart,
    WorstOf,
)
from attacks.gradient.pgd import Bounded

LABELS = torch.zeros(6, dtype=torch.long)
SHORT = PGD("linf", delta=0.1, iterations=3)


def flat(points: Tensor, num_points: int | None, seed: int) -> Tensor:
    """The points, with a derivative of 0 that is declared exact."""
    return points.detach() + 0 * points


def random(points: Tensor, num_points: int | None, seed: int) -> Tensor:
    """The points, with a derivative that differs from draw to draw."""
    noise = torch.randn(points.shape, generator=torch.Generator().manual_seed(seed), dtype=points.dtype)
    return points.detach() + noise * (points - points.detach())


def defended(purify: Any) -> tuple[DefenceAware, MeanClassifier]:
    """A linear classifier behind a defence that masks gradients."""
    classifier = MeanClassifier(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    purifier = FunctionPurifier(purify, deterministic=False, differentiable=True)
    return DefenceAware(classifier, purifier, eot=EOT(1)), classifier


def away() -> Tensor:
    """Clouds of class 0 that are fooled by shifting all points by 0.6 and no less."""
    points = clouds() - clouds().mean(1, keepdim=True)
    points[..., 0] += 0.4
    return points


@pytest.mark.parametrize("attack", [PGD(iterations=10, step=0.3), APGD(iterations=10)])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_surrogate_breaks_a_defence_of_random_gradients(attack: Any, norm: Any) -> None:
    model, classifier = defended(random)
    attack = dataclasses.replace(attack, norm=norm, delta=0.7)
    assert not attack(model, away(), LABELS).success.any()
    result = attack(SurrogateGradient(model, classifier), away(), LABELS)
    assert result.success.all()
    assert (classifier(result.points).argmax(1) == 1).all()


def test_the_surrogate_breaks_a_defence_without_gradient() -> None:
    model, classifier = defended(flat)
    attack = PGD("linf", delta=0.7, iterations=10, step=0.3)
    with pytest.raises(ValueError, match="passes no gradient for example 0"):
        attack(model, away(), LABELS)
    past = DefenceAware(classifier, FunctionPurifier(flat, deterministic=True), gradient="nearest")
    assert attack(SurrogateGradient(past, classifier), away(), LABELS).success.all()


def test_logits_are_those_of_the_model_and_gradients_are_mixed() -> None:
    model, other = victim(), victim()
    with torch.no_grad():
        other.head[2].weight.mul_(-2)
    points = clouds()

    def gradient(of: Any) -> Tensor:
        given = points.clone().requires_grad_()
        return torch.autograd.grad(of(given)[:, 0].sum(), given)[0]

    for share in (1.0, 0.25):
        mixed = SurrogateGradient(model, other, share)
        assert torch.equal(mixed(points), model(points))
        assert torch.equal(mixed(points.clone().requires_grad_()), model(points))
        expected = share * gradient(other) + (1 - share) * gradient(model)
        torch.testing.assert_close(gradient(mixed), expected)


def test_losses_see_fresh_draws_of_the_defence_and_success_is_that_of_the_defence() -> None:
    seeds: list[int] = []

    def record(points: Tensor, num_points: int | None, seed: int) -> Tensor:
        seeds.append(seed)
        return points

    purifier = FunctionPurifier(record, deterministic=False)
    model = SurrogateGradient(DefenceAware(victim(), purifier, eot=EOT(2), seed=9), victim())
    first = SHORT(model, clouds(), LABELS)
    assert seeds == [1, 2, 3, 4, 5, 6, 9]
    again = SHORT(model, clouds(), LABELS)
    assert seeds[7:] == seeds[:7] and torch.equal(first.points, again.points)


@pytest.mark.parametrize(
    ("share", "message"),
    [(0, r"share must be a number in \(0, 1\], got 0"), (1.5, "got 1.5"), (True, "True")],
)
def test_a_share_out_of_range_is_refused(share: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SurrogateGradient(victim(), victim(), share)


@pytest.mark.parametrize(
    ("surrogate", "message"),
    [
        (lambda x: x.sum((1, 2))[:, None].repeat(1, 3), r"logits of shape \(6, 3\), the model \(6, 4\)"),
        (lambda x: x.detach().sum((1, 2))[:, None].repeat(1, 4), "the surrogate gives no gradient"),
    ],
)
def test_an_unfit_surrogate_is_named(surrogate: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SHORT(SurrogateGradient(victim(), surrogate), clouds(), LABELS)


# Starts


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("attack", [SHORT, APGD("l2", epsilon=0.5, iterations=4)])
def test_a_warm_start_is_a_sound_attack(attack: Bounded, targeted: bool) -> None:
    check(WarmStart(attack, Transfer(attack, victim())), targeted)


def test_the_start_is_projected_onto_the_budget_and_used() -> None:
    """Steps of length 0 return the start, as far as the budget goes."""
    standing = dataclasses.replace(SHORT, step=0.0)
    points = clouds()
    far = points + torch.tensor([0.3, -0.05, 0.0], dtype=torch.float64)
    result = WarmStart(standing, far)(victim(), points, LABELS)
    expected = points + torch.tensor([0.1, -0.05, 0.0], dtype=torch.float64)
    torch.testing.assert_close(result.points, expected)
    assert result.iterations.tolist() == [3] * 6
    assert result.distances["linf"].tolist() == pytest.approx([0.1] * 6)
    wider = WarmStart(standing, far).with_epsilon(0.2)(victim(), points, LABELS)
    assert wider.distances["linf"].tolist() == pytest.approx([0.2] * 6)


def test_apgd_keeps_a_start_that_it_cannot_improve() -> None:
    """Behind random gradients the start that breaks the defence is all that there is."""
    model, classifier = defended(random)
    attack = APGD("linf", delta=0.7, iterations=4, early_stop=False)
    assert not attack(model, away(), LABELS).success.any()
    result = WarmStart(attack, Transfer(attack, classifier))(model, away(), LABELS)
    assert result.success.all()
    assert result.iterations.tolist() == [8] * 6


def test_attacks_start_from_their_part_of_the_batch() -> None:
    points, model = clouds(), victim()
    labels = model(points).argmax(1)
    labels[3:] = (labels[3:] + 1) % 4  # misclassified, so the second attack sees three clouds
    start = Transfer(SHORT, victim())
    standing = dataclasses.replace(SHORT, step=0.0, random_start=False)
    both = WorstOf((standing, WarmStart(SHORT, start)))
    alone = WarmStart(SHORT, start)(model, points[:3], labels[:3])
    torch.testing.assert_close(both(model, points, labels).points[:3], alone.points)


@pytest.mark.parametrize(
    ("attack", "start", "kind", "message"),
    [
        (SIAdv(), SHORT, TypeError, "SIAdv takes no start: it is not a Bounded attack"),
        (SHORT, SaliencyDrop(8, 4), ValueError, "SaliencyDrop is no start: it drops points"),
        (SHORT, [1], TypeError, "start must be an attack or a tensor, got list"),
        (SHORT, clouds()[:2], ValueError, r"the start has shape \(2, 40, 3\), the clouds have \(6, 40, 3\)"),
        (SHORT, clouds() / 0, ValueError, "the start of example 0 is NaN or infinite"),
        (FGM("linf"), SHORT, ValueError, r"FGM\(.*\) uses no start: it begins at the clean cloud"),
        (dataclasses.replace(SHORT, random_start=False), clouds(), ValueError, "uses no start"),
    ],
)
def test_what_cannot_start_is_named(attack: Any, start: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        WarmStart(attack, start)(victim(), clouds(), LABELS)
