from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from attack_checks import MeanClassifier, SmallNet, linear_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attacks
from attacks import (
    PGD,
    Attack,
    Perturb,
    SaliencyDrop,
    ThreatModel,
    random_targets,
)
from attacks.base import DISTANCES, PROJECTIONS, BudgetError, Norm
from attacks.functional import distances, losses, projections
from attacks.oracle import Oracle

NORMS: tuple[Norm, ...] = ("l2", "point-l2", "linf")
ATTACKS: dict[str, tuple[Attack, bool]] = {  # by name: the attack, and whether it is aimed
    "pgd-l2": (PGD(iterations=8), False),
    "pgd-l2-targeted": (PGD(iterations=8), True),
    "pgd-point-l2": (PGD("point-l2", iterations=8), True),
    "pgd-linf": (PGD("linf", iterations=8), False),
    "pgd-stopping": (PGD("linf", delta=0.3, iterations=20, early_stop=True), False),
    "perturb": (Perturb(searches=3, iterations=12), True),
    "perturb-untargeted": (Perturb(searches=2, iterations=12), False),
    "drop": (SaliencyDrop(num=12), False),
}


@pytest.fixture
def victim() -> SmallNet:
    torch.manual_seed(0)
    return SmallNet().double().eval()


@pytest.fixture
def clouds() -> Tensor:
    return torch.randn(6, 40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.4


@pytest.fixture
def labels(victim: SmallNet, clouds: Tensor) -> Tensor:
    return victim(clouds).argmax(1)


def attacked(name: str, model: Callable[[Tensor], Tensor], clouds: Tensor, labels: Tensor) -> Any:
    attack, targeted = ATTACKS[name]
    return attack(model, clouds, labels, (labels + 1) % 4 if targeted else None)


# The optimum of a linear classifier


def shifted_case() -> tuple[MeanClassifier, Tensor, Tensor]:
    """The linear case with clouds at different distances from the boundary."""
    model, points, labels, normal = linear_case()
    points = points - torch.tensor([0.0, 0.4, 1.5])[:, None, None] * normal / normal.square().sum()
    assert (model(points).argmax(1) == labels).all()
    return model, points, labels


@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("random_start", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_pgd_succeeds_within_105_percent_of_the_optimum_only(
    norm: Norm, random_start: bool, targeted: bool
) -> None:
    model, points, labels = shifted_case()
    for example in range(len(points)):
        cloud, label = points[example : example + 1], labels[example : example + 1]
        optimum = float(model.optimum(cloud, norm))
        for ratio in (0.99, 1.05):
            attack = PGD(norm, epsilon=ratio * optimum, step=0.1, random_start=random_start)
            result = attack(model, cloud, label, 1 - label if targeted else None)
            assert bool(result.success) == (ratio > 1), ratio
            assert float(result.distances[norm]) <= ratio * optimum * (1 + 1e-6)


@pytest.mark.parametrize("targeted", [True, False])
def test_perturb_comes_within_105_percent_of_the_optimum(targeted: bool) -> None:
    model, points, labels = shifted_case()
    optimum = model.optimum(points, "l2")
    result = Perturb(searches=6, iterations=150)(model, points, labels, 1 - labels if targeted else None)
    assert result.success.all()
    assert (result.distances["l2"] >= optimum * (1 - 1e-9)).all()
    assert (result.distances["l2"] <= 1.05 * optimum).all()


def test_perturb_keeps_the_last_iterate_of_an_example_that_fails() -> None:
    def never(points: Tensor) -> Tensor:
        drift = points.sum((1, 2))
        return torch.stack([drift * 0 + 1e4, drift], 1)

    points = torch.zeros(2, 5, 3)
    result = Perturb(searches=2, iterations=10)(
        never, points, torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long)
    )
    assert not result.success.any()
    assert (result.distances["linf"] > 1e-3).all()


def test_drop_takes_the_points_that_a_linear_classifier_rests_on() -> None:
    """On the sum of <w, x> over the points the gain of a point is |x - c| <x - c, w>."""
    points = torch.randn(2, 30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    normal = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)

    def model(clouds: Tensor) -> Tensor:
        score = (clouds @ normal).sum(1)
        return torch.stack([score, -score], 1)

    result = SaliencyDrop(num=4, per_round=4)(model, points, torch.zeros(2, dtype=torch.long))
    for cloud, left in zip(points, result.points, strict=True):
        offset = cloud - cloud.median(0).values
        gain = offset.norm(dim=1) * (offset @ normal)
        assert torch.equal(left, cloud[(gain < gain.sort().values[-4])])


# What holds for every attack


@pytest.mark.parametrize("name", ATTACKS)
def test_the_input_and_the_model_are_left_untouched(
    name: str, victim: SmallNet, clouds: Tensor, labels: Tensor
) -> None:
    victim.train()
    victim.local.eval()
    victim.local[0].weight.requires_grad_(False)
    before = {key: value.clone() for key, value in victim.state_dict().items()}
    copies = clouds.clone(), labels.clone()
    attacked(name, victim, clouds, labels)
    assert torch.equal(clouds, copies[0])
    assert torch.equal(labels, copies[1])
    assert [victim.training, victim.head.training, victim.local.training] == [True, True, False]
    assert [parameter.requires_grad for parameter in victim.parameters()][:2] == [False, True]
    assert all(parameter.grad is None for parameter in victim.parameters())
    for key, value in victim.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", ATTACKS)
def test_examples_do_not_depend_on_their_batch(
    name: str, victim: SmallNet, clouds: Tensor, labels: Tensor
) -> None:
    whole = attacked(name, victim, clouds, labels)
    alone = attacked(name, victim, clouds[2:4], labels[2:4])
    torch.testing.assert_close(alone.points, whole.points[2:4], rtol=0, atol=1e-6)
    assert torch.equal(alone.success, whole.success[2:4])
    assert torch.equal(alone.iterations, whole.iterations[2:4])


@pytest.mark.parametrize("name", ATTACKS)
def test_equal_seeds_give_equal_results(name: str, victim: SmallNet, clouds: Tensor, labels: Tensor) -> None:
    first, second = (attacked(name, victim, clouds, labels) for _ in range(2))
    assert torch.equal(first.points, second.points)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_report_is_what_a_recount_finds(
    name: str, victim: SmallNet, clouds: Tensor, labels: Tensor
) -> None:
    calls = []

    def counting(points: Tensor) -> Tensor:
        calls.append(len(points))
        return victim(points)

    result = attacked(name, counting, clouds, labels)
    predicted = victim(result.points).argmax(1)
    goal = predicted == (labels + 1) % 4 if ATTACKS[name][1] else predicted != labels
    assert torch.equal(result.success, goal)
    assert int(result.queries.sum()) == sum(calls)
    assert not result.points.requires_grad
    if ATTACKS[name][0].threat.changes == "shift":
        for norm in NORMS:
            torch.testing.assert_close(result.distances[norm], DISTANCES[norm](result.points, clouds))


@pytest.mark.parametrize("norm", NORMS)
def test_pgd_keeps_its_budget_and_uses_it(
    norm: Norm, victim: SmallNet, clouds: Tensor, labels: Tensor
) -> None:
    attack = PGD(norm, delta=0.05, iterations=10)
    result = attack(victim, clouds, labels)
    budget = attack.budget(clouds.shape[1])
    assert (result.distances[norm] <= budget * (1 + 1e-6)).all()
    assert (result.distances[norm] >= 0.5 * budget).all()


def test_budgets_are_the_published_ones() -> None:
    assert PGD().budget(1024) == pytest.approx(4.434, abs=1e-3)
    assert PGD().threat == ThreatModel("white-box", "both", "shift", "l2", PGD().budget(1024))
    assert PGD("point-l2").budget(7) == pytest.approx(0.08 * math.sqrt(3))
    assert PGD("linf", epsilon=0.01).budget(7) == 0.01
    settings_ = dataclasses.asdict(Perturb())
    assert [
        settings_[key] for key in ("searches", "iterations", "rate", "first_weight", "largest_weight")
    ] == [10, 500, 1e-2, 10, 80]


def test_a_budget_of_zero_changes_nothing(victim: SmallNet, clouds: Tensor, labels: Tensor) -> None:
    result = PGD(delta=0.0, iterations=2)(victim, clouds, labels)
    assert torch.equal(result.points, clouds)
    assert not result.success.any()


def test_examples_that_are_done_leave_the_batch(victim: SmallNet, clouds: Tensor, labels: Tensor) -> None:
    wrong = (
        labels + (torch.arange(len(labels)) % 2)
    ) % 4  # every other one is misclassified from the beginning
    result = PGD("linf", delta=0.0, iterations=5, early_stop=True)(victim, clouds, wrong)
    assert result.iterations.tolist() == [5, 0] * 3
    assert result.queries.tolist() == [6, 2] * 3


@pytest.mark.parametrize(("num", "rounds"), [(10, 2), (12, 3), (3, 1)])
def test_drop_drops_exactly_that_many_of_the_clouds_points(
    num: int, rounds: int, victim: SmallNet, clouds: Tensor, labels: Tensor
) -> None:
    result = SaliencyDrop(num)(victim, clouds, labels)
    assert result.points.shape == (6, 40 - num, 3)
    assert result.iterations.tolist() == [rounds] * 6
    for cloud, left in zip(clouds.tolist(), result.points.tolist(), strict=True):
        positions = [cloud.index(point) for point in left]
        assert positions == sorted(set(positions))


def test_drop_hurts_more_than_chance(victim: SmallNet, clouds: Tensor, labels: Tensor) -> None:
    left = SaliencyDrop(20)(victim, clouds, labels).points
    loss = nn.functional.cross_entropy
    assert loss(victim(left), labels) > loss(victim(clouds[:, :20]), labels)


# Losses, projections, targets


@given(st.integers(0, 1000), st.floats(0.01, 3))
@settings(max_examples=25, deadline=None)
def test_projections_land_in_the_ball_and_leave_its_inside_alone(seed: int, epsilon: float) -> None:
    shift = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for norm, project in PROJECTIONS.items():
        size = DISTANCES[norm]
        projected = project(shift, epsilon)
        assert (size(projected, 0 * shift) <= epsilon * (1 + 1e-12)).all(), norm
        torch.testing.assert_close(project(projected, epsilon), projected)
        inside = shift * (0.99 * epsilon / size(shift, 0 * shift))[:, None, None]
        assert torch.equal(project(inside, epsilon), inside)


def test_projections_of_nothing_are_nothing() -> None:
    for project in (projections.l2, projections.point_l2, projections.linf):
        assert torch.equal(project(torch.zeros(1, 2, 3), 0.0), torch.zeros(1, 2, 3))


def test_distances_by_hand() -> None:
    shift = torch.tensor([[[3.0, 4.0, 0.0], [0.0, 0.0, 12.0]]])
    clean = torch.ones_like(shift)
    assert distances.l2(clean + shift, clean).item() == pytest.approx(13)
    assert distances.point_l2(clean + shift, clean).item() == pytest.approx(12)
    assert distances.linf(clean - shift, clean).item() == pytest.approx(12)


def test_hinge_by_hand() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0]] * 2)
    classes = torch.tensor([0, 1])
    assert losses.hinge(logits, classes, targeted=True).tolist() == [3.0, 0.0]
    assert losses.hinge(logits, classes, targeted=False).tolist() == [0.0, 2.0]
    assert losses.hinge(logits, classes, targeted=True, kappa=5).tolist() == [8.0, 3.0]


