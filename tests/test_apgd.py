from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from attack_checks import check, clouds, linear_case, victim
from test_fgm import NORMS, optimum
from torch import Tensor, nn

from attacks.base import Norm, ThreatModel
from attacks.functional import losses
from attacks.gradient.apgd import APGD, LOSSES, checkpoints
from attacks.gradient.pgd import PGD, steepest


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_it_is_a_sound_attack_that_fools_an_easy_victim(loss: str, norm: Norm, targeted: bool) -> None:
    result = check(APGD(norm, delta=0.4, loss=loss, iterations=25, restarts=2), targeted)
    assert result.success.float().mean() >= (0.3 if targeted else 0.8)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_it_succeeds_within_101_percent_of_the_optimum_only(loss: str, norm: Norm, targeted: bool) -> None:
    two, points, labels, normal = linear_case()

    def model(given: Tensor) -> Tensor:  # two more classes, which never win, for the DLR loss
        logits = two(given)
        return torch.cat([logits, logits.new_tensor([[-50.0, -60.0]]).expand(len(logits), 2)], 1)

    best = optimum(normal, norm, points.shape[1])
    for ratio in (0.99, 1.01):
        attack = APGD(norm, epsilon=ratio * best, loss=loss, iterations=40)
        result = attack(model, points, labels, 1 - labels if targeted else None)
        assert (result.success == (ratio > 1)).all()
        assert (result.distances[norm] <= ratio * best * (1 + 1e-9)).all()


# Against PGD on a trained network


def solids(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy spheres, boxes, sticks and discs of random sizes, 48 points each."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 48, 3, generator=generator)
    labels = torch.arange(count) % 4
    sphere = points / points.norm(dim=2, keepdim=True)
    box = points / points.abs().amax(2, keepdim=True)
    stick = points * torch.tensor([1.0, 0.1, 0.1]) / 2
    disc = points * torch.tensor([0.7, 0.7, 0.1])
    chosen = torch.stack([sphere, box * 0.7, stick, disc], 1)[torch.arange(count), labels]
    scale = 0.7 + 0.3 * torch.rand(count, 1, 1, generator=generator)
    return scale * chosen + 0.05 * torch.randn(count, 48, 3, generator=generator), labels


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.local = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 64), nn.ReLU())
            self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))

        def forward(self, points: Tensor) -> Tensor:
            return self.head(self.local(points).amax(1))

    net, (points, labels) = Net(), solids(256, 0)
    adam = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(120):
        adam.zero_grad()
        nn.functional.cross_entropy(net(points), labels).backward()
        adam.step()
    return net.eval()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_it_is_at_least_as_strong_as_pgd_at_every_budget(trained: nn.Module, norm: Norm, loss: str) -> None:
    points, labels = solids(48, 1)
    assert (trained(points).argmax(1) == labels).double().mean() > 0.9
    rates = []
    for delta in (0.01, 0.03, 0.08):
        weak = PGD(norm, delta)(trained, points, labels)
        strong = APGD(norm, delta, loss=loss, iterations=50)(trained, points, labels)  # as many as PGD
        assert strong.success.sum() >= weak.success.sum(), delta
        rates.append(float(strong.success.double().mean()))
    assert rates[0] < 0.3 and rates[-1] > 0.5  # so that the comparison says something
    assert rates == sorted(rates)


# The algorithm


def test_checkpoints_are_the_published_ones() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1) == []
    assert checkpoints(10) == [3, 5, 6, 7, 8, 9]


def naive(model: nn.Module, clean: Tensor, label: Tensor, attack: APGD, start: Tensor) -> Tensor:
    """Algorithm 1 of the paper for one cloud, line by line; the loss is maximised."""

    def evaluate(x: Tensor) -> tuple[float, Tensor]:
        x = x.detach().requires_grad_()
        value = -LOSSES[attack.loss](model(x), label, False)
        return value.item(), torch.autograd.grad(value.sum(), x)[0]

    eta, marks, alpha = 2 * attack.budget(clean.shape[1]), [0, *checkpoints(attack.iterations)], attack.alpha
    xs, values, halved, bests = [start], [evaluate(start)[0]], {0: False}, {0: -math.inf}
    best, best_value = start, values[0]
    for k in range(attack.iterations):
        if k in marks[1:]:
            last = marks[marks.index(k) - 1]
            rises = sum(values[i + 1] > values[i] for i in range(last, k))
            halved[k] = rises < attack.rho * (k - last) or (not halved[last] and bests[last] == best_value)
            bests[k] = best_value
            if halved[k]:
                eta, xs[k], xs[k - 1], values[k] = eta / 2, best, best, best_value
        gradient = evaluate(xs[k])[1]
        ahead = attack.constrain(xs[k] + eta * steepest(gradient, attack.norm), clean)
        if k == 0:
            new = ahead
        else:
            new = attack.constrain(xs[k] + alpha * (ahead - xs[k]) + (1 - alpha) * (xs[k] - xs[k - 1]), clean)
        xs.append(new)
        values.append(evaluate(new)[0])
        if values[-1] > best_value:
            best, best_value = new, values[-1]
    return best


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("norm", NORMS)
def test_it_does_what_the_algorithm_says(norm: Norm, loss: str, trained: nn.Module) -> None:
    points, labels = (part[:4] for part in solids(4, 2))
    model, points = trained.double(), points.double()
    attack = APGD(norm, delta=0.006, loss=loss, iterations=60, early_stop=False)
    result = attack(model, points, labels)
    start = attack.randomised(points, torch.Generator().manual_seed(0))
    held = (~result.success).nonzero().squeeze(1).tolist()
    assert len(held) >= 2
    for i in held:
        expected = naive(model, points[i : i + 1], labels[i : i + 1], attack, start[i : i + 1])
        torch.testing.assert_close(result.points[i : i + 1], expected, rtol=0, atol=1e-8)
    model.float()


