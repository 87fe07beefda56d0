from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from attack_checks import check, clouds, linear_case, victim
from test_fgm import optimum
from torch import Tensor

from attacks.base import Norm, ThreatModel
from attacks.black_box.square import Square

NORMS: tuple[Norm, ...] = ("linf", "point-l2")


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_it_is_a_sound_attack_that_fools_an_easy_victim(norm: Norm, targeted: bool) -> None:
    result = check(Square(norm, delta=0.4, queries=150), targeted)
    assert result.success.float().mean() >= (0.3 if targeted else 0.6)
    assert (result.queries <= 151).all()


@pytest.mark.parametrize("norm", NORMS)
def test_it_comes_near_the_optimum_of_a_linear_classifier(norm: Norm) -> None:
    model, points, labels, normal = linear_case()
    best = optimum(normal, norm, points.shape[1])
    assert Square(norm, epsilon=1.25 * best, queries=1000)(model, points, labels).success.all()
    assert not Square(norm, epsilon=0.99 * best, queries=300)(model, points, labels).success.any()


def test_it_asks_for_no_gradient() -> None:
    model = victim()

    def blind(points: Tensor) -> Tensor:
        assert not torch.is_grad_enabled() and not points.requires_grad
        return model(points.detach()).detach()

    points = clouds()
    labels = model(points).argmax(1)
    assert Square(delta=0.4, queries=100)(blind, points, labels).success.any()


@pytest.mark.parametrize("norm", NORMS)
def test_every_point_ends_at_the_edge_of_the_budget(norm: Norm) -> None:
    """The start puts all points there, and moves only go from edge to edge."""
    model, points = victim(), clouds()
    attack = Square(norm, delta=0.1, queries=60)
    result = attack(model, points, model(points).argmax(1))
    shift = result.points - points
    moved = result.iterations > 0
    size = shift.abs() if norm == "linf" else shift.norm(dim=2)
    assert moved.any()
    torch.testing.assert_close(size[moved], torch.full_like(size[moved], attack.budget(40)))


def test_the_loss_never_rises_and_only_a_neighbourhood_moves_at_a_time() -> None:
    model, points = victim(), clouds()[:2]
    labels = model(points).argmax(1)
    seen: list[Tensor] = []

    def watched(given: Tensor) -> Tensor:
        seen.append(given.clone())
        return model(given)

    attack = Square("point-l2", delta=1e-4, queries=80)
    result = attack(watched, points[:1], labels[:1])
    assert not result.success.any() and len(seen) == 81

    def margin(cloud: Tensor) -> float:
        logits = model(cloud)[0].detach()
        rest = torch.cat([logits[: labels[0]], logits[labels[0] + 1 :]])
        return float(logits[labels[0]] - rest.max())

    current, value = points[:1], math.inf
    shares = []
    for query, tried in enumerate(seen[1:-1], 1):
        changed = (tried != current).any(2)[0]
        if query > 1:
            shares.append(int(changed.sum()))
            # The changed points are nearer to one of the points than all the others are.
            distances = torch.cdist(points[0], points[0])
            assert any(
                distances[centre][changed].max() <= distances[centre].sort().values[shares[-1] - 1] + 1e-12
                for centre in range(40)
            )
        if margin(tried) < value:
            current, value = tried, margin(tried)
    # Up to the rounding of the last projection.
    torch.testing.assert_close(result.points, current, rtol=0, atol=1e-12)
    assert shares[0] == 4 and shares[-1] == 1  # 0.8 of 40, halved three times by query 250 of 10,000
    assert shares == sorted(shares, reverse=True)


def test_examples_that_are_done_leave_the_batch() -> None:
    model, points = victim(), clouds()
    wrong = (model(points).argmax(1) + torch.arange(6) % 2) % 4
    result = Square(delta=0.0, queries=7)(model, points, wrong)
    assert result.iterations.tolist() == [6, 0] * 3
    assert result.queries.tolist() == [8, 2] * 3
    assert torch.equal(result.points, points)


def test_targets_are_approached_by_the_cross_entropy() -> None:
    model, points = victim(), clouds()
    labels = model(points).argmax(1)
    targets = (labels + 1) % 4
    few, many = (Square(delta=0.02, queries=n)(model, points, labels, targets) for n in (2, 50))
    loss = torch.nn.functional.cross_entropy
    before, after = (loss(model(part.points), targets, reduction="none") for part in (few, many))
    assert (after[~many.success] < before[~many.success]).all()
    assert not many.success.all() and (many.success | ~few.success).all()


def test_defaults_are_the_published_ones() -> None:
    assert Square().threat == ThreatModel("score-based", "both", "shift", "linf", 0.08)
    assert (Square().queries, Square().share) == (5000, 0.8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Square("l2"), "norm 'point-l2' or 'linf'"),
        (lambda: Square("l7"), "unknown norm 'l7'"),
        (lambda: Square(queries=1), "queries must be an integer >= 2"),
        (lambda: Square(cells=0), "cells must be an integer >= 1"),
        (lambda: Square(share=0.0), r"share must be a number in \(0, 1\], got 0.0"),
        (lambda: Square(delta=-0.1), "delta must be a finite number >= 0"),
    ],
)
def test_bad_settings_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
