from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from attack_checks import CLASSES, clouds, victim
from torch import Tensor

from attacks.base import ThreatModel
from attacks.functional import distances
from attacks.optimised.geoa3 import GeoA3
from ifdefense.geometry.normals import estimated_normals
from ifdefense.geometry.points import chamfer_distance

QUICK = GeoA3(k=6, searches=2, iterations=20, first_weight=0.1, rate=0.05)
ZERO = torch.zeros(2, dtype=torch.long)


class Linear:
    """Two classes; the logits differ by ``slope (<mean, normal> - 5)``."""

    normal = torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)

    def __init__(self, slope: float) -> None:
        self.slope = slope

    def __call__(self, points: Tensor) -> Tensor:
        gap = self.slope * (points.mean(1) @ self.normal - 5)
        return torch.stack([-gap, gap], 1) / 2


def grids() -> Tensor:
    """Two clouds of 27 points that are far apart, their mean near (1, 1, 1)."""
    points = torch.cartesian_prod(*[torch.arange(3.0)] * 3).double().repeat(2, 1, 1)
    return points + 0.1 * torch.randn(points.shape, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("loss", ["hinge", "cross-entropy"])
def test_geoa3_comes_within_105_percent_of_the_optimum(
    loss: Literal["hinge", "cross-entropy"], targeted: bool
) -> None:
    """Moving a cloud as a whole does not bend it, and of all shifts with its mean it has the least distance.

    With points far enough apart for each to stay nearest to itself, a shift of mean t has a two-sided Chamfer
    distance of at least ``2 |t|^2`` and a Hausdorff distance of at least ``|t|^2``.
    """
    model, points = Linear(slope=1), grids()
    move = (5 - points.mean(1) @ model.normal) / model.normal.norm()
    # The cross-entropy is 1.6 to 2 times as steep on the boundary as the distance.
    weights = {"first_weight": 1.6, "largest_weight": 2.0}
    attack = GeoA3(**weights, k=6, searches=3, iterations=90, rate=5e-3, misclassification=loss, noise=1e-5)
    result = attack(model, points, ZERO, ZERO + 1 if targeted else None)
    assert result.success.all()
    size = chamfer_distance(result.points, points) + 0.1 * distances.directed_hausdorff(result.points, points)
    size = size + distances.curvature_difference(result.points, points, estimated_normals(points), k=6)
    assert (size >= 2.1 * move**2 * (1 - 1e-9)).all()
    assert (size <= 2.1 * (1.05 * move) ** 2).all()


def test_the_distance_is_the_sum_of_its_parts() -> None:
    points, moved = clouds(), clouds() + 0.05 * clouds().roll(1, 1)
    space = QUICK.space(None, points, torch.Generator())  # type: ignore[arg-type]
    normals = estimated_normals(points)
    expected = (
        chamfer_distance(moved, points)
        + 0.1 * distances.directed_hausdorff(moved, points)
        + distances.curvature_difference(moved, points, normals, k=6)
    )
    torch.testing.assert_close(space.distance([], moved, slice(None)), expected)
    # Normals may be given, of either sign.
    given = GeoA3(**{**vars(QUICK), "normals": -normals}).space(None, points, torch.Generator())  # type: ignore[arg-type]
    torch.testing.assert_close(given.distance([], moved, slice(None)), expected)


@pytest.mark.parametrize("targeted", [True, False])
def test_geoa3_succeeds_is_repeatable_and_knows_no_batch(targeted: bool) -> None:
    model, points = victim(), clouds()
    labels = model(points).argmax(1)
    targets = (labels + 1) % CLASSES if targeted else None
    copy = points.clone()
    result = QUICK(model, points, labels, targets)
    assert torch.equal(points, copy)
    assert result.success.all()
    predicted = model(result.points).argmax(1)
    assert (predicted == targets if targets is not None else predicted != labels).all()
    assert result.queries.tolist() == [41] * 6 and result.iterations.tolist() == [40] * 6
    assert torch.equal(QUICK(model, points, labels, targets).points, result.points)
    alone = QUICK(model, points[2:3], labels[2:3], None if targets is None else targets[2:3])
    torch.testing.assert_close(alone.points, result.points[2:3], rtol=0, atol=1e-6)
    assert torch.equal(alone.success, result.success[2:3])


def test_less_curvature_is_changed_where_it_counts_more() -> None:
    model, points = victim(), clouds()
    labels, normals = model(points).argmax(1), estimated_normals(points)
    bent = []
    for weight in (0.0, 100.0):
        attack = GeoA3(**{**vars(QUICK), "curvature_weight": weight, "searches": 1})
        result = attack(model, points, labels)
        bent.append(distances.curvature_difference(result.points, points, normals, k=6).mean())
    assert bent[1] < bent[0]


def test_coincident_points_and_single_precision_are_no_error() -> None:
    points = clouds().float()
    points[:, 20:] = points[:, :20]
    points[0] = points[0, :1]
    result = GeoA3(**{**vars(QUICK), "noise": 0.0})(
        victim().float(), points, torch.zeros(6, dtype=torch.long)
    )
    assert result.points.dtype == torch.float32 and result.points.isfinite().all()


def test_defaults_are_the_published_ones() -> None:
    attack = GeoA3()
    assert (attack.first_weight, attack.searches, attack.iterations, attack.rate) == (10, 10, 500, 1e-2)
    assert (attack.hausdorff_weight, attack.curvature_weight, attack.k) == (0.1, 1, 16)
    assert (attack.misclassification, attack.noise, attack.kappa) == ("cross-entropy", 1e-3, 0)
    assert math.isinf(attack.largest_weight)
    assert attack.threat == ThreatModel("white-box", "both", "shift")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GeoA3(misclassification="dlr"), "unknown misclassification 'dlr'; there are: cross-entropy"),
        (lambda: GeoA3(curvature_weight=-1), "curvature_weight must be a finite number >= 0, got -1"),
        (lambda: GeoA3(iterations=0), "iterations must be an integer >= 1"),
        (lambda: GeoA3(normals=torch.zeros(1, 5, 3))(Linear(1), grids(), ZERO), "do not fit clouds of shape"),
        (lambda: GeoA3()(Linear(1), grids()[:, :16], ZERO), "k must lie in 1..16"),
    ],
)
def test_bad_settings_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