def test_a_success_is_kept_though_a_later_failure_has_a_lower_loss() -> None:
    losses = []

    def model(points: Tensor) -> Tensor:
        """Class 1 leads where the mean is slightly positive; from 0.1 on, class 2 does by very little."""
        x = points.mean(1)[:, 0]
        logits = torch.stack([-20 * x, 5 * x, torch.where(x < 0.1, -1 + 0 * x, 5 * x + 0.01)], 1)
        losses.append((LOSSES["ce"](logits, one, True).item(), int(logits.argmax(1))))
        return logits

    one = torch.tensor([1])
    attack = APGD("linf", epsilon=0.5, iterations=4, early_stop=False)
    result = attack(model, torch.full((1, 8, 3), -0.05, dtype=torch.float64), 0 * one, one)
    (first, start), *others = losses[:-1]
    assert start == 1 and all(loss < first and found == 2 for loss, found in others)
    assert result.success.all()


def test_going_on_after_success_keeps_it_and_lowers_the_loss(trained: nn.Module) -> None:
    points, labels = solids(16, 3)
    stops = APGD(delta=0.08, iterations=30)(trained, points, labels)
    goes_on = APGD(delta=0.08, iterations=30, early_stop=False)(trained, points, labels)
    assert stops.success.any() and (goes_on.success | ~stops.success).all()
    assert goes_on.iterations.tolist() == [30] * 16
    both = stops.success
    assert (
        losses.cross_entropy(trained(goes_on.points), labels, False)[both]
        <= losses.cross_entropy(trained(stops.points), labels, False)[both]
    ).all()


def test_only_what_holds_is_started_again(trained: nn.Module) -> None:
    points, labels = solids(32, 4)
    once = APGD("linf", delta=0.02, iterations=15)(trained, points, labels)
    thrice = APGD("linf", delta=0.02, iterations=15, restarts=3)(trained, points, labels)
    assert once.success.any() and not once.success.all()
    assert torch.equal(thrice.points[once.success], once.points[once.success])
    assert torch.equal(thrice.iterations[once.success], once.iterations[once.success])
    assert (once.iterations[~once.success] == 15).all()
    assert (thrice.iterations[~thrice.success] == 45).all()
    assert (thrice.success | ~once.success).all()


def test_examples_that_are_done_leave_the_batch() -> None:
    model, points = victim(), clouds()
    wrong = (model(points).argmax(1) + torch.arange(6) % 2) % 4
    result = APGD(delta=0.0, iterations=3, restarts=2)(model, points, wrong)
    assert result.iterations.tolist() == [6, 0] * 3
    assert result.queries.tolist() == [9, 2] * 3
    assert torch.equal(result.points, points)


def test_defaults_are_the_published_ones() -> None:
    attack = APGD()
    assert (attack.iterations, attack.rho, attack.alpha) == (100, 0.75, 0.75)
    assert attack.threat == ThreatModel("white-box", "both", "shift", "l2", PGD().budget(1024))


# The DLR loss


def test_dlr_by_hand() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0, 2.0, -4.0]] * 2)
    classes = torch.tensor([1, 3])
    # Descending: 5, 3, 2, 1, -4.
    torch.testing.assert_close(losses.dlr(logits, classes, False), torch.tensor([2 / 3, -1.0]))
    torch.testing.assert_close(losses.dlr(logits, classes, True), torch.tensor([-2 / 3.5, 3 / 3.5]))


@pytest.mark.parametrize("targeted", [False, True])
def test_dlr_does_not_change_with_shift_and_scale_and_is_negative_at_the_goal(targeted: bool) -> None:
    logits = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(50) % 6
    value = losses.dlr(logits, classes, targeted)
    torch.testing.assert_close(losses.dlr(40 * logits - 7, classes, targeted), value)
    won = logits.argmax(1) == classes
    assert torch.equal(value < 0, won if targeted else ~won)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: losses.dlr(torch.zeros(1, 2), torch.tensor([0]), False),
            "needs at least 3 classes, the model has 2",
        ),
        (
            lambda: losses.dlr(torch.zeros(1, 3), torch.tensor([0]), True),
            "targeted DLR loss needs at least 4",
        ),
        (lambda: APGD(loss="hinge"), "unknown loss 'hinge'; there are: ce, dlr"),
        (lambda: APGD(iterations=0), "iterations must be an integer >= 1"),
        (lambda: APGD(restarts=0), "restarts must be an integer >= 1"),
        (lambda: APGD(rho=0.0), r"rho must be a number in \(0, 1\], got 0.0"),
        (lambda: APGD(alpha=1.5), r"alpha must be a number in \(0, 1\], got 1.5"),
        (lambda: APGD(epsilon=-1.0), "epsilon must be a finite number >= 0"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
