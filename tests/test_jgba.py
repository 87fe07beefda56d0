from __future__ import annotations

import pytest
import torch
from attack_checks import check, clouds, linear_case, victim
from torch import Tensor

from attacks.base import ThreatModel
from attacks.defence_aware.jgba import JGBA, far_from_neighbours


@pytest.mark.parametrize("targeted", [False, True])
def test_it_is_a_sound_attack(targeted: bool) -> None:
    check(JGBA(epsilon=0.3, step=0.05, iterations=10), targeted)


def test_it_fools_an_easy_victim_with_and_without_the_removal() -> None:
    points, model = clouds(), victim()
    labels = model(points).argmax(1)
    result = JGBA(epsilon=0.3, step=0.05, iterations=10)(model, points, labels)
    assert result.success.all()
    mask = far_from_neighbours(result.points)
    left = [cloud[kept][None] for cloud, kept in zip(result.points, mask, strict=True)]
    assert (torch.cat([model(cloud).argmax(1) for cloud in left]) != labels).all()


def test_defaults_are_the_published_ones() -> None:
    attack = JGBA()
    assert (attack.epsilon, attack.iterations, attack.step) == (0.1, 40, 0.01)
    assert attack.threat == ThreatModel("white-box", "both", "shift", "point-l2", 0.1)


def test_the_budget_is_that_of_the_whole_displacement() -> None:
    """Forty steps of 0.01 in one direction would reach 0.4, as they do in the public code."""
    model, points, labels, normal = linear_case()
    result = JGBA()(model, points, labels)
    torch.testing.assert_close(
        result.points - points, (0.1 * normal / normal.norm()).expand_as(points), rtol=0, atol=1e-9
    )


def test_the_removal_is_a_naive_one() -> None:
    points = torch.randn(3, 30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    points[1, 7] *= 9
    mask = far_from_neighbours(points, k=4, sigmas=0.5)
    for cloud, kept in zip(points, mask, strict=True):
        value = [sum(sorted((point - other).norm().item() for other in cloud)[1:5]) / 4 for point in cloud]
        mean = sum(value) / 30
        limit = mean + 0.5 * (sum((v - mean) ** 2 for v in value) / 30) ** 0.5
        assert kept.tolist() == [v <= limit for v in value]
    assert not mask[1, 7]


def test_a_point_that_the_removal_takes_gets_the_bare_gradient_alone() -> None:
    """Two gradients of a linear model agree but for the points' share, so their mean keeps the direction."""
    calls: list[Tensor] = []

    def first_only(points: Tensor) -> Tensor:
        mask = torch.zeros(points.shape[:2], dtype=torch.bool)
        mask[:, 0] = True
        return mask

    normals = torch.eye(3, dtype=torch.float64)

    def model(points: Tensor) -> Tensor:
        calls.append(points.detach().clone())
        # Logits whose gradient differs with where the mean is: along x in the bare cloud, y after removal.
        which = (points - points[:, :1]).abs().amax((1, 2)) > 0
        direction = torch.where(which[:, None], normals[0], normals[1])
        gap = (points.mean(1) * direction).sum(1)
        return torch.stack([-gap, gap], 1)

    points = torch.randn(1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.01
    attack = JGBA(iterations=1, outliers=first_only)
    moved = attack(model, points, torch.tensor([0])).points - points
    assert torch.equal(calls[1], points[:, :1].expand(-1, 5, -1))
    torch.testing.assert_close(moved[0, 1:], 0.01 * normals[:1].expand(4, -1))  # along x alone
    assert moved[0, 0, 1] > 4 * moved[0, 0, 0] > 0  # after removal, the whole mean is this point's
    assert moved.norm(dim=2).sub(0.01).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": -1.0}, "epsilon must be a finite number >= 0"),
        ({"step": -1.0}, "step must be a finite number >= 0"),
        ({"iterations": 0}, "iterations must be an integer >= 1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JGBA(**settings)


def test_a_removal_that_keeps_nothing_is_named() -> None:
    model, points, labels, _ = linear_case()
    attack = JGBA(outliers=lambda cloud: torch.zeros(cloud.shape[:2], dtype=torch.bool))
    with pytest.raises(ValueError, match="example 0: the filter keeps no point"):
        attack(model, points, labels)