def test_targets_are_never_the_label_and_follow_the_seed() -> None:
    labels = torch.arange(40).repeat(50)
    targets = random_targets(labels, 40, seed=1)
    assert (targets != labels).all()
    assert set(targets.tolist()) == set(range(40))
    assert torch.equal(targets, random_targets(labels, 40, seed=1))
    assert not torch.equal(targets, random_targets(labels, 40, seed=2))


# Errors


def constant(points: Tensor) -> Tensor:
    return torch.zeros(len(points), 4)


ZEROS = torch.zeros(2, 40, 3)
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PGD()(constant, ZEROS[0], LABELS), r"shape \(B, N, 3\), got \(40, 3\)"),
        (lambda: PGD()(constant, ZEROS.long(), LABELS), "floating-point clouds"),
        (lambda: PGD()(constant, ZEROS[:0], LABELS[:0]), r"got \(0, 40, 3\)"),
        (lambda: PGD()(constant, ZEROS + torch.tensor([0.0, 0.0, math.nan]), LABELS), "example 0 has NaN"),
        (lambda: PGD()(constant, ZEROS, LABELS[:1]), r"labels must be integers of shape \(2,\), got \(1,\)"),
        (lambda: PGD()(constant, ZEROS, LABELS.float()), "labels must be integers"),
        (lambda: PGD()(constant, ZEROS, LABELS - 1), "example 0: class -1 in labels is out of range"),
        (lambda: PGD()(constant, ZEROS, LABELS + 3), "class 4 is out of range: the model has 4 classes"),
        (
            lambda: PGD()(constant, ZEROS, LABELS, torch.tensor([1, 1])),
            "example 1: the target equals the label, 1",
        ),
        (lambda: PGD()(constant, ZEROS, LABELS, torch.tensor([9, 2])), "class 9 is out of range"),
        (lambda: PGD()(constant, ZEROS, LABELS), "the model gives no gradient"),
        (lambda: PGD()(lambda p: constant(p)[:1], ZEROS, LABELS), r"shape \(2, C\), it returned \(1, 4\)"),
        (lambda: PGD()(lambda p: p, ZEROS, LABELS), r"it returned \(2, 40, 3\)"),
        (
            lambda: PGD()(lambda p: constant(p) + p.mean() / 0, ZEROS, LABELS),
            "NaN or infinite logits for example 0",
        ),
        (lambda: PGD(delta=-1.0), "PGD: delta must be a finite number >= 0, got -1.0"),
        (lambda: PGD(epsilon=-1.0), "PGD: epsilon must be a finite number >= 0, got -1.0"),
        (lambda: PGD(iterations=0), "iterations must be an integer >= 1"),
        (lambda: PGD(step=-1), "PGD: step must be a finite number >= 0, got -1"),
        (lambda: PGD(delta=math.nan), "PGD: delta must be a finite number >= 0, got nan"),
        (lambda: PGD(norm="l3"), "unknown norm 'l3'; there are: l2, point-l2, linf"),
        (lambda: Perturb(searches=0), "searches must be an integer >= 1"),
        (lambda: Perturb(first_weight=90), "first_weight must not exceed largest_weight, got 90 and 80.0"),
        (lambda: Perturb(kappa=-1), "kappa must be a finite number >= 0"),
        (lambda: Perturb(polish=-1), "polish must be an integer >= 0"),
        (lambda: SaliencyDrop(0), "num must be an integer >= 1"),
        (lambda: SaliencyDrop(40)(constant, ZEROS, LABELS), "cannot drop 40 points from clouds of 40"),
        (
            lambda: SaliencyDrop(5)(constant, ZEROS, LABELS, LABELS + 1),
            "SaliencyDrop is an untargeted attack",
        ),
        (lambda: random_targets(LABELS * 0, 1), "at least 2 classes, got 1"),
        (lambda: random_targets(LABELS * 0, 4, seed=-1), "seed must be at least 0, got -1"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PGD()(constant, ZEROS.numpy(), LABELS), r"points must be a torch.Tensor, got numpy.ndarray"),
        (lambda: PGD()(constant, ZEROS, LABELS.numpy()), "labels must be a torch.Tensor, got numpy.ndarray;"),
        (lambda: PGD()(constant, ZEROS, [0, 1]), "labels must be a torch.Tensor, got list"),
        (lambda: PGD()(constant, ZEROS, LABELS, LABELS.numpy()), "targets must be a torch.Tensor"),
        (lambda: PGD()(constant, ZEROS, LABELS, generator=3), "generator must be a torch.Generator on the"),
        (lambda: random_targets(LABELS, 4, seed=0.5), "seed must be an integer, got 0.5"),
        (lambda: random_targets(LABELS.numpy(), 4), "labels must be a torch.Tensor, got numpy.ndarray"),
    ],
)
def test_wrong_types_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_numpy_integers_are_seeds_and_settings() -> None:
    seed = np.random.default_rng(0).integers(5, 6)[()]
    assert torch.equal(random_targets(LABELS, 4, seed=seed), random_targets(LABELS, 4, seed=5))
    assert PGD(iterations=np.int64(3), delta=np.float32(0.5)).budget(3) == pytest.approx(1.5)


