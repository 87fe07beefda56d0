from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from attack_checks import CLASSES, clouds, victim
from torch import Tensor

from attacks.adding.cluster import AddCluster
from attacks.adding.critical import critical_points, dbscan, draw_members, seed_clusters
from attacks.adding.object import AddObject
from attacks.adding.points import AddCD, AddHD
from attacks.base import Attack, AttackResult, ThreatModel
from attacks.functional import distances
from attacks.oracle import Oracle
from ifdefense.geometry.points import directed_chamfer

QUICK: dict[str, object] = {"searches": 2, "iterations": 20, "first_weight": 0.01, "rate": 0.05}
SMALL: dict[str, Attack] = {
    "cd": AddCD(num=50, **QUICK),
    "hd": AddHD(num=50, **QUICK),
    "cluster": AddCluster(size=12, **QUICK),
    "object": AddObject(size=12, scale=0.6, **QUICK),
}


class Linear:
    """Two classes; the logits differ by the mean height of the points minus a threshold, times a slope.

    Of M points added to N at height 0 each has to be at least at the height ``(N + M) / M * threshold`` on
    average. A point at height h is at least as far from the cloud, so by convexity that height, squared, is
    the smallest Chamfer distance, and the smallest Hausdorff distance; both are reached straight above.
    """

    def __init__(self, threshold: float, slope: float = 60.0) -> None:
        self.threshold, self.slope = threshold, slope

    def __call__(self, points: Tensor) -> Tensor:
        gap = self.slope * (points[..., 2].mean(1) - self.threshold)
        return torch.stack([-gap, gap], 1) / 2

    def height(self, clean: int, added: int) -> float:
        return (clean + added) / added * self.threshold


