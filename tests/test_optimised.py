"""Restoration by optimisation: the published loss, landing, spreading, independence of clouds, bad input."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ifdefense.geometry.points import knn
from ifdefense.implicit.base import Calibration, Field
from ifdefense.restorers.optimised import Adam, Newton, OptimisedRestorer, Repulsion, Solver

RADIUS = 0.4
PUBLISHED = Calibration()
SOLVERS = [Adam(), Adam(every=4), Newton()]


def sphere(scale: float = 20, level: float = PUBLISHED.level) -> Field:
    """Field of a ball whose surface lies on the level."""
    return lambda points, cloud: scale * (RADIUS - points.norm(dim=1)) + level


def rough(count: int = 300, seed: int = 0) -> Tensor:
    """Points near half of the sphere, in clumps."""
    generator = torch.Generator().manual_seed(seed)
    points = F.normalize(torch.randn(count, 3, generator=generator), dim=1)
    points[:, 2].abs_()
    points = points[torch.arange(count) // 3 * 3]
    return points * (RADIUS + 0.03 * torch.randn(count, 1, generator=generator))


def restored(restorer: OptimisedRestorer, count: int = 512, calibration: Calibration = PUBLISHED) -> Tensor:
    (result,) = restorer(sphere(level=calibration.level), [rough()], [count], calibration, 0)
    assert result.points is not None and result.points.shape == (count, 3)
    return result.points


def spacing(points: Tensor) -> Tensor:
    """Distance of each point from its nearest neighbour."""
    return knn(points[None], points[None], 2)[0][0, :, 1].sqrt()


def published_loss(points: Tensor, field: Field) -> Tensor:
    """1024 · mean BCE(logit, 0.2) + 500 · repulsion, word for word; all pairs are compared."""
    logits = field(points, torch.zeros(len(points), dtype=torch.int64))
    attraction = F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, 0.2))
    distance = (points[:, None] - points[None]).square().sum(-1).add(torch.eye(len(points)) * 9).sqrt()
    near = distance.topk(5, largest=False).values
    return 1024 * attraction + 500 * ((0.07 - near) * (-((near / 0.03) ** 2)).exp()).mean()


def test_the_published_loss_is_descended_by_adam() -> None:
    field = sphere()
    start = OptimisedRestorer(Adam(1, rate=1e-9))
    points = restored(start).clone().requires_grad_()
    optimiser = torch.optim.Adam([points], lr=1e-3)
    for _ in range(20):
        optimiser.zero_grad()
        published_loss(points, field).backward()
        optimiser.step()
    ours = restored(OptimisedRestorer(Adam(20)))
    # Adam's first steps are signs: a gradient of zero goes either way.
    assert (ours - points.detach()).abs().max(1).values.quantile(0.98) < 1e-4
    assert (ours - points.detach()).norm(dim=1).mean() < 1e-4


def test_the_gradient_of_the_repulsion_is_that_of_its_formula() -> None:
    repulsion = Repulsion(4, 0.2, 0.15)
    points = (torch.rand(20, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5) / 3
    near = repulsion.near(points, [12, 8])
    assert near[:12].max() < 12 <= near[12:].min() and not (near == torch.arange(20)[:, None]).any()
    for part in (points[:12], points[12:]):
        expected = knn(part[None], part[None], 5)[1][0, :, 1:]
        torch.testing.assert_close(repulsion.near(part, [len(part)]), expected)

    def total(points: Tensor) -> Tensor:
        distance = (points[:, None] - points[near]).norm(dim=-1)
        energy: Tensor = ((0.2 - distance) * (-((distance / 0.15) ** 2)).exp()).mean(1).sum()
        return energy

    moved = points.clone().requires_grad_()
    (slope,) = torch.autograd.grad(total(moved), moved)
    torch.testing.assert_close(repulsion.gradient(points, near), slope)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_points_land_on_the_surface_and_spread(solver: Solver) -> None:
    points = restored(OptimisedRestorer(solver))
    distance = (points.norm(dim=1) - RADIUS).abs()
    # Adam balances both terms: where points are crowded, the repulsion pushes some off the surface.
    assert distance.max() < (1e-3 if isinstance(solver, Newton) else 0.02) and distance.median() < 1e-3
    alone = restored(OptimisedRestorer(solver, repulsion=Repulsion(width=1e-4)))
    assert spacing(points).quantile(0.1) > 2 * spacing(alone).quantile(0.1)
    assert (points[:, 2] < -0.1).float().mean() < 0.1  # nothing leaves for the other half


def test_the_offset_moves_results_inwards() -> None:
    calibration = dataclasses.replace(PUBLISHED, threshold=0.5, offset=0.02)
    points = restored(OptimisedRestorer(Newton()), calibration=calibration)
    torch.testing.assert_close(points.norm(dim=1), torch.full((512,), RADIUS - 0.02), rtol=0, atol=1e-3)


def test_a_field_that_is_linear_in_between_is_evaluated_less_often() -> None:
    calls = []

    def counted(points: Tensor, cloud: Tensor) -> Tensor:
        calls.append(len(points))
        return sphere()(points, cloud)

    for solver, evaluations in ((Adam(20), 20), (Adam(20, every=3), 7), (Newton(6), 6)):
        calls.clear()
        OptimisedRestorer(solver)(counted, [rough()], [64], PUBLISHED, 0)
        assert calls == [64] * (evaluations + 1)
    every, fourth = (restored(OptimisedRestorer(Adam(every=k))) for k in (1, 4))
    assert knn(every[None], fourth[None], 1)[0].sqrt().mean() < 0.25 * spacing(every).mean()


@pytest.mark.parametrize("solver", [Adam(12), Newton(4)], ids=str)
def test_a_cloud_does_not_depend_on_others_and_follows_the_seed(solver: Solver) -> None:
    restorer, clouds = OptimisedRestorer(solver), [rough(50, 1), rough(300, 2), rough(2, 3)]
    counts = [80, 200, 9]
    together = restorer(sphere(), clouds, counts, PUBLISHED, 5)
    for cloud, count, result in zip(clouds, counts, together, strict=True):
        (alone,) = restorer(sphere(), [cloud], [count], PUBLISHED, 5)
        assert alone.points is not None and result.points is not None
        torch.testing.assert_close(alone.points, result.points, rtol=0, atol=1e-6)
    (other,) = restorer(sphere(), clouds[:1], counts[:1], PUBLISHED, 6)
    assert other.points is not None and together[0].points is not None
    assert (other.points - together[0].points).abs().max() > 1e-3


@pytest.mark.parametrize("solver", [Adam(3), Newton(3)], ids=str)
def test_one_point_and_double_precision(solver: Solver) -> None:
    (result,) = OptimisedRestorer(solver)(sphere(), [rough(1).double()], [1], PUBLISHED, 0)
    assert result.points is not None and result.points.isfinite().all()
    assert result.points.dtype == torch.float64 and not result.points.requires_grad


@pytest.mark.parametrize("solver", [Adam(5), Newton(5)], ids=str)
def test_a_field_without_a_surface_yields_no_points(solver: Solver) -> None:
    def second_is_empty(points: Tensor, cloud: Tensor) -> Tensor:
        return torch.where(cloud == 1, -9 - points.norm(dim=1), sphere()(points, cloud))

    results = OptimisedRestorer(solver)(second_is_empty, [rough(), rough()], [40, 40], PUBLISHED, 0)
    assert [result.points is None for result in results] == [False, True]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Adam(0), "steps, every and rate"),
        (lambda: Adam(every=0), "steps, every and rate"),
        (lambda: Adam(rate=float("nan")), "steps, every and rate"),
        (lambda: Adam(spreading=-1), "the weights not negative"),
        (lambda: Newton(0), "steps, limit and rate"),
        (lambda: Newton(spreads=-1), "spreads not negative"),
        (lambda: Repulsion(0), "neighbours, radius and width"),
        (lambda: Repulsion(width=0), "neighbours, radius and width"),
        (lambda: OptimisedRestorer(noise=-0.1), "noise must not be negative"),
    ],
)
def test_bad_options(make: type, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