def attacks_of_the_package() -> list[Attack]:
    found = [getattr(attacks, name) for name in attacks.__all__]
    kinds = [kind for kind in found if isinstance(kind, type) and issubclass(kind, Attack)]
    wrappers = (Attack, attacks.Transfer, attacks.WarmStart, attacks.WorstOf)
    return [kind() for kind in kinds if kind not in wrappers]


SIGNED = {("KNN", "alpha"), ("SaliencyDrop", "alpha")}


@pytest.mark.parametrize("attack", attacks_of_the_package(), ids=lambda attack: type(attack).__name__)
def test_every_setting_of_every_attack_is_checked(attack: Attack) -> None:
    name = type(attack).__name__
    for field in dataclasses.fields(attack):  # type: ignore[arg-type]
        value = getattr(attack, field.name)
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if not numeric and field.name not in ("step", "epsilon", "polish"):
            if isinstance(value, str):
                with pytest.raises(ValueError, match=f"{name}: unknown {field.name} 'nonsense'; there are"):
                    dataclasses.replace(attack, **{field.name: "nonsense"})  # type: ignore[type-var]
            continue
        bad = [math.nan, "1", True, torch.tensor(1.0)]
        bad += [] if (name, field.name) in SIGNED else [-1]
        bad += [] if field.name == "largest_weight" else [math.inf]
        bad += [0.5] if isinstance(value, int) else []
        for wrong in bad:
            with pytest.raises(ValueError, match=rf"^{name}: {field.name} must be "):
                dataclasses.replace(attack, **{field.name: wrong})  # type: ignore[type-var]


