from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from attack_checks import CLASSES, clouds, victim
from torch import Tensor, nn

from attacks.base import Attack, Oracle, ThreatModel
from attacks.defence_aware.adaptive import BPDA, EOT, Adaptive, DefenceAware, adaptive, selected
from attacks.dropping.drop import SaliencyDrop
from attacks.gradient.pgd import PGD
from ifdefense import Defended, Purifier
from ifdefense.stages.outliers import statistical_outlier_removal

PLAIN = PGD("l2", epsilon=1.5, iterations=15, step=0.1, random_start=False)


def double(count: int = 7) -> Tensor:
    return torch.randn(2, count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


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
            assert torch.equal(BPDA(purifier)(asked), purifier(points))


def test_the_gradient_of_a_purified_point_goes_to_the_nearest_input_point() -> None:
    points = double()
    order = torch.tensor([4, 0, 4, 6, 1])  # reordered, one twice, some dropped

    def purifier(given: Tensor) -> Tensor:
        return given.detach()[:, order] + 1e-3

    weight = torch.randn(2, 5, 3, dtype=torch.float64)
    expected = torch.zeros_like(points)
    for place, source in enumerate(order):
        expected[:, source] += weight[:, place]
    torch.testing.assert_close(gradient_of(BPDA(purifier), points, weight), expected)


def test_the_nearest_point_is_a_naive_one() -> None:
    points, new = double(), double(11).flip(0)
    weight = torch.randn(2, 11, 3, dtype=torch.float64)
    expected = torch.zeros_like(points)
    for b in range(2):
        for m in range(11):
            expected[b, (points[b] - new[b, m]).norm(dim=1).argmin()] += weight[b, m]
    torch.testing.assert_close(gradient_of(BPDA(lambda x: new), points, weight), expected)


def test_identity_keeps_the_order_whatever_is_nearest() -> None:
    points, weight = double(), torch.randn(2, 7, 3, dtype=torch.float64)
    purify = BPDA(lambda x: x.detach().flip(1), "identity")
    torch.testing.assert_close(gradient_of(purify, points, weight), weight)


def test_exact_is_the_gradient_of_the_purifier_itself() -> None:
    points, weight = double(), torch.randn(2, 7, 3, dtype=torch.float64)
    centred = weight - weight.mean(1, keepdim=True)
    exact = BPDA(lambda x: 2 * (x - x.mean(1, keepdim=True)), "exact")
    torch.testing.assert_close(gradient_of(exact, points, weight), 2 * centred)


def test_for_a_choice_of_points_nearest_is_exact() -> None:
    points = double(40)
    weight = torch.randn(2, 40, 3, dtype=torch.float64)

    def differentiable(given: Tensor) -> Tensor:
        return selected(given, statistical_outlier_removal(given.detach()))

    assert statistical_outlier_removal(points).sum(1).tolist() != [40, 40]
    torch.testing.assert_close(
        gradient_of(BPDA(sor), points, weight), gradient_of(BPDA(differentiable, "exact"), points, weight)
    )


def test_selected_keeps_the_order_and_fills_up_from_the_first() -> None:
    points = torch.arange(10.0).view(2, 5, 1).expand(-1, -1, 3)
    mask = torch.tensor([[True, False, True, False, False], [True] * 5])
    assert selected(points, mask)[..., 0].tolist() == [[0, 2, 0, 2, 0], [5, 6, 7, 8, 9]]
    torch.autograd.gradcheck(
        lambda given: selected(given, mask), double(5).requires_grad_(), check_batched_grad=False
    )


class Seeded(nn.Module):
    def forward(self, points: Tensor, num_points: int | None = None, seed: int = 0) -> Tensor:
        return points


@pytest.mark.parametrize(
    ("purifier", "seeded"),
    [
        (thinned, True),
        (Seeded(), True),
        (Purifier(), True),
        (functools.partial(Seeded(), num_points=3), True),
        (functools.partial(thinned, seed=4), False),
        (sor, False),
        (nn.Identity(), False),
    ],
)
def test_a_seed_is_given_to_what_takes_one(purifier: Callable[..., Tensor], seeded: bool) -> None:
    assert BPDA(purifier).seeded == seeded
    assert BPDA(purifier)(double(40), 1).shape[2] == 3


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
    aware = DefenceAware(squares, BPDA(shifted, "identity"), EOT(samples=3, first=2), normalise=False, seed=9)
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


def test_only_what_takes_a_seed_is_averaged_by_default() -> None:
    assert DefenceAware(squares, BPDA(shifted)).eot == EOT(8)
    assert DefenceAware(squares, BPDA(sor)).eot.samples == 1


# The whole


def test_without_a_gradient_it_is_the_defended_classifier() -> None:
    model, points = victim(), clouds()
    purifier = Purifier.from_pretrained("sor")
    for normalise in (True, False):
        aware = DefenceAware(model, BPDA(purifier), normalise=normalise, seed=5)
        defended = Defended(model, purifier, normalise=normalise, seed=5)
        assert torch.equal(aware(points), defended(points))


def test_the_gradient_passes_the_normalisation() -> None:
    """What is scaled back does not change the logits, so the gradient along the scale is 0."""
    points = double(30).requires_grad_()
    aware = DefenceAware(victim(), BPDA(nn.Identity(), "exact"))
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
    result = adaptive(attack, first_half, normalise=False, fallback=False)(reach, points, labels)
    assert result.success.all()
    assert (reach(first_half(result.points)).argmax(1) == 1).all()
    # It moves the one point that counts behind the defence.
    moved = (result.points - points).norm(dim=2) > 1e-9
    assert moved.sum(1).tolist() == [1, 1, 1]
    assert torch.equal(points[..., 0][moved], farthest)
    assert (result.distances["l2"] <= 1 + 1e-9).all()


def test_it_is_at_least_as_strong_as_the_plain_attack_behind_outlier_removal() -> None:
    model, points = victim(), clouds()
    labels = model(sor(points)).argmax(1)
    strength = []
    for epsilon in (0.05, 0.1, 0.2, 0.4):
        attack = PGD("l2", epsilon=epsilon, iterations=15, random_start=False)
        behind = model(sor(attack(model, points, labels).points)).argmax(1) != labels
        through = adaptive(attack, sor, normalise=False, fallback=False)(model, points, labels).success
        safe = adaptive(attack, sor, normalise=False)(model, points, labels).success
        strength.append((int(behind.sum()), int(through.sum())))
        assert (safe | ~behind).all() and (safe | ~through).all()
    assert all(through >= behind for behind, through in strength)
    assert strength[-1][1] == len(labels)


def test_success_is_that_on_the_real_defence() -> None:
    model, points = victim(), clouds()
    labels = model(points).argmax(1)
    defended = Defended(model, Purifier.from_pretrained("sor"), seed=3)
    attack = adaptive(
        PGD("l2", epsilon=0.3, iterations=5), defended.purifier, eot=EOT(2), seed=3, fallback=False
    )
    result = attack(model, points, labels, (labels + 1) % CLASSES)
    reached = defended(result.points).argmax(1) == (labels + 1) % CLASSES
    assert torch.equal(result.success, reached)


def masked(points: Tensor) -> Tensor:
    """The identity, but no gradient tells."""
    return points.detach() + 0 * points


def test_the_plain_attack_stands_in_where_gradients_are_hidden() -> None:
    model, points = victim(), clouds()
    labels = model(points).argmax(1)
    labels[::2] = (labels[::2] + 1) % CLASSES  # every other one is misclassified from the beginning
    plain = PLAIN(model, points, labels)
    assert plain.success.all()
    alone = adaptive(PLAIN, masked, gradient="exact", normalise=False, fallback=False)(model, points, labels)
    assert alone.success.tolist() == [True, False] * 3
    result = adaptive(PLAIN, masked, gradient="exact", normalise=False)(model, points, labels)
    assert result.success.all()
    torch.testing.assert_close(result.points[1::2], plain.points[1::2], rtol=0, atol=1e-9)
    assert torch.equal(result.points[::2], points[::2])
    torch.testing.assert_close(result.distances["l2"], (result.points - points).flatten(1).norm(dim=1))
    assert result.iterations.tolist() == [15, 30] * 3
    assert result.queries.tolist() == [16, 16 + 16 + 1] * 3


def test_a_plain_targeted_attack_stands_in_too_where_it_only_leaves_the_true_class() -> None:
    model, points = victim(), clouds()
    labels = model(points).argmax(1)
    targets = model(points).argmin(1)
    weak = PGD("l2", epsilon=0.1, iterations=15, random_start=False)
    plain = weak(model, points, labels, targets)
    wrong = model(plain.points).argmax(1) != labels
    astray = wrong & ~plain.success
    assert astray.any()
    result = adaptive(weak, masked, gradient="exact", normalise=False)(model, points, labels, targets)
    assert torch.equal(model(result.points).argmax(1) != labels, wrong)
    assert torch.equal(result.success, plain.success)
    torch.testing.assert_close(result.points[astray], plain.points[astray], rtol=0, atol=1e-9)


def test_the_plain_attack_has_the_same_random_numbers() -> None:
    model, points = victim(), clouds()
    labels = model(points).argmax(1)
    attack = PGD("l2", epsilon=1.5, iterations=5)

    def nowhere(given: Tensor) -> Tensor:
        return given.detach() * 0 + points[:1]  # the same cloud for all

    result = adaptive(attack, nowhere, gradient="identity", normalise=False)(
        model, points, labels, generator=torch.Generator().manual_seed(8)
    )
    assert not result.success.all()  # one answer cannot be wrong for all classes
    plain = attack(model, points, labels, generator=torch.Generator().manual_seed(8))
    assert plain.success.any()

    undefended = adaptive(attack, masked, gradient="exact", normalise=False)(
        model, points, labels, generator=torch.Generator().manual_seed(8)
    )
    assert (undefended.success | ~plain.success).all()


def test_examples_do_not_depend_on_their_batch_and_seeds_repeat() -> None:
    model, points = victim(), clouds()
    labels = model(points).argmax(1)
    attack = adaptive(PGD("linf", delta=0.05, iterations=6, early_stop=True), thinned, eot=EOT(3))
    whole, again = attack(model, points, labels), attack(model, points, labels)
    assert torch.equal(whole.points, again.points)
    for i in range(len(points)):
        alone = attack(model, points[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(alone.points[0], whole.points[i], rtol=0, atol=1e-6)
        assert alone.success[0] == whole.success[i]


def test_the_input_and_the_models_are_left_untouched() -> None:
    model, points = victim(), clouds()
    labels = model(points).argmax(1)
    copies = points.clone(), labels.clone()
    defence = nn.Sequential(nn.Dropout(0.9))  # off in evaluation, as an attacked model is
    model.train()
    defence.train()
    result = adaptive(PGD(iterations=2), defence, gradient="exact")(model, points, labels)
    assert model.training and model.head.training and defence[0].training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(points, copies[0]) and torch.equal(labels, copies[1])
    assert not result.points.requires_grad


def test_attacks_that_drop_points_are_adaptive_too() -> None:
    model, points = victim(), clouds()
    labels = model(points).argmax(1)
    purifier = Purifier.from_pretrained("sor")
    for defence in (purifier, functools.partial(purifier, num_points=40)):
        attack = adaptive(SaliencyDrop(num=9), defence, eot=EOT(1))
        result = attack(model, points, labels)
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
    attack = adaptive(Guess(), first_half, normalise=False, fallback=False)
    assert attack(reach, points, labels).success.all()
    assert not attack(reach, points - 0.5, labels).success.any()


def test_the_threat_model_is_that_of_the_attack() -> None:
    attack = adaptive(PGD("linf", epsilon=0.1), sor)
    assert isinstance(attack, Adaptive) and isinstance(attack, Attack)
    assert attack.threat == PGD("linf", epsilon=0.1).threat
    assert attack.budget(7) == 0.1
    assert attack.constrain(torch.ones(1, 2, 3), torch.zeros(1, 2, 3)).max() == pytest.approx(0.1)


LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adaptive(PGD(), sor, gradient="none"), "unknown gradient 'none'; there are: nearest, iden"),
        (lambda: adaptive(adaptive(PGD(), sor), sor), "the attack is adaptive already"),
        (lambda: EOT(samples=0), "samples must be at least 1, got 0"),
        (
            lambda: adaptive(PGD(), sor, gradient="exact")(victim(), double(), LABELS),
            'gradient="exact" needs a purifier that passes gradients',
        ),
        (
            lambda: adaptive(PGD(), first_half, gradient="identity")(victim(), double(20), LABELS),
            r"as many points as came in: \(2, 10, 3\) came out for \(2, 20, 3\)",
        ),
        (
            lambda: adaptive(PGD(), lambda x: x[0])(victim(), double(), LABELS),
            r"the purifier must return clouds of shape \(2, M, 3\), it returned \(7, 3\)",
        ),
        (
            lambda: adaptive(PGD(), lambda x: x[:1])(victim(), double(), LABELS),
            r"it returned \(1, 7, 3\)",
        ),
        (
            lambda: adaptive(PGD(), sor)(victim(), double(), LABELS - 1),
            "class -1 in labels is out of range",
        ),
        (
            lambda: selected(double(), torch.zeros(2, 7, dtype=torch.bool)),
            "example 0: the filter keeps no point",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
