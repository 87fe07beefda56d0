from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attack_checks import CLASSES, check, clouds, victim
from torch import Tensor, nn

import ifdefense
from attacks.base import Attack, BudgetError, ThreatModel
from attacks.black_box.square import Square
from attacks.black_box.transfer import Transfer
from attacks.defence_aware.adaptive import adaptive
from attacks.defence_aware.model import BPDA, EOT, DefenceAware, FunctionPurifier
from attacks.dropping.drop import RandomDrop, SaliencyDrop
from attacks.functional.selection import selected
from attacks.gradient.apgd import APGD
from attacks.gradient.pgd import PGD
from attacks.optimised.perturb import Perturb
from attacks.oracle import Oracle
from attacks.worst_of import WorstOf
from ifdefense import Defended
from ifdefense.stages.outliers import statistical_outlier_removal

PLAIN = PGD("l2", epsilon=1.5, iterations=15, step=0.1, random_start=False)


def double(count: int = 7) -> Tensor:
    return torch.randn(2, count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def fixed(function: Callable[[Tensor], Tensor], differentiable: bool = False) -> FunctionPurifier:
    """A deterministic purifier."""
    return FunctionPurifier(
        lambda points, num_points, seed: function(points), deterministic=True, differentiable=differentiable
    )


def random(function: Callable[[Tensor, int], Tensor]) -> FunctionPurifier:
    return FunctionPurifier(lambda points, num_points, seed: function(points, seed), deterministic=False)


def gradient_of(purify: Callable[[Tensor], Tensor], points: Tensor, weight: Tensor) -> Tensor:
    """Gradient of ``<weight, purify(points)>``."""
    points = points.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((purify(points) * weight).sum(), points)
    return gradient


@torch.no_grad()
def sor(points: Tensor) -> Tensor:
    """Outlier removal that no gradient passes."""
    return selected(points, statistical_outlier_removal(points))


def thinned(points: Tensor, seed: int = 0) -> Tensor:
    """A random half of the points."""
    order = torch.randperm(points.shape[1], generator=torch.Generator().manual_seed(seed))
    return points.detach()[:, order[: points.shape[1] // 2]]


# BPDA


def test_forwards_it_is_the_real_purifier() -> None:
    points = double()
    for purifier in (sor, lambda x: x.detach().flip(1)[:, :4] + 0.3):
        for asked in (points, points.clone().requires_grad_()):
            assert torch.equal(BPDA(fixed(purifier))(asked), purifier(points))


def test_the_gradient_of_a_purified_point_goes_to_the_nearest_input_point() -> None:
    points = double()
    order = torch.tensor([4, 0, 4, 6, 1])  # reordered, one twice, some dropped
    weight = torch.randn(2, 5, 3, dtype=torch.float64)
    expected = torch.zeros_like(points)
    for place, source in enumerate(order):
        expected[:, source] += weight[:, place]
    purify = BPDA(fixed(lambda given: given.detach()[:, order] + 1e-3))
    torch.testing.assert_close(gradient_of(purify, points, weight), expected)


def test_the_nearest_point_is_a_naive_one() -> None:
    points, new = double(), double(11).flip(0)
    weight = torch.randn(2, 11, 3, dtype=torch.float64)
    expected = torch.zeros_like(points)
    for b in range(2):
        for m in range(11):
            expected[b, (points[b] - new[b, m]).norm(dim=1).argmin()] += weight[b, m]
    torch.testing.assert_close(gradient_of(BPDA(fixed(lambda x: new)), points, weight), expected)


def test_identity_keeps_the_order_whatever_is_nearest() -> None:
    points, weight = double(), torch.randn(2, 7, 3, dtype=torch.float64)
    purify = BPDA(fixed(lambda x: x.detach().flip(1)), "identity")
    torch.testing.assert_close(gradient_of(purify, points, weight), weight)


def test_exact_is_the_gradient_of_a_differentiable_purifier() -> None:
    points, weight = double(), torch.randn(2, 7, 3, dtype=torch.float64)
    centred = weight - weight.mean(1, keepdim=True)
    purifier = fixed(lambda x: 2 * (x - x.mean(1, keepdim=True)), differentiable=True)
    for exact in (BPDA(purifier), BPDA(purifier, "exact")):
        torch.testing.assert_close(gradient_of(exact, points, weight), 2 * centred)
    torch.testing.assert_close(gradient_of(BPDA(purifier, "identity"), points, weight), weight)


def test_for_a_choice_of_points_nearest_is_exact() -> None:
    points = double(40)
    weight = torch.randn(2, 40, 3, dtype=torch.float64)

    def differentiable(given: Tensor) -> Tensor:
        return selected(given, statistical_outlier_removal(given.detach()))

    assert statistical_outlier_removal(points).sum(1).tolist() != [40, 40]
    torch.testing.assert_close(
        gradient_of(BPDA(fixed(sor)), points, weight),
        gradient_of(BPDA(fixed(differentiable, differentiable=True)), points, weight),
    )


@pytest.mark.parametrize(
    ("purifier", "message"),
    [
        (lambda x: x.detach(), "passes no gradient, though it is declared differentiable"),
        (lambda x: x.detach() + 0 * x, "passes no gradient for example 0: a step is detached"),
        (lambda x: torch.cat([x[:1], x[1:].detach()]), "passes no gradient for example 1"),
        (lambda x: x.detach() + torch.ones(1, requires_grad=True), "passes no gradient for example 0"),
    ],
)
def test_a_step_that_passes_no_gradient_is_an_error(
    purifier: Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gradient_of(BPDA(fixed(purifier, differentiable=True)), double(), torch.ones(2, 7, 3).double())
    model = DefenceAware(victim(), fixed(purifier, differentiable=True), eot=EOT(2))
    with pytest.raises(ValueError, match=message):
        PGD(iterations=2)(model, double(), torch.zeros(2, dtype=torch.long))


def test_a_loss_without_gradient_is_no_error() -> None:
    purify = BPDA(fixed(lambda x: 2 * x, differentiable=True))
    assert gradient_of(purify, double(), torch.zeros(2, 7, 3)).abs().max() == 0


def test_selected_keeps_the_order_and_fills_up_from_the_first() -> None:
    points = torch.arange(10.0).view(2, 5, 1).expand(-1, -1, 3)
    mask = torch.tensor([[True, False, True, False, False], [True] * 5])
    assert selected(points, mask)[..., 0].tolist() == [[0, 2, 0, 2, 0], [5, 6, 7, 8, 9]]
    torch.autograd.gradcheck(
        lambda given: selected(given, mask), double(5).requires_grad_(), check_batched_grad=False
    )


def test_number_of_points_and_seed_reach_the_purifier() -> None:
    calls = []

    def record(points: Tensor, num_points: int | None, seed: int) -> Tensor:
        calls.append((num_points, seed))
        return points

    model = DefenceAware(victim(), FunctionPurifier(record, deterministic=False), num_points=9, seed=4)
    model(double())
    assert calls == [(9, 4)]


# EOT


def shifted(points: Tensor, seed: int = 0) -> Tensor:
    """Adds the seed to every coordinate."""
    return points.detach() + seed


def squares(points: Tensor) -> Tensor:
    value = points.square().sum((1, 2))
    return torch.stack([value, -value], 1)


def test_logits_and_gradients_are_means_over_fresh_seeds() -> None:
    points = double().requires_grad_()
    # The nearest input point of a shifted cloud is not its own, hence the identity.
    aware = DefenceAware(
        squares, random(shifted), gradient="identity", eot=EOT(samples=3, first=2), normalise=False, seed=9
    )
    for seeds in ((2, 3, 4), (5, 6, 7)):
        logits = aware(points)
        (gradient,) = torch.autograd.grad(logits[:, 0].sum(), points)
        torch.testing.assert_close(logits, sum(squares(points + seed) for seed in seeds) / 3)
        torch.testing.assert_close(gradient, sum(2 * (points + seed) for seed in seeds) / 3)
    # Without a gradient it is the real defence.
    assert torch.equal(aware(points.detach()), squares(points.detach() + 9))
    with torch.no_grad():
        assert torch.equal(aware(points), squares(points + 9))


def test_seeds_may_stay_the_same() -> None:
    assert [list(EOT(2, 7).seeds(query)) for query in range(2)] == [[7, 8], [9, 10]]
    assert [list(EOT(2, 7, fresh=False).seeds(query)) for query in range(2)] == [[7, 8], [7, 8]]


def test_a_deterministic_purifier_needs_no_average_and_draws_are_not_those_of_the_defence() -> None:
    assert DefenceAware(squares, random(shifted)).eot == EOT(8)
    assert DefenceAware(squares, fixed(sor)).eot.samples == 1
    assert 0 not in EOT().seeds(0)


def test_every_attack_starts_from_the_same_draws() -> None:
    model, points = victim(), clouds()
    labels = model(points).argmax(1)
    attack, aware = PGD("linf", delta=0.05, iterations=6), DefenceAware(model, random(thinned), eot=EOT(3))
    whole, again = attack(aware, points, labels), attack(aware, points, labels)
    assert torch.equal(whole.points, again.points)
    for i in range(len(points)):
        alone = attack(aware, points[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(alone.points[0], whole.points[i], rtol=0, atol=1e-6)
        assert alone.success[0] == whole.success[i]
    both = WorstOf((attack, attack))(aware, points, labels)
    assert torch.equal(both.points, whole.points)


# The defended classifier


@pytest.mark.parametrize("name", ["sor", "srs"])
def test_without_a_gradient_it_is_the_defended_classifier(name: str) -> None:
    model, points = victim(), clouds()
    purifier = ifdefense.load(name)
    for normalise in (True, False, None):
        aware = DefenceAware(model, purifier, normalise=normalise, seed=5)
        defended = Defended(model, purifier, normalise=normalise, seed=5)
        assert torch.equal(aware(points), defended(points))


def test_the_up_axis_is_that_of_the_defended_classifier() -> None:
    asked: list[dict[str, str]] = []

    class Same(FunctionPurifier):
        def forward(
            self, points: Tensor, num_points: int | None = None, seed: int = 0, **axis: str
        ) -> Tensor:
            asked.append(axis)
            return points * 1

    model = nn.Linear(3, 3)
    model.register_forward_hook(lambda module, given, output: output.mean(1))
    same = Same(lambda points, num_points, seed: points, deterministic=True, differentiable=True)
    points = double().float()
    for up, stated in ((None, None), ("y", None), ("y", "y"), (None, "-x")):
        model.up_axis = stated
        aware, defended = DefenceAware(model, same, up=up), Defended(model, same, seed=0, up=up)
        asked.clear()
        assert torch.equal(aware(points), defended(points))
        assert asked == [{} if up is None else {"up": up}] * 2
        wanted = points.clone().requires_grad_()
        ours, theirs = (
            torch.autograd.grad(each(wanted)[:, 0].sum(), wanted)[0] for each in (aware, defended)
        )
        torch.testing.assert_close(ours, theirs)
    _, aware = adaptive(PLAIN, model, same, up="y")
    assert aware.up == "y"


def test_purifiers_of_the_library_say_what_they_are() -> None:
    sor_ = ifdefense.load("sor")
    assert isinstance(DefenceAware(victim(), fixed(sor)), Defended)
    assert DefenceAware(victim(), sor_).purifier.gradient == "exact"
    points, weight = double(40), torch.randn(2, 40, 3, dtype=torch.float64)
    torch.testing.assert_close(
        gradient_of(BPDA(sor_), points, weight), gradient_of(BPDA(sor_, "nearest"), points, weight)
    )


def test_the_gradient_passes_the_normalisation() -> None:
    """What is scaled back does not change the logits, so the gradient along the scale is 0."""
    points = double(30).requires_grad_()
    aware = DefenceAware(victim(), fixed(lambda x: 1 * x, differentiable=True), normalise=True)
    (gradient,) = torch.autograd.grad(aware(points)[:, 0].sum(), points)
    assert gradient.abs().max() > 1e-6
    assert (gradient * points).sum((1, 2)).abs().max() < 1e-9 and gradient.sum(1).abs().max() < 1e-9


def reach(points: Tensor) -> Tensor:
    """Class 1 if any point reaches beyond x = 1."""
    gap = points[..., 0].amax(1) - 1
    return torch.stack([-gap, gap], 1)


def half_case() -> tuple[Tensor, Tensor, Tensor]:
    """Clouds whose farthest point in x is in the second half, which `first_half` leaves out."""
    points = torch.rand(3, 20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.3
    points[:, 15, 0] = 0.6
    return points, torch.zeros(3, dtype=torch.long), points[:, :10, 0].amax(1)


def first_half(points: Tensor) -> Tensor:
    return points.detach()[:, :10]


def test_it_breaks_a_defence_that_the_plain_attack_does_not() -> None:
    points, labels, farthest = half_case()
    attack = PGD("l2", epsilon=1.0, iterations=20, step=0.05, random_start=False)
    plain = attack(reach, points, labels)
    assert plain.success.all()
    assert (reach(first_half(plain.points)).argmax(1) == labels).all()
    result = attack(DefenceAware(reach, fixed(first_half)), points, labels)
    assert result.success.all()
    assert (reach(first_half(result.points)).argmax(1) == 1).all()
    # It moves the one point that counts behind the defence.
    moved = (result.points - points).norm(dim=2) > 1e-9
    assert moved.sum(1).tolist() == [1, 1, 1]
    assert torch.equal(points[..., 0][moved], farthest)
    assert (result.distances["l2"] <= 1 + 1e-9).all()


def test_success_is_that_on_the_real_defence() -> None:
    model, points = victim(), clouds()
    labels = model(points).argmax(1)
    purifier = ifdefense.load("srs")
    defended = Defended(model, purifier, seed=3)
    aware = DefenceAware(model, purifier, eot=EOT(2), seed=3)
    result = PGD("l2", epsilon=0.3, iterations=5)(aware, points, labels, (labels + 1) % CLASSES)
    reached = defended(result.points).argmax(1) == (labels + 1) % CLASSES
    assert torch.equal(result.success, reached)


def test_the_input_and_the_models_are_left_untouched() -> None:
    model, points = victim(), clouds()
    labels = model(points).argmax(1)
    copies = points.clone(), labels.clone()
    dropout = nn.Dropout(0.9)  # off in evaluation, as an attacked model is
    defence = fixed(dropout, differentiable=True)
    defence.dropout = dropout
    model.train()
    defence.train()
    aware = DefenceAware(model, defence)
    result = PGD(iterations=2)(aware, points, labels)
    assert model.training and model.head.training and dropout.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(points, copies[0]) and torch.equal(labels, copies[1])
    assert not result.points.requires_grad


def test_attacks_that_drop_points_are_adaptive_too() -> None:
    model, points = victim(), clouds()
    labels = model(points).argmax(1)
    for num_points in (None, 40):
        aware = DefenceAware(model, ifdefense.load("sor"), eot=EOT(1), num_points=num_points)
        result = SaliencyDrop(num=9)(aware, points, labels)
        assert result.points.shape == (6, 31, 3)
        assert result.distances["dropped"].tolist() == [9] * 6


class Guess(Attack):
    """Takes no gradients: goes where the logits, of which it sees no more, are worse."""

    @property
    def threat(self) -> ThreatModel:
        return ThreatModel("score-based", "untargeted", "shift", "linf", 1.0)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        moved = points + torch.tensor([0.9, 0, 0])
        reached = oracle.reached(oracle.logits(moved))
        return torch.where(reached[:, None, None], moved, points), oracle.queries * 0


def test_attacks_without_gradients_ask_the_real_defence() -> None:
    points, labels, _ = half_case()
    aware = DefenceAware(reach, fixed(first_half))
    assert Guess()(aware, points, labels).success.all()
    assert not Guess()(aware, points - 0.5, labels).success.any()


# The worst of several attacks


class Fixed(Attack):
    """Returns the clouds plus a shift per example, found by the first coordinate."""

    def __init__(self, shifts: list[float], goal: str = "both") -> None:
        self.shifts, self.goal = torch.tensor(shifts, dtype=torch.float64), goal
        self.seen: list[int] = []
        self.drawn: list[float] = []

    @property
    def threat(self) -> ThreatModel:
        return ThreatModel("white-box", self.goal, "shift", "linf", 9.0)  # type: ignore[arg-type]

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        self.seen += points[:, 0, 1].long().tolist()
        self.drawn.append(float(torch.rand((), generator=generator)))
        shift = torch.zeros_like(points)
        shift[..., 0] = self.shifts[points[:, 0, 1].long()].unsqueeze(1)
        return points + shift, torch.full_like(oracle.queries, len(self.shifts))


def ladder(points: Tensor) -> Tensor:
    """Class by the mean of x: 0 below 0.5, then 1, and 2 from 1.5 on."""
    x = points[..., 0].mean(1)
    return torch.stack([0.5 - x, 0.5 - (x - 1).abs(), x - 1.5], 1)


def numbered() -> Tensor:
    points = torch.zeros(4, 5, 3, dtype=torch.float64)
    points[..., 1] = torch.arange(4.0)[:, None]
    return points


def test_each_cloud_keeps_the_first_result_that_reaches_the_goal() -> None:
    one, two, three = Fixed([1, 0, 0, 0]), Fixed([2, 2, 0, 0]), Fixed([1, 1, 1, 0])
    attack = WorstOf((one, two, three))
    result = attack(ladder, numbered(), torch.zeros(4, dtype=torch.long))
    assert result.points[:, 0, 0].tolist() == [1, 2, 1, 0]
    assert result.success.tolist() == [True, True, True, False]
    assert (one.seen, two.seen, three.seen) == ([0, 1, 2, 3], [1, 2, 3], [2, 3])
    assert result.iterations.tolist() == [4, 8, 12, 12]
    assert result.queries.tolist() == [2, 3, 4, 4]  # a check after each attack, and the last one
    assert len(set(one.drawn + two.drawn + three.drawn)) == 1  # the same random numbers


def test_a_missed_target_is_better_than_the_true_class_and_equals_keep_the_first() -> None:
    attack = WorstOf((Fixed([0, 0, 1, 0]), Fixed([1, 2, 2, 0]), Fixed([1, 1, 1, 0.1])))
    targets = torch.full((4,), 2)
    result = attack(ladder, numbered(), torch.zeros(4, dtype=torch.long), targets)
    assert result.points[:, 0, 0].tolist() == [1, 2, 2, 0]
    assert result.success.tolist() == [False, True, True, False]


@pytest.mark.parametrize("targeted", [False, True])
def test_the_worst_of_real_attacks_is_sound_and_at_least_as_strong_as_each(targeted: bool) -> None:
    parts = (APGD("linf", delta=0.05, iterations=5), PGD("linf", delta=0.05), Square(delta=0.05, queries=20))
    attack = WorstOf(parts)
    result = check(attack, targeted)
    model, points = victim(), clouds()
    labels = model(points).argmax(1)
    targets = (labels + 1) % CLASSES if targeted else None
    found = torch.stack([part(model, points, labels, targets).success for part in parts])
    assert (result.success | ~found.any(0)).all()
    assert attack.threat == ThreatModel("white-box", "both", "shift", "linf", 0.05)
    assert attack.budget(7) == 0.05


def test_the_threat_model_is_the_most_knowledge_and_the_common_goal() -> None:
    drops = WorstOf((Transfer(SaliencyDrop(7), reach), RandomDrop(7)))
    assert drops.threat == ThreatModel("score-based", "untargeted", "drop", count=7)
    assert WorstOf((Perturb(),)).threat == Perturb().threat and WorstOf((Perturb(),)).budget(9) is None


def test_a_part_that_breaks_its_threat_model_is_caught() -> None:
    with pytest.raises(BudgetError, match=r"linf 9\.5 over its budget 9"):
        WorstOf((Fixed([0, 0, 0, 0]), Fixed([9.5, 0, 0, 0])))(ladder, numbered(), torch.zeros(4).long())


# Adaptive attacks


def test_it_is_at_least_as_strong_as_the_plain_attack_behind_outlier_removal() -> None:
    model, points = victim(), clouds()
    labels = model(sor(points)).argmax(1)
    strength = []
    for epsilon in (0.05, 0.1, 0.2, 0.4):
        attack = PGD("l2", epsilon=epsilon, iterations=15, random_start=False)
        behind = model(sor(attack(model, points, labels).points)).argmax(1) != labels
        both, aware = adaptive(attack, model, fixed(sor))
        through, safe = attack(aware, points, labels).success, both(aware, points, labels).success
        strength.append((int(behind.sum()), int(through.sum())))
        assert (safe | ~behind).all() and (safe | ~through).all()
    assert all(through >= behind for behind, through in strength)
    assert strength[-1][1] == len(labels)


def misleading(points: Tensor) -> Tensor:
    """The identity with a gradient that points the wrong way."""
    return 2 * points.detach() - points


def test_the_plain_attack_stands_in_where_gradients_mislead() -> None:
    model, points = victim(), clouds()
    labels = model(points).argmax(1)
    labels[::2] = (labels[::2] + 1) % CLASSES  # every other one is misclassified from the beginning
    plain = PLAIN(model, points, labels)
    assert plain.success.all()
    both, aware = adaptive(PLAIN, model, fixed(misleading, differentiable=True))
    alone = PLAIN(aware, points, labels)
    failed = ~alone.success
    assert failed.any()
    result = both(aware, points, labels)
    assert result.success.all()
    torch.testing.assert_close(result.points[failed], plain.points[failed], rtol=0, atol=1e-9)
    torch.testing.assert_close(result.points[~failed], alone.points[~failed], rtol=0, atol=1e-9)
    torch.testing.assert_close(result.distances["l2"], (result.points - points).flatten(1).norm(dim=1))
    assert result.iterations.tolist() == torch.where(failed, 30, 15).tolist()
    assert result.queries.tolist() == torch.where(failed, 15 + 3, 15 + 2).tolist()


def test_a_plain_targeted_attack_stands_in_too_where_it_only_leaves_the_true_class() -> None:
    model, points = victim(), clouds()
    labels = model(points).argmax(1)
    targets = model(points).argmin(1)
    weak = PGD("l2", epsilon=0.1, iterations=15, random_start=False)
    plain = weak(model, points, labels, targets)
    wrong = model(plain.points).argmax(1) != labels
    both, aware = adaptive(weak, model, fixed(misleading, differentiable=True))
    alone = model(weak(aware, points, labels, targets).points).argmax(1) != labels
    astray = wrong & ~plain.success & ~alone
    assert astray.any()
    result = both(aware, points, labels, targets)
    assert torch.equal(model(result.points).argmax(1) != labels, wrong | alone)
    torch.testing.assert_close(result.points[astray], plain.points[astray], rtol=0, atol=1e-9)


def test_the_threat_model_is_that_of_the_attack() -> None:
    attack, _ = adaptive(PGD("linf", epsilon=0.1), victim(), fixed(sor))
    assert attack.threat == PGD("linf", epsilon=0.1).threat
    assert attack.budget(7) == 0.1


LABELS = torch.tensor([0, 1])


def attacked(purifier: FunctionPurifier, **settings: str) -> object:
    return PGD()(DefenceAware(victim(), purifier, **settings), double(20), LABELS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BPDA(fixed(sor), "none"), "unknown gradient 'none'; there are: nearest, identity, exact"),
        (lambda: BPDA(fixed(sor), "exact"), 'gradient="exact" needs a differentiable purifier'),
        (lambda: EOT(samples=0), "samples must be an integer >= 1, got 0"),
        (lambda: EOT(first=-1), "first must be an integer >= 0, got -1"),
        (lambda: DefenceAware(victim(), fixed(sor), seed=-1), "seed must be at least 0, got -1"),
        (
            lambda: attacked(fixed(first_half), gradient="identity"),
            r"as many points as the input: got \(2, 10, 3\) for \(2, 20, 3\)",
        ),
        (lambda: attacked(fixed(lambda x: x[0])), r"shape \(2, M, 3\), it returned \(20, 3\)"),
        (lambda: attacked(fixed(lambda x: x[:1])), r"it returned \(1, 20, 3\)"),
        (
            lambda: selected(double(), torch.zeros(2, 7, dtype=torch.bool)),
            "example 0: the filter keeps no point",
        ),
        (lambda: WorstOf(()), "WorstOf needs at least one attack"),
        (lambda: WorstOf((PGD(), PGD("linf"))), "the attacks differ in what they may change"),
        (lambda: WorstOf((PGD(), SaliencyDrop())), "the attacks differ in what they may change"),
        (lambda: WorstOf((Fixed([], "targeted"), Fixed([], "untargeted"))), "some of the attacks are target"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_bare_function_is_no_purifier() -> None:
    with pytest.raises(
        TypeError, match="has no attribute 'deterministic'; wrap a function in FunctionPurifier"
    ):
        DefenceAware(victim(), sor)  # type: ignore[arg-type]
