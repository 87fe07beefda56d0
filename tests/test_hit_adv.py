from __future__ import annotations

import dataclasses

import pytest
import torch
from attack_checks import check, clouds, victim
from torch import Tensor

from attacks.base import ThreatModel
from attacks.functional import distances
from attacks.optimised.hit_adv import HiTADV, deformed
from attacks.oracle import Oracle
from ifdefense.geometry.normals import estimated_normals

SMALL = HiTADV(epsilon=0.4, centres=10, candidates=15, neighbours=6, searches=2, iterations=12)


def test_it_is_a_sound_attack_that_fools_an_easy_victim() -> None:
    assert check(SMALL).success.all()


def test_defaults_are_the_published_ones() -> None:
    attack = HiTADV()
    assert (attack.kappa, attack.centres, attack.candidates, attack.epsilon) == (30, 192, 256, 0.55)
    assert (attack.smallest, attack.largest) == (0.1, 1.2)
    assert (attack.searches, attack.iterations, attack.rate) == (10, 100, 1e-2)
    assert attack.threat == ThreatModel("white-box", "untargeted", "shift", "linf", 0.55)


def test_small_clouds_have_fewer_centres() -> None:
    model, points = victim(), clouds()
    result = dataclasses.replace(SMALL, centres=192, candidates=256)(model, points, model(points).argmax(1))
    assert result.success.all()


def test_the_deformation_is_a_naive_one() -> None:
    generator = torch.Generator().manual_seed(0)
    points, centres, shift = (torch.randn(2, n, 3, generator=generator).double() for n in (7, 4, 4))
    sigma = torch.rand(2, 4, generator=generator).double() + 0.3
    moved = deformed(points, centres, shift, sigma)
    for b in range(2):
        for n in range(7):
            distance = (points[b, n] - centres[b]).norm(dim=1)
            weight = torch.exp(-(distance**2) / (2 * sigma[b] ** 2))
            expected = points[b, n] + (weight[:, None] * shift[b]).sum(0) / weight.sum()
            torch.testing.assert_close(moved[b, n], expected)


def test_equal_shifts_move_the_cloud_as_a_whole_however_far_the_centres_are() -> None:
    points, shift = torch.randn(1, 5, 3), torch.tensor([0.1, -0.2, 0.3])
    far = torch.full((1, 3, 3), 50.0)
    moved = deformed(points, far, shift.expand(1, 3, 3), torch.full((1, 3), 0.1))
    torch.testing.assert_close(moved, points + shift)


def roughness(points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Curvature and its variation, as the score of the attack takes them."""
    curvature = distances.curvature(points, estimated_normals(points, k + 1), k)
    return curvature, distances.spread(points, curvature, k)


def test_a_plane_is_smooth_and_its_edge_is_rough() -> None:
    generator = torch.Generator().manual_seed(1)
    flat = torch.rand(1, 300, 3, dtype=torch.float64, generator=generator) - 0.5
    plane = flat * torch.tensor([1.0, 1.0, 0.0])
    curvature, spread = roughness(plane, 8)
    assert curvature.max() < 1e-6 and spread.max() < 1e-6
    folded = plane.clone()
    folded[..., 2] = plane[..., 0].clamp_min(0)  # a fold at x = 0
    curvature, spread = roughness(folded, 8)
    at_fold, away = folded[0, :, 0].abs() < 0.03, folded[0, :, 0].abs() > 0.3
    assert curvature[0, at_fold].mean() > 100 * curvature[0, away].mean()
    assert spread[0, at_fold].mean() > 100 * spread[0, away].mean()


def test_centres_lie_where_the_surface_is_rough() -> None:
    plane = torch.rand(1, 300, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 0.5
    plane[..., 2] = plane[..., 0].clamp_min(0)
    seen: list[Tensor] = []

    class Spy(HiTADV):
        def _centres(self, oracle: Oracle, points: Tensor) -> tuple[Tensor, Tensor]:
            centres, curvature = super()._centres(oracle, points)
            seen.append(centres)
            return centres, curvature

    Spy(centres=8, candidates=40, neighbours=8, searches=1, iterations=1)(victim(), plane, torch.tensor([0]))
    assert (seen[0][..., 0].abs() < 0.2).all()


def test_an_example_that_fails_keeps_its_last_iterate() -> None:
    def never(points: Tensor) -> Tensor:
        drift = points.sum((1, 2))
        return torch.stack([drift * 0 + 1e4, drift], 1)

    result = SMALL(never, clouds()[:2], torch.zeros(2, dtype=torch.long))
    assert not result.success.any()
    assert (result.distances["linf"] > 0.1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": -1.0}, "epsilon must be a finite number >= 0"),
        ({"rate": 0.0}, "rate must be a finite number > 0"),
        ({"centres": 300}, "centres must not exceed candidates, got 300 and 256"),
        ({"smallest": 2.0}, "smallest must not exceed largest, got 2.0 and 1.2"),
        ({"first_weight": 90.0}, "first_weight must not exceed largest_weight, got 90.0 and 80.0"),
        ({"searches": 0}, "searches must be an integer >= 1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HiTADV(**settings)


def test_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="HiTADV is an untargeted attack"):
        SMALL(victim(), clouds(), torch.zeros(6, dtype=torch.long), torch.ones(6, dtype=torch.long))
