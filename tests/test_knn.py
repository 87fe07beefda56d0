from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attack_checks import check, clouds, victim
from torch import Tensor

from attacks.base import ThreatModel
from attacks.functional import distances
from attacks.optimised.knn import KNN, outside
from ifdefense.geometry.normals import outward_normals

QUICK = KNN(kappa=1.0, epsilon=0.5, chamfer_weight=1e-3, knn_weight=1e-3, iterations=20, rate=0.02)
NORMAL = torch.tensor([9.0, -3.0, 6.0], dtype=torch.float64)
ONE = torch.zeros(1, dtype=torch.long)


def linear(points: Tensor) -> Tensor:
    gap = points.mean(1) @ NORMAL - 1
    return torch.stack([-gap, gap], 1) / 2


def grid() -> Tensor:
    """27 points far apart, around the origin."""
    return torch.cartesian_prod(*[torch.arange(-1.0, 2)] * 3).double()[None]


@pytest.mark.parametrize("targeted", [True, False])
def test_knn_holds_what_every_attack_holds(targeted: bool) -> None:
    result = check(QUICK, targeted)
    assert result.success.all()
    assert result.iterations.tolist() == [20] * 6 and result.queries.tolist() == [21] * 6


@pytest.mark.parametrize("normals", [None, "outwards"])
def test_no_point_moves_inwards(normals: str | None) -> None:
    points = clouds()
    given = None if normals is None else points.clone()  # of a unit sphere
    attack = KNN(**{**vars(QUICK), "normals": given, "project": None if given is not None else True})
    result = attack(victim(), points, victim()(points).argmax(1))
    along = outward_normals(points) if given is None else given
    depth = ((result.points - points) * along).sum(2)
    assert depth.min() > -1e-12
    assert (depth.abs() < 1e-12).any() and (depth > 1e-3).any()
    free = KNN(**{**vars(QUICK), "project": False})(victim(), points, victim()(points).argmax(1))
    assert (((free.points - points) * along).sum(2) < -1e-3).any()


@pytest.mark.parametrize(
    ("normal", "left"),
    [
        ([0.8, 0.0, 0.6], [1.0, 1, 1]),  # the shift leads outwards, and all of it is left
        ([1.0, 3, 0], [1.0, 1, 1]),  # along the surface
        ([-1.0, 0, 0], [0.0, 1, 1]),  # inwards: what is along the surface is left
        ([0.0, 0, -1], [1.0, 1, 0]),
    ],
)
def test_the_shift_on_a_linear_classifier_is_known(normal: list[float], left: list[float]) -> None:
    """While the hinge is active and no point is an outlier, ``-<w, d> / N + 5 |d|^2`` is smallest.

    That is at ``d = w / (10 N)``. Adam goes its own way in every coordinate, so the projection of that is the
    answer where a coordinate is all that the projection takes.
    """
    points = grid()
    normals = torch.nn.functional.normalize(torch.tensor(normal).double(), dim=0).expand_as(points)
    attack = KNN(alpha=100.0, iterations=150, rate=2e-3, normals=normals)
    result = attack(linear, points, ONE)
    expected = NORMAL / (10 * 27) * torch.tensor(left)
    shift = result.points - points
    torch.testing.assert_close(shift, expected.expand_as(shift), rtol=0, atol=1e-3)


def test_without_normals_nothing_is_projected_by_default() -> None:
    points = clouds()
    labels = victim()(points).argmax(1)
    by_default = QUICK(victim(), points, labels)
    free, kept = (
        KNN(**{**vars(QUICK), "normals": points, "project": project})(victim(), points, labels)
        for project in (False, None)
    )
    assert torch.equal(by_default.points, free.points) and not torch.equal(kept.points, free.points)


def test_points_are_kept_within_the_budget_and_use_it() -> None:
    result = KNN(epsilon=0.01, chamfer_weight=0.1, iterations=30, project=False)(linear, grid(), ONE)
    assert float(result.distances["point-l2"]) == pytest.approx(0.01)


def test_outliers_are_drawn_in() -> None:
    """With nothing else to gain, the point that stands off moves towards the others."""
    points = torch.cat([grid()[:, :26] / 10, torch.tensor([[[0.4, 0.4, 0.4]]]).double()], 1)
    attack = KNN(kappa=0.0, chamfer_weight=0.0, iterations=40, project=False)
    result = attack(linear, points, ONE + 1 - linear(points).argmax(1))
    assert distances.knn_smoothness(result.points) < 0.9 * distances.knn_smoothness(points)
    assert (result.points[0, 26] < 0.38).all()


def test_a_shift_keeps_its_tangential_part_only_if_it_leads_inwards() -> None:
    up = torch.tensor([0.0, 0.0, 1.0]).expand(1, 3, 3)
    shift = torch.tensor([[[1.0, 2.0, -3.0], [1.0, 2.0, 3.0], [0.0, 0.0, -1.0]]])
    assert outside(shift, up).tolist() == [[[1, 2, 0], [1, 2, 3], [0, 0, 0]]]
    assert outside(shift, -up).tolist() == [[[1, 2, -3], [1, 2, 0], [0, 0, -1]]]
    slanted = torch.tensor([0.6, 0.0, 0.8]).expand(1, 3, 3)
    left = outside(shift, slanted)
    torch.testing.assert_close(left[0, 0], torch.tensor([1 + 0.6 * 1.8, 2.0, -3 + 0.8 * 1.8]))
    torch.testing.assert_close((left * slanted).sum(2), torch.tensor([[0.0, 3.0, 0.0]]))


def test_normals_of_a_sphere_point_outwards() -> None:
    sphere = torch.randn(2, 800, 3, generator=torch.Generator().manual_seed(0))
    sphere = sphere / sphere.norm(dim=2, keepdim=True)
    normals = outward_normals(sphere * 0.3 + 7)
    assert normals.norm(dim=2).sub(1).abs().max() < 1e-5
    assert (normals * sphere).sum(2).min() > 0.9


def test_defaults_are_the_published_ones() -> None:
    attack = KNN()
    assert (attack.kappa, attack.chamfer_weight, attack.knn_weight, attack.k, attack.alpha) == (
        15,
        5,
        3,
        5,
        1.05,
    )
    assert (attack.iterations, attack.rate, attack.noise, attack.project) == (2500, 1e-3, 1e-7, None)
    assert attack.threat == ThreatModel("white-box", "both", "shift", "point-l2", 0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KNN(iterations=0), "KNN: iterations must be an integer >= 1, got 0"),
        (lambda: KNN(epsilon=-0.1), "KNN: epsilon must be a finite number >= 0, got -0.1"),
        (lambda: KNN(rate=0), "KNN: rate must be a finite number > 0, got 0"),
        (lambda: KNN(normals=torch.zeros(1, 5, 3))(linear, grid(), ONE), r"\(1, 5, 3\) do not fit clouds of"),
    ],
)
def test_bad_settings_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
