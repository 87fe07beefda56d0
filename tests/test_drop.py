from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from attack_checks import clouds, victim
from torch import Tensor

from attacks.base import Attack, ThreatModel
from attacks.dropping.drop import LocalDrop, RandomDrop
from ifdefense.geometry.points import split_neighbourhood

DROPS: list[Attack] = [RandomDrop(12), LocalDrop(12, 3), LocalDrop(11, 4)]


def positions(cloud: Tensor, left: Tensor) -> list[int]:
    rows = cloud.tolist()
    return [rows.index(point) for point in left.tolist()]


@pytest.mark.parametrize("attack", DROPS, ids=str)
def test_they_drop_exactly_that_many_and_nothing_else_changes(attack: Attack) -> None:
    model, points = victim(), clouds()
    labels, copy = model(points).argmax(1), points.clone()
    result = attack(model, points, labels)
    assert torch.equal(points, copy)
    assert result.points.shape == (6, 40 - attack.threat.count, 3)
    assert result.queries.tolist() == [1] * 6
    assert result.distances["dropped"].tolist() == [attack.threat.count] * 6
    assert torch.equal(result.success, model(result.points).argmax(1) != labels)
    for cloud, left in zip(points, result.points, strict=True):
        order = positions(cloud, left)
        assert order == sorted(set(order))
    assert torch.equal(attack(model, points, labels).points, result.points)
    other = attack(model, points, labels, generator=torch.Generator().manual_seed(9))
    assert not torch.equal(other.points, result.points)
    alone = attack(model, points[3:4], labels[3:4])
    assert torch.equal(alone.points, result.points[3:4])


def test_random_drop_drops_the_same_indices_everywhere_and_every_index_sometimes() -> None:
    model, points = victim(), clouds()
    labels = model(points).argmax(1)
    dropped = torch.zeros(40)
    for seed in range(60):
        left = RandomDrop(10)(model, points, labels, generator=torch.Generator().manual_seed(seed)).points
        order = [positions(cloud, part) for cloud, part in zip(points, left, strict=True)]
        assert all(other == order[0] for other in order)
        dropped += 1
        dropped[order[0]] -= 1
    assert (dropped > 0).all() and abs(float(dropped.mean()) - 15) < 1e-6
    assert dropped.max() <= 30  # 15 expected, 3.4 standard deviation


def test_local_drop_by_hand() -> None:
    points = clouds()[:3]
    seed, num, clusters = 4, 10, 3
    result = LocalDrop(num, clusters)(
        victim(), points, torch.zeros(3, dtype=torch.long), generator=torch.Generator().manual_seed(seed)
    )
    shares = torch.rand(clusters, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    for cloud, left in zip(points.tolist(), result.points.tolist(), strict=True):
        for share, size in zip(shares, (4, 3, 3), strict=True):
            centre = cloud[int(share * len(cloud))]
            nearest = sorted(cloud, key=lambda point, centre=centre: math.dist(point, centre))
            cloud = [point for point in cloud if point not in nearest[:size]]
        assert left == cloud


def test_regions_are_dropped_whole() -> None:
    """One region of a line is an interval."""
    line = torch.zeros(1, 50, 3)
    line[0, :, 0] = torch.linspace(0, 1, 50)
    left = LocalDrop(20, 1)(victim().float(), line, torch.zeros(1, dtype=torch.long)).points
    gone = sorted(set(range(50)) - set(positions(line[0], left[0])))
    assert gone == list(range(gone[0], gone[0] + 20))


def test_a_neighbourhood_is_split_off_in_order() -> None:
    points = clouds()
    centre = torch.tensor([0, 5, 39, 7, 7, 20])
    inside, outside = split_neighbourhood(points, centre, 9)
    for cloud, index, near, far in zip(points, centre, inside, outside, strict=True):
        distance = (cloud - cloud[index]).norm(dim=1)
        order = distance.argsort()
        assert torch.equal(near, cloud[order[:9]])
        assert torch.equal(far, cloud[order[9:].sort().values])


def test_threat_models() -> None:
    assert RandomDrop(7).threat == ThreatModel("score-based", "untargeted", "drop", count=7)
    assert LocalDrop(7).threat == ThreatModel("score-based", "untargeted", "drop", count=7)


def run(attack: Attack, targets: Tensor | None = None) -> object:
    return attack(victim(), clouds(), torch.zeros(6, dtype=torch.long), targets)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RandomDrop(0), "num must be an integer >= 1, got 0"),
        (lambda: LocalDrop(5, 6), "clusters must not exceed num, got 6 and 5"),
        (lambda: LocalDrop(5, 0), "clusters must be an integer >= 1, got 0"),
        (lambda: run(RandomDrop(40)), "cannot drop 40 points from clouds of 40"),
        (lambda: run(LocalDrop(41)), "cannot drop 41 points from clouds of 40"),
        (lambda: run(RandomDrop(4), torch.ones(6, dtype=torch.long)), "RandomDrop is an untargeted attack"),
        (lambda: run(LocalDrop(4), torch.ones(6, dtype=torch.long)), "LocalDrop is an untargeted attack"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
