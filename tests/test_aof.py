from __future__ import annotations

import dataclasses

import pytest
import torch
from attack_checks import check, clouds, linear_case, victim
from torch import Tensor

from attacks.base import ThreatModel
from attacks.optimised.aof import AOF, graph_laplacian, low_frequencies

SMALL = AOF(epsilon=0.5, neighbours=6, frequencies=12, iterations=20, rate=0.03)


@pytest.mark.parametrize("targeted", [False, True])
def test_it_is_a_sound_attack_that_fools_an_easy_victim(targeted: bool) -> None:
    result = check(SMALL, targeted)
    assert result.success.all()


def test_defaults_are_the_published_ones() -> None:
    attack = AOF()
    assert (attack.epsilon, attack.kappa, attack.gamma, attack.neighbours) == (0.18, 30, 0.25, 30)
    assert (attack.frequencies, attack.restarts, attack.iterations, attack.rate) == (100, 2, 200, 1e-2)
    assert attack.threat == ThreatModel("white-box", "both", "shift", "point-l2", 0.18)


def test_the_laplacian_is_a_naive_one() -> None:
    points = clouds()[:2, :15]
    laplacian = graph_laplacian(points, 4)
    for cloud, found in zip(points, laplacian, strict=True):
        distance = torch.cdist(cloud, cloud)
        near = [set(row.argsort()[:4].tolist()) for row in distance]
        for i in range(15):
            for j in range(15):
                if i != j:
                    joined = i in near[j] or j in near[i]
                    expected = -torch.exp(-(distance[i, j] ** 2)).item() if joined else 0.0
                    assert found[i, j].item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(laplacian.sum(2), torch.zeros(2, 15, dtype=torch.float64))


def test_the_lowest_frequency_of_a_connected_cloud_is_constant() -> None:
    basis = low_frequencies(clouds().float(), 12, 5)
    assert basis.shape == (6, 40, 5) and basis.dtype == torch.float32
    torch.testing.assert_close(basis.mT @ basis, torch.eye(5).expand(6, -1, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(basis[..., 0].abs(), torch.full((6, 40), 40**-0.5), atol=1e-5, rtol=0)


def test_low_frequencies_are_what_changes() -> None:
    model, points = victim(), clouds()
    labels, basis = model(points).argmax(1), low_frequencies(clouds(), 6, 12)

    def share(attack: AOF) -> float:
        shift = attack(model, points, labels).points - points
        return float(((basis.mT @ shift).flatten(1).norm(dim=1) / shift.flatten(1).norm(dim=1)).mean())

    # Adam's steps are elementwise and leave the low frequencies, so it is a tendency only.
    assert share(SMALL) > share(dataclasses.replace(SMALL, frequencies=40)) + 0.03


def test_the_linear_optimum_is_reached_by_a_uniform_shift() -> None:
    """A uniform shift has no frequency but the lowest, so nothing of it is lost."""
    model, points, labels, normal = linear_case()
    result = AOF(neighbours=20, frequencies=1, restarts=1, iterations=60)(model, points, labels)
    assert result.success.all()
    shift = result.points - points
    torch.testing.assert_close(shift, shift.mean(1, keepdim=True).expand_as(shift), rtol=0, atol=1e-5)
    assert (result.distances["point-l2"] < 0.105).all()  # six steps of Adam; the optimum is 0.089
    assert (result.distances["point-l2"] > 1 / normal.norm()).all()


def test_a_success_is_kept_even_if_the_low_frequencies_never_succeed_alone() -> None:
    def model(points: Tensor) -> Tensor:
        """Class 1 once the first point has moved out; never for a cloud of one frequency, a single spot."""
        spot = (points - points.mean(1, keepdim=True)).abs().amax((1, 2)) < 1e-3
        gap = torch.where(spot, -1 + 0 * points[:, 0, 0], points[:, 0, 0] - 0.1)
        return torch.stack([-gap, gap], 1)

    points = clouds()[:1] * 0.05
    points[:, 0] = 0
    result = AOF(neighbours=20, frequencies=1, restarts=1, iterations=40)(model, points, torch.tensor([0]))
    assert result.success.all()
    assert result.distances["linf"].item() == pytest.approx(0.1, abs=0.02)  # the nearest, not the last


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": -1.0}, "epsilon must be a finite number >= 0"),
        ({"kappa": -1.0}, "kappa must be a finite number >= 0"),
        ({"rate": 0.0}, "rate must be a finite number > 0"),
        ({"gamma": 1.5}, r"gamma must be a number in \[0, 1\], got 1.5"),
        ({"frequencies": 0}, "frequencies must be an integer >= 1"),
        ({"iterations": 0}, "iterations must be an integer >= 1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AOF(**settings)
