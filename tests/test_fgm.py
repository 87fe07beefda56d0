from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from attack_checks import check, clouds, linear_case, victim
from torch import Tensor

from attacks.base import PROJECTIONS, Attack, Norm, ThreatModel
from attacks.gradient.fgm import FGM, IFGM, MIFGM
from attacks.gradient.pgd import PGD

NORMS: tuple[Norm, ...] = ("l2", "point-l2", "linf")


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [FGM, IFGM, MIFGM])
def test_they_are_sound_attacks_that_fool_an_easy_victim(
    kind: Callable[..., Attack], norm: Norm, targeted: bool
) -> None:
    result = check(kind(norm, delta=0.4), targeted)
    assert result.success.float().mean() >= (0.3 if kind is FGM or targeted else 0.8)


def optimum(normal: Tensor, norm: Norm, count: int) -> float:
    """Smallest shift of all points that carries <mean, normal> up by 1."""
    return {
        "l2": math.sqrt(count) / float(normal.norm()),
        "point-l2": 1 / float(normal.norm()),
        "linf": 1 / float(normal.abs().sum()),
    }[norm]


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [FGM, IFGM, MIFGM])
def test_they_succeed_within_101_percent_of_the_optimum_only(
    kind: Callable[..., Attack], norm: Norm, targeted: bool
) -> None:
    model, points, labels, normal = linear_case()
    best = optimum(normal, norm, points.shape[1])
    for ratio in (0.99, 1.01):
        result = kind(norm, epsilon=ratio * best)(model, points, labels, 1 - labels if targeted else None)
        assert (result.success == (ratio > 1)).all()
        assert (result.distances[norm] <= ratio * best * (1 + 1e-9)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_one_is_the_other_where_it_should_be(norm: Norm) -> None:
    model, points = victim(), clouds()
    labels = model(points).argmax(1)
    plain = IFGM(norm, iterations=7)(model, points, labels).points
    assert torch.equal(plain, PGD(norm, iterations=7, random_start=False)(model, points, labels).points)
    assert torch.equal(plain, MIFGM(norm, iterations=7, momentum=0)(model, points, labels).points)
    assert not torch.equal(plain, MIFGM(norm, iterations=7)(model, points, labels).points)
    once = FGM(norm)(model, points, labels)
    assert torch.equal(once.points, IFGM(norm, iterations=1)(model, points, labels).points)
    assert once.iterations.tolist() == [1] * 6 and once.queries.tolist() == [2] * 6


@pytest.mark.parametrize("norm", NORMS)
def test_momentum_by_hand(norm: Norm) -> None:
    model, clean = victim(), clouds()[:1]
    label = model(clean).argmax(1)
    attack = MIFGM(norm, delta=0.05, iterations=6, step=0.3, momentum=0.7)
    budget, x, velocity = attack.budget(40), clean.clone(), torch.zeros_like(clean)
    for _ in range(6):
        x = x.requires_grad_()
        (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(x), label), x)
        velocity = 0.7 * velocity + gradient / gradient.abs().sum()
        unit = {
            "l2": velocity / velocity.norm(),
            "point-l2": velocity / velocity.norm(dim=2, keepdim=True).clamp_min(1e-300),
            "linf": velocity.sign(),
        }[norm]
        moved = x.detach() + 0.3 * budget * unit
        x = clean + PROJECTIONS[norm](moved - clean, budget)
    torch.testing.assert_close(attack(model, clean, label).points, x)


def test_defaults_are_the_published_ones() -> None:
    for attack in (FGM(), IFGM(), MIFGM()):
        assert attack.budget(1024) == pytest.approx(0.08 * math.sqrt(3072))
        assert attack.threat == ThreatModel("white-box", "both", "shift", "l2", attack.budget(1024))
    assert (MIFGM().iterations, MIFGM().step, MIFGM().momentum) == (50, None, 1.0)
    assert IFGM(epsilon=0.3).budget(7) == 0.3


def test_examples_that_are_done_leave_the_batch() -> None:
    model, points = victim(), clouds()
    wrong = (model(points).argmax(1) + torch.arange(6) % 2) % 4
    for kind in (IFGM, MIFGM):
        result = kind(delta=0.0, iterations=3, early_stop=True)(model, points, wrong)
        assert result.iterations.tolist() == [3, 0] * 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FGM(delta=-1.0), "FGM: delta must be a finite number >= 0, got -1.0"),
        (lambda: FGM(norm="l1"), "unknown norm 'l1'"),
        (lambda: IFGM(iterations=0), "iterations must be an integer >= 1"),
        (lambda: MIFGM(momentum=-0.1), "momentum must be a finite number >= 0"),
    ],
)
def test_bad_settings_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