class Cheat(Attack):
    """Returns whatever it is given, whatever its threat model says."""

    def __init__(self, stated: ThreatModel, returned: Tensor) -> None:
        self.stated, self.returned = stated, returned

    @property
    def threat(self) -> ThreatModel:
        return self.stated

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.returned, torch.zeros_like(oracle.queries)


@pytest.mark.parametrize(
    ("threat", "returned", "message"),
    [
        (
            ThreatModel("white-box", "both", "shift", "linf", 0.1),
            ZEROS + 0.2,
            "example 0 has linf 0.2 over its budget 0.1",
        ),
        (
            ThreatModel("white-box", "both", "shift", "l2", 1.0),
            ZEROS[:, 1:],
            r"shape \(2, 39, 3\) for \(2, 40, 3\)",
        ),
        (ThreatModel("white-box", "both", "drop", count=1), ZEROS, r"shape \(2, 40, 3\)"),
        (ThreatModel("white-box", "both", "drop", count=1), ZEROS[:, 1:] + 1, "may only drop"),
        (ThreatModel("white-box", "both", "add", count=1), torch.ones(2, 41, 3), "may only add"),
    ],
)
def test_a_broken_threat_model_is_caught(threat: ThreatModel, returned: Tensor, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Cheat(threat, returned)(constant, ZEROS, LABELS)


def test_points_may_be_added_where_the_threat_model_says_so() -> None:
    more = torch.cat([torch.ones(2, 1, 3), ZEROS], 1)
    result = Cheat(ThreatModel("transfer", "both", "add", count=1), more)(constant, ZEROS, LABELS)
    assert result.distances["added"].tolist() == [1, 1]
    assert result.distances["chamfer"].tolist() == result.distances["hausdorff"].tolist() == [3, 3]


def test_a_targeted_attack_wants_targets() -> None:
    with pytest.raises(ValueError, match="Cheat is a targeted attack: give it targets"):
        Cheat(ThreatModel("white-box", "targeted", "shift"), ZEROS)(constant, ZEROS, LABELS)
