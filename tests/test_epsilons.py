"""Several budgets in one call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from attack_checks import clouds, linear_case, victim
from torch import Tensor

import attacks
from attacks import (
    APGD,
    PGD,
    AddCD,
    Attack,
    GeoA3,
    Perturb,
    SaliencyDrop,
    Square,
    Transfer,
    WarmStart,
    WorstOf,
)
from attacks.base import AttackResult, Norm, ThreatModel
from attacks.oracle import Oracle


def case() -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """`linear_case` with clouds at different distances from the boundary."""
    model, points, labels, _ = linear_case()
    return model, points - torch.tensor([0, 0.05, 0.2]).view(3, 1, 1), labels


def optimum(norm: Norm) -> Tensor:
    """``(3,)`` smallest shift of each cloud of `case` onto the boundary: all points move alike."""
    (model, points, _), normal = case(), linear_case()[3]
    gap = (model(points)[:, 0] - model(points)[:, 1]).abs()
    length = {
        "l2": normal.norm() / math.sqrt(points.shape[1]),
        "point-l2": normal.norm(),
        "linf": normal.abs().sum(),
    }
    return gap / length[norm]


def same(one: AttackResult, other: AttackResult) -> bool:
    names = ("points", "success", "queries", "iterations")
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    pairs += [(one.distances[name], other.distances[name]) for name in one.distances]
    return all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("norm", ["l2", "point-l2", "linf"])
def test_an_attack_runs_once_per_budget_in_the_order_given(norm: Norm) -> None:
    model, points, labels = case()
    epsilons = [ratio * float(optimum(norm)[0]) for ratio in (1.05, 0.5, 2.0, 0.99)]
    attack = PGD(norm, delta=0.3, step=0.1, iterations=30)
    results = attack(model, points, labels, 1 - labels, epsilons=epsilons)
    assert [bool(result.success[0]) for result in results] == [True, False, True, False]
    for epsilon, result in zip(epsilons, results, strict=True):
        alone = PGD(norm, epsilon=epsilon, step=0.1, iterations=30)(model, points, labels, 1 - labels)
        assert same(result, alone)
        assert (result.distances[norm] <= epsilon * (1 + 1e-6)).all()


def test_budgets_share_the_random_numbers_of_one_generator() -> None:
    model, points = victim(), clouds()
    labels = model(points).argmax(1)
    attack = PGD("linf", iterations=2)
    twice = attack(
        model, points, labels, epsilons=[0.05, 0.05, 0.1], generator=torch.Generator().manual_seed(5)
    )
    alone = attack.with_epsilon(0.05)(model, points, labels, generator=torch.Generator().manual_seed(5))
    assert same(twice[0], alone) and same(twice[1], alone)
    assert not torch.equal(twice[0].points, attack(model, points, labels, epsilons=[0.05])[0].points)


@pytest.mark.parametrize("targeted", [True, False])
def test_an_attack_that_minimises_runs_once(targeted: bool) -> None:
    classifier, points, labels = case()
    calls = []

    def model(given: Tensor) -> Tensor:
        calls.append(len(given))
        return classifier(given)

    attack, targets = Perturb(searches=4, iterations=50, rate=0.02), 1 - labels if targeted else None
    whole = attack(model, points, labels, targets)
    once = len(calls)
    assert whole.success.all() and (whole.distances["l2"] <= 1.05 * optimum("l2")).all()
    epsilons = sorted(float(ratio * size) for size in optimum("l2") for ratio in (0.99, 1.05))
    results = attack(model, points, labels, targets, epsilons=epsilons)
    assert len(calls) == 2 * once + len(epsilons)  # one check per budget
    for epsilon, result in zip(epsilons, results, strict=True):
        assert torch.equal(result.success, optimum("l2") <= epsilon)
        assert (result.distances["l2"] <= epsilon * (1 + 1e-9)).all()
        inside = whole.distances["l2"] <= epsilon
        assert torch.equal(result.points[inside], whole.points[inside])
        assert torch.equal(result.queries, whole.queries + 1)
        assert torch.equal(result.iterations, whole.iterations)


@dataclass(frozen=True)
class Push(Attack):
    """Moves all points along x by the whole budget."""

    epsilon: float = 1.0

    @property
    def threat(self) -> ThreatModel:
        return ThreatModel("white-box", "both", "shift", "linf", self.epsilon)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return points + torch.tensor([self.epsilon, 0, 0]), torch.ones_like(oracle.queries)


def band(points: Tensor) -> Tensor:
    """Class 1 where the mean along x lies between 1 and 2."""
    return torch.stack([(points.mean(1)[:, 0] - 1.5).abs() - 0.5, 0 * points[:, 0, 0]], 1)


def test_what_a_small_budget_breaks_stays_broken_within_a_larger_one() -> None:
    starts = torch.tensor([0.0, -1.0, -5.0])
    points = starts[:, None, None] * torch.tensor([1.0, 0, 0]).expand(3, 4, 3)
    labels = torch.zeros(3, dtype=torch.long)
    assert Push(3.5)(band, points, labels).success.tolist() == [False, False, False]
    results = Push()(band, points, labels, epsilons=[3.5, 1.5, 2.5, 0.5, 2.9])
    assert [result.success.tolist() for result in results] == [
        [True, True, False],
        [True, False, False],
        [True, True, False],
        [False, False, False],
        [True, True, False],
    ]
    # Shifted by 1.5 and by 2.9, the largest budgets that succeed by themselves; the third is a failure.
    assert results[0].points[:, 0, 0].tolist() == pytest.approx([1.5, 1.9, -1.5])
    assert results[0].distances["linf"].tolist() == pytest.approx([1.5, 2.9, 3.5])
    for result in results:
        assert torch.equal(band(result.points).argmax(1) == 1, result.success)


def test_combined_attacks_set_the_budget_of_their_parts() -> None:
    parts = (PGD("linf", delta=0.1, iterations=2), Transfer(APGD("linf", delta=0.1, iterations=2), victim()))
    model, points = victim(), clouds()
    labels = model(points).argmax(1)
    whole = WorstOf(parts).with_epsilon(5e-4)
    assert [attack.budget(7) for attack in (whole, *whole.attacks)] == [5e-4] * 3
    results = WorstOf(parts)(model, points, labels, epsilons=[5e-4, 0.3])
    assert same(results[0], whole(model, points, labels))
    assert results[0].success.sum() < results[1].success.sum()
    minimal = Perturb(searches=1, iterations=5)
    for result in WorstOf((minimal, Transfer(minimal, model)))(model, points, labels, epsilons=[0.0, 0.1]):
        assert (result.distances["l2"] <= 0.1).all()


def test_every_attack_with_a_budget_takes_another() -> None:
    kinds = [getattr(attacks, name) for name in attacks.__all__]
    built = [
        kind()
        for kind in kinds
        if isinstance(kind, type)
        and issubclass(kind, Attack)
        and kind not in (Attack, Transfer, WarmStart, WorstOf)
    ]
    limited = [attack for attack in built if attack.threat.epsilon is not None]
    assert len(limited) == 13
    for attack in limited:
        assert attack.with_epsilon(0.01).budget(7) == attack.with_epsilon(0.01).threat.epsilon == 0.01


POINTS, LABELS = torch.zeros(2, 20, 3), torch.tensor([0, 1])


def within(attack: Attack, epsilons: object) -> Callable[[], object]:
    return lambda: attack(victim().float(), POINTS, LABELS, epsilons=epsilons)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (within(AddCD(num=3), [0.1]), "AddCD has no epsilon: it adds 3 points"),
        (within(SaliencyDrop(num=3), [0.1]), "SaliencyDrop has no epsilon: it drops 3 points"),
        (within(GeoA3(), [0.1]), "GeoA3 takes no epsilons: its threat model has no norm to measure them in"),
        (within(PGD(), []), "epsilons must not be empty"),
        (within(PGD(), [0.1, -1]), "epsilons must be finite numbers >= 0, got -1 at index 1"),
        (within(Square(), [math.nan]), "epsilons must be finite numbers >= 0, got nan at index 0"),
        (within(Perturb(), [math.inf]), "epsilons must be finite numbers >= 0, got inf"),
        (within(PGD(), [True]), "epsilons must be finite numbers >= 0, got True"),
        (within(PGD(), ["0.1"]), "epsilons must be finite numbers >= 0, got '0.1'"),
    ],
)
def test_bad_budgets_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("epsilons", [0.1, "0.1", torch.tensor([0.1]), {0.1}])
def test_budgets_are_a_list(epsilons: object) -> None:
    with pytest.raises(TypeError, match="epsilons must be a list of numbers, got"):
        within(PGD(), epsilons)()


def test_an_attack_without_a_field_for_its_budget_says_so() -> None:
    class Written(Attack):
        threat = ThreatModel("white-box", "both", "shift", "linf", 0.1)  # type: ignore[assignment]

        def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            return points, oracle.queries * 0

    with pytest.raises(ValueError, match="Written has no field 'epsilon' to set"):
        within(Written(), [0.1])()


def test_budgets_may_be_an_array() -> None:
    results = Push()(band, POINTS, LABELS * 0, epsilons=np.linspace(0, 1.8, 4))  # type: ignore[call-overload]
    assert [bool(result.success.all()) for result in results] == [False, False, True, True]