def flat(batch: int = 2, size: int = 24) -> Tensor:
    points = (
        torch.randn(batch, size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 0.5
    )
    return points * torch.tensor([1.0, 1.0, 0.0])


def added(result: AttackResult, clean: Tensor) -> Tensor:
    """The points that were added, after the check that the clean ones stand before them as they were."""
    assert torch.equal(result.points[:, : clean.shape[1]], clean)
    return result.points[:, clean.shape[1] :]


ZERO = torch.zeros(2, dtype=torch.long)

# The optimum of a linear classifier


@pytest.mark.parametrize("attack", [AddCD, AddHD])
@pytest.mark.parametrize("targeted", [True, False])
def test_added_points_come_within_105_percent_of_the_optimum(
    attack: type[AddCD] | type[AddHD], targeted: bool
) -> None:
    model, clean = Linear(0.075), flat()
    optimum = model.height(24, 8)
    add = attack(num=8, first_weight=5, largest_weight=40, searches=4, iterations=60)
    result = add(model, clean, ZERO, ZERO + 1 if targeted else None)
    assert result.success.all()
    size = add.distance(added(result, clean), clean).sqrt()
    assert (size >= optimum * (1 - 1e-9)).all() and (size <= 1.05 * optimum).all()


def test_clusters_contract_and_rise_as_far_as_they_must() -> None:
    model, clean = Linear(0.075), flat()
    attack = AddCluster(size=4, searches=3, iterations=60)
    result = attack(model, clean, ZERO)
    assert result.success.all()
    points = added(result, clean)
    height = points[..., 2].mean(1) / model.height(24, 12)
    assert (height >= 1 - 1e-9).all() and (height <= 1.5).all()  # next to the diameters, height costs little
    first = AddCluster(size=4, searches=1, iterations=1)(model, clean, ZERO)
    before, after = (
        distances.diameter(each.reshape(-1, 4, 3)).unflatten(0, (2, 3)).sum(1)
        for each in (added(first, clean), points)
    )
    assert (after < 0.1 * before).all()


def test_objects_are_turned_about_the_up_axis_and_placed_but_keep_their_shape() -> None:
    shape = torch.randn(10, 3, generator=torch.Generator().manual_seed(3)).double() + 5
    attack = AddObject(num=2, size=10, shape=shape, searches=2, iterations=40, first_weight=20)
    model, clean = Linear(0.05), flat()
    copy = shape.clone()
    result = attack(model, clean, ZERO)
    assert result.success.all() and torch.equal(shape, copy)
    expected = shape - shape.mean(0)
    expected = 0.3 * expected / expected.norm(dim=1).max()
    for found in added(result, clean).reshape(-1, 10, 3):
        # The points of an object come in an order of their own.
        for size in (lambda points: torch.pdist(points), lambda points: points[:, 2] - points[:, 2].mean()):
            torch.testing.assert_close(
                size(found).sort().values, size(expected).sort().values, rtol=0, atol=0.03
            )
        assert (found.mean(0) - clean.flatten(0, 1)).norm(dim=1).min() > 0.1
    assert (torch.cdist(added(result, clean)[0, :10], shape).min() > 1).all()


# What holds for all of them


def run(attack: Attack, points: Tensor, labels: Tensor, targeted: bool, seed: int = 0) -> AttackResult:
    targets = (labels + 1) % CLASSES if targeted else None
    return attack(victim(), points, labels, targets, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_attacks_succeed_are_repeatable_and_know_no_batch(name: str, targeted: bool) -> None:
    model, points = victim(), clouds()
    labels = model(points).argmax(1)
    copies = points.clone(), labels.clone()
    attack = SMALL[name]
    result = run(attack, points, labels, targeted)
    assert torch.equal(points, copies[0]) and torch.equal(labels, copies[1])
    assert added(result, points).shape[1] == attack.threat.count
    assert result.distances["added"].tolist() == [attack.threat.count] * 6
    new = added(result, points)
    torch.testing.assert_close(result.distances["chamfer"], directed_chamfer(new, points))
    torch.testing.assert_close(result.distances["hausdorff"], distances.directed_hausdorff(new, points))
    assert result.iterations.tolist() == [40] * 6
    assert result.queries.tolist() == [1 + 40 + 1] * 6  # critical points, iterations, the last check
    assert result.success.sum() >= 3  # few points only, of a victim that looks at the outermost
    predicted = model(result.points).argmax(1)
    assert torch.equal(result.success, predicted == (labels + 1) % 4 if targeted else predicted != labels)
    assert torch.equal(result.points, run(attack, points, labels, targeted).points)
    assert not torch.equal(result.points, run(attack, points, labels, targeted, seed=1).points)
    alone = run(attack, points[2:3], labels[2:3], targeted)
    torch.testing.assert_close(alone.points, result.points[2:3], rtol=0, atol=1e-6)
    assert torch.equal(alone.success, result.success[2:3])


@pytest.mark.parametrize("name", SMALL)
def test_precision_follows_the_clouds(name: str) -> None:
    points = clouds().float()
    attack = dataclasses.replace(SMALL[name], searches=1, iterations=2)
    result = attack(victim().float(), points, torch.zeros(6, dtype=torch.long))
    assert result.points.dtype == torch.float32
    assert result.points.isfinite().all()


def test_defaults_are_the_published_ones() -> None:
    keys = ("kappa", "first_weight", "largest_weight", "searches", "iterations", "rate", "noise")
    expected: dict[Attack, tuple[float, ...]] = {
        AddCD(): (0, 5e3, 4e4, 10, 500, 1e-2, 1e-7),
        AddHD(): (0, 2e2, 9e2, 10, 500, 1e-2, 1e-7),
        AddCluster(): (0, 5, 30, 5, 500, 1e-2, 1e-7),
        AddObject(): (0, 5, 40, 5, 500, 1e-2, 1e-7),
    }
    for (attack, values), count in zip(expected.items(), (512, 512, 96, 192), strict=True):
        assert tuple(getattr(attack, key) for key in keys) == values
        assert attack.threat == ThreatModel("white-box", "both", "add", count=count)
    for attack, weight in ((AddCluster(), 0.1), (AddObject(), 0.2)):
        assert (attack.chamfer_weight, attack.critical, attack.radius, attack.least) == (weight, 128, 0.2, 3)
    assert AddObject().scale == 0.3


# Where points are added


def test_critical_points_have_the_largest_gradient() -> None:
    """The loss is a weighted sum of squares, so that the gradient grows with the distance from 0."""
    points = torch.randn(2, 9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def model(given: Tensor) -> Tensor:
        score = given.square().sum((1, 2))
        return torch.stack([score, -score], 1) / 100

    for count in (4, 9, 20):
        found = critical_points(Oracle(model, ZERO, ZERO + 1), points, count)
        for cloud, chosen in zip(points, found, strict=True):
            ranking = cloud[cloud.norm(dim=1).argsort(descending=True)]
            assert torch.equal(chosen, ranking.repeat(3, 1)[:count])


def naive_dbscan(points: Tensor, radius: float, least: int) -> list[int]:
    """Grows one cluster after another from its first core point, then hands out the other points."""
    near = [[j for j, q in enumerate(points) if (p - q).norm() <= radius] for p in points]
    core = [len(found) >= least for found in near]
    label = [-1] * len(points)
    for seed in range(len(points)):
        open_ = [seed] if core[seed] and label[seed] < 0 else []
        while open_:
            point = open_.pop()
            if label[point] < 0:
                label[point] = seed
                open_ += [other for other in near[point] if core[other]]
    for point in range(len(points)):
        cores = [other for other in near[point] if core[other]]
        if cores and not core[point]:
            label[point] = label[min(cores, key=lambda other: float((points[other] - points[point]).norm()))]
    return label


@pytest.mark.parametrize(("radius", "least"), [(0.15, 3), (0.3, 3), (0.3, 5), (0.05, 2)])
def test_dbscan_is_that_of_a_loop(radius: float, least: int) -> None:
    points = torch.rand(3, 40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    points = torch.cat([points, torch.zeros(3, 40, 1)], 2)
    points[2, 5:9] = points[2, 5:6]
    labels = dbscan(points, radius, least).tolist()
    assert labels == [naive_dbscan(cloud, radius, least) for cloud in points]


def test_dbscan_follows_a_long_chain_and_keeps_a_gap() -> None:
    line = torch.arange(60).double()
    line[30:] += 1
    points = torch.stack([line, 0 * line, 0 * line], 1)[None]
    assert dbscan(points, 1.0, 2).tolist() == [[0] * 30 + [30] * 30]
    assert dbscan(points, 0.5, 2).tolist() == [[-1] * 60]
    assert dbscan(points.flip(1), 1.0, 2).tolist() == [[0] * 30 + [30] * 30]


def test_seeds_are_the_largest_clusters_and_then_random_neighbourhoods() -> None:
    groups = [
        torch.randn(number, 3) * 0.01 + place for number, place in ((4, 0.0), (7, 2.0), (5, 4.0), (3, 6.0))
    ]
    points = torch.cat([*groups, torch.tensor([[9.0, 9, 9]])])[None].repeat(2, 1, 1)
    points[1] = torch.arange(20.0)[:, None]  # no two points are close
    members = seed_clusters(points, 3, 4, 0.2, 3, torch.Generator().manual_seed(0))
    assert members[0].nonzero()[:, 1].tolist() == [*range(4, 11), *range(11, 16), *range(4)]
    assert members[1].sum(1).tolist() == [4, 4, 4]
    for group in members[1]:
        place = group.nonzero()[:, 0]
        assert place.max() - place.min() <= 6  # four nearest ones, from the end of the row at worst

    members = seed_clusters(points[:1], 6, 2, 0.2, 3, torch.Generator().manual_seed(0))
    assert members[0].sum(1).tolist() == [7, 5, 4, 3, 2, 2]
    assert not members[0, :, 19].any()  # belongs to no cluster, and others do

    drawn = draw_members(members, 6, torch.Generator().manual_seed(0))[0]
    for group, index in zip(members[0], drawn, strict=True):
        assert group[index].all()
        counts = index.bincount(minlength=20)[group]
        assert counts.max() - counts.min() <= 1  # as evenly as can be


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AddCD(num=0), "num must be an integer >= 1, got 0"),
        (lambda: AddHD(searches=0), "searches must be an integer >= 1"),
        (lambda: AddHD(first_weight=1e9), "first_weight must not exceed largest_weight"),
        (lambda: AddCluster(size=0), "size must be an integer >= 1"),
        (lambda: AddCluster(num=200), "critical must be at least num, got 128 and 200"),
        (lambda: AddObject(num=0), "num must be an integer >= 1"),
        (lambda: AddObject(shape=torch.zeros(9, 3)), r"shape must be \(M, 3\) with at least 64 points, got"),
        (lambda: AddCluster()(Linear(1.0), flat(size=2), ZERO), "cannot start 3 groups from 2 points"),
    ],
)
def test_bad_settings_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
