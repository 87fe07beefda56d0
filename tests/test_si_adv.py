from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from attack_checks import check, linear_case
from torch import Tensor

from attacks.base import ThreatModel
from attacks.gradient.si_adv import SIAdv
from ifdefense.geometry.normals import estimated_normals


@pytest.mark.parametrize("targeted", [False, True])
def test_it_is_a_sound_attack_that_fools_an_easy_victim(targeted: bool) -> None:
    result = check(SIAdv(epsilon=0.6, step=0.02, iterations=25, neighbours=8), targeted)
    assert result.success.all()


def test_defaults_are_the_published_ones() -> None:
    attack = SIAdv()
    assert (attack.epsilon, attack.iterations, attack.step, attack.kappa) == (0.16, 50, 0.007, 0)
    assert attack.threat == ThreatModel("white-box", "both", "shift", "point-l2", 0.16)


def test_the_budget_is_that_of_points_or_as_published_of_coordinates() -> None:
    settings = {"epsilon": 0.05, "step": 0.02, "iterations": 25, "neighbours": 8}
    published = SIAdv(**settings, norm="linf")
    assert published.threat == ThreatModel("white-box", "both", "shift", "linf", 0.05)
    sizes = check(published).distances
    assert sizes["point-l2"].max() > 0.06 and sizes["linf"].max() <= 0.05 * (1 + 1e-6)
    assert check(SIAdv(**settings)).distances["point-l2"].max() <= 0.05 * (1 + 1e-6)


def plane(count: int) -> Tensor:
    """Points in the plane z = 0."""
    points = torch.rand(1, count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5
    return points * torch.tensor([1.0, 1.0, 0.0])


def test_points_of_a_plane_stay_in_it_and_take_one_step_of_the_stated_length() -> None:
    model, _, labels, normal = linear_case()
    points = plane(60)
    moved = SIAdv(iterations=1)(model, points, labels[:1]).points - points
    assert moved[..., 2].abs().max() < 1e-9
    along = torch.stack([normal[0], normal[1], normal[2] * 0])
    # Every point has the same share of the step 0.007 sqrt(3 N).
    torch.testing.assert_close(moved[0], (0.007 * math.sqrt(3) * along / along.norm()).expand(60, -1))


def test_an_example_that_has_reached_its_goal_stays() -> None:
    model, _, labels, _ = linear_case()
    points = plane(60)
    attack = SIAdv(iterations=50)
    few, many = attack(model, points, labels[:1]), SIAdv(iterations=60)(model, points, labels[:1])
    assert few.success.all()
    assert torch.equal(few.points, many.points)


def test_normals_are_those_of_the_surface() -> None:
    assert estimated_normals(plane(40), 9)[..., 2].abs().min() > 1 - 1e-9
    sphere = torch.randn(2, 1500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sphere = sphere / sphere.norm(dim=2, keepdim=True)
    assert (estimated_normals(sphere) * sphere).sum(2).abs().mean() > 0.99


def test_normals_are_those_of_a_naive_decomposition() -> None:
    points = torch.randn(2, 25, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    normals = estimated_normals(points, 6).numpy()
    for cloud, found in zip(points.numpy(), normals, strict=True):
        for point, normal in zip(cloud, found, strict=True):
            near = cloud[np.argsort(np.linalg.norm(cloud - point, axis=1))[:6]]
            direction = np.linalg.svd(near - near.mean(0))[2][2]
            assert abs(direction @ normal) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": -1.0}, "epsilon must be a finite number >= 0"),
        ({"step": -1.0}, "step must be a finite number >= 0"),
        ({"kappa": -1.0}, "kappa must be a finite number >= 0"),
        ({"iterations": 0}, "iterations must be an integer >= 1"),
        ({"neighbours": 2}, "neighbours must be an integer >= 3, got 2"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SIAdv(**settings)
