from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from attacks.best_so_far import BestSoFar
from attacks.optimised.carlini_wagner import Search, SearchSpace
from attacks.optimised.perturb import Perturb
from attacks.oracle import Oracle


class Net(nn.Module):
    """A smooth classifier with logits that are large enough for the hinge to matter beside the distance."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, points: Tensor) -> Tensor:
        return 40 * self.layers(points).mean(1)


def case() -> tuple[nn.Module, Tensor, Tensor]:
    model = Net().double().eval()
    points = torch.randn(3, 20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return model, points, model(points).argmax(1)


def naive_perturb(attack: Perturb, model: nn.Module, cloud: Tensor, label: int, target: int | None) -> Tensor:
    """The attack on one cloud, by scalars and branches, its gradient from one backward pass."""
    generator = torch.Generator().manual_seed(0)
    lower, upper, weight = 0.0, attack.largest_weight, attack.first_weight
    best, best_distance = None, math.inf
    for _ in range(attack.searches):
        noise = torch.randn(cloud.shape, generator=generator, dtype=cloud.dtype)
        again = attack.refine and best is not None
        points = (best.clone() if again else cloud + attack.noise * noise).requires_grad_()
        adam = torch.optim.Adam([points], lr=attack.rate)
        found, found_distance, first = None, math.inf, None
        for step in range(attack.iterations):
            if first is not None and attack.polish is not None and step > first + attack.polish:
                break
            logits = model(points[None])[0]
            distance = (points - cloud).norm()
            predicted = int(logits.argmax())
            reached = predicted != label if target is None else predicted == target
            if reached and first is None:
                first = step
            if reached and distance.item() < found_distance:
                found, found_distance = points.detach().clone(), distance.item()
            own = label if target is None else target
            other = max(logits[index] for index in range(len(logits)) if index != own)
            gap = logits[own] - other if target is None else other - logits[own]
            adam.zero_grad()
            (torch.clamp(gap + attack.kappa, min=0) + weight * distance).backward()
            before = points.detach().clone()
            adam.step()
            if attack.refine:
                left = attack.iterations - step
                if attack.polish is not None:
                    left = left if first is None else min(left, first + attack.polish + 1 - step)
                share = min(1.0, left / (attack.iterations if attack.polish is None else attack.polish + 1))
                with torch.no_grad():
                    points.copy_(before + share * (points - before))
        nearer = found_distance < best_distance if attack.refine else found_distance <= best_distance
        if found is not None and nearer:
            best, best_distance, lower = found, found_distance, weight
        else:
            upper = weight
        weight = (lower + upper) / 2
    return points.detach() if best is None else best


@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("polish", [None, 0, 4])
@pytest.mark.parametrize("refine", [False, True])
def test_perturb_is_a_loop_over_the_examples(targeted: bool, polish: int | None, refine: bool) -> None:
    model, points, labels = case()
    targets = (labels + 1) % 4 if targeted else None
    attack = Perturb(kappa=0.5, searches=3, iterations=20, rate=0.05, polish=polish, refine=refine)
    result = attack(model, points, labels, targets)
    assert result.success.any()
    for example in range(len(points)):
        target = None if targets is None else int(targets[example])
        twin = naive_perturb(attack, model, points[example], int(labels[example]), target)
        torch.testing.assert_close(result.points[example], twin, rtol=0, atol=1e-8)


def test_who_has_succeeded_leaves_the_batch() -> None:
    model, points, labels = case()
    attack = Perturb(first_weight=0.5, searches=1, iterations=60, rate=0.05)
    whole, quick = attack(model, points, labels), dataclasses.replace(attack, polish=0)(model, points, labels)
    assert whole.success.all() and quick.success.all()
    assert whole.iterations.tolist() == [60] * 3 and whole.queries.tolist() == [61] * 3  # one for the result
    assert (quick.iterations < 60).all() and len(set(quick.iterations.tolist())) > 1
    assert torch.equal(quick.queries, quick.iterations + 1)
    # The steps that are left out would have come nearer.
    assert (quick.distances["l2"] >= whole.distances["l2"]).all()


def test_refining_comes_nearer_in_fewer_steps() -> None:
    model, points, labels = case()
    attack = Perturb(first_weight=0.01, largest_weight=1, searches=4, iterations=100, rate=0.1, polish=5)
    plain = attack(model, points, labels)
    refined = dataclasses.replace(attack, refine=True)(model, points, labels)
    assert plain.success.all() and refined.success.all()
    assert (refined.iterations < plain.iterations).all()
    assert (refined.distances["l2"] < 0.95 * plain.distances["l2"]).all()


def test_a_start_without_noise_is_no_error() -> None:
    model, points, labels = case()
    for dtype in (torch.float32, torch.float64):
        given = points.to(dtype)
        attack = Perturb(first_weight=0.5, searches=1, iterations=25, rate=0.05, noise=0.0)
        result = attack(model.to(dtype), given, labels)
        assert result.points.dtype == dtype
        assert result.success.any()


def test_a_cloud_that_is_misclassified_already_stays() -> None:
    model, points, labels = case()
    result = Perturb(searches=2, iterations=5)(model, points, (labels + 1) % 4)
    assert result.success.all()
    assert (result.distances["linf"] < 1e-6).all()


@pytest.mark.parametrize(("nearer_only", "refine"), [(True, False), (False, False), (False, True)])
def test_weights_are_bisected_and_doubled_while_they_have_no_upper_end(
    nearer_only: bool, refine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inf = math.inf
    outcomes = [[3.0, inf, 3.0], [2.0, 1.0, 4.0], [inf, inf, 1.0], [1.0, inf, inf]]
    asked: list[list[float]] = []

    def search(
        self: Search,
        oracle: Oracle,
        space: SearchSpace,
        weight: Tensor,
        start: list[Tensor],
        best: BestSoFar,
        taken: Tensor,
    ) -> tuple[Tensor, Tensor]:
        distance = torch.tensor(outcomes[len(asked)], dtype=weight.dtype)
        asked.append(weight.tolist())
        clouds = torch.full((3, 4, 3), float(len(asked)), dtype=weight.dtype)
        best.see([clouds, *start], distance.isfinite().long(), distance)
        return distance, -clouds

    monkeypatch.setattr(Search, "_once", search)
    monkeypatch.setattr(Perturb, "nearer_only", nearer_only)
    attack = Perturb(first_weight=8, largest_weight=inf, searches=4, iterations=1, refine=refine)
    result = attack(
        lambda points: points[:, :2, 0] * 0, torch.zeros(3, 4, 3), torch.zeros(3, dtype=torch.long)
    )
    # The third succeeds in the second search, but farther away than before.
    third = [8, 16, 12, 14] if nearer_only or refine else [8, 16, 32, 64]
    assert asked == [list(row) for row in zip([8, 16, 32, 24], [8, 4, 6, 5], third, strict=True)]
    assert result.points[:, 0, 0].tolist() == [4, 2, 3]


def test_an_example_without_success_keeps_the_last_iterate() -> None:
    _, points, labels = case()

    def never(clouds: Tensor) -> Tensor:
        return torch.cat([1e4 + 0 * clouds[:, :1, 0], clouds.sum((1, 2))[:, None]], 1)

    result = Perturb(searches=2, iterations=7)(never, points, labels * 0)
    assert not result.success.any()
    shift = result.points - points
    # Seven steps of Adam along a constant gradient, for the distance is nothing beside 1e4 - the sum.
    assert (shift.abs() > 0.01).all() and result.iterations.tolist() == [14] * 3
