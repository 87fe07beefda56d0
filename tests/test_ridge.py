"""Samples moved to the middle of a shell: accuracy, what is left out, and gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from surface_checks import Sphere, clouds, slopes_of_the_radius, spheres
from torch import Tensor

import ifdefense
from ifdefense import purify
from ifdefense.implicit.base import Calibration, Field
from ifdefense.purifiers.surface import SurfacePurifier
from ifdefense.restorers import ridge
from ifdefense.restorers.mesh import MeshRestorer
from ifdefense.restorers.ridge import RidgeRestorer, chosen
from ifdefense.stages.extraction import Extraction

CALIBRATION = Calibration(threshold=0.5, offset=0.015)
MESH = MeshRestorer(Extraction(64, 16), None)
RIDGE = RidgeRestorer(MESH)


class Shell:
    """A shell about a sphere around the mean of a cloud, whose radius is 0.6 times the points' mean distance.

    The logit falls with the square of the distance from the sphere, from ``height`` to 0 at 0.015.
    """

    calibration = CALIBRATION
    height = 3.0

    def encode(self, clouds: Sequence[Tensor], seed: int = 0) -> list[Sphere]:
        return spheres(clouds)

    def field(self, code: list[Sphere]) -> Field:
        centres, radii = torch.stack([m for m, _ in code]), torch.stack([r for _, r in code])

        def logits(points: Tensor, cloud: Tensor) -> Tensor:
            distance = (points - centres[cloud]).norm(dim=1) - radii[cloud]
            height: Tensor = self.height * (1 - (distance / 0.015).square())
            return height

        return logits


def test_points_land_on_the_sphere_in_the_middle() -> None:
    given, network = clouds(), Shell()
    code = network.encode(given)
    restored = RIDGE(network.field(code), given, [200, 80], CALIBRATION, 0)
    for (centre, radius), each, count in zip(code, restored, (200, 80), strict=True):
        assert each.points is not None and each.points.shape == (count, 3)
        assert ((each.points - centre).norm(dim=1) - radius).abs().max() < 1e-3
        assert each.mesh is not None and not each.mesh.is_empty


def test_a_cloud_does_not_depend_on_the_others_and_a_seed_draws_again() -> None:
    given, network = clouds(), Shell()
    both = RIDGE(network.field(network.encode(given)), given, [50, 50], CALIBRATION, 3)
    alone = RIDGE(network.field(network.encode(given[1:])), given[1:], [50], CALIBRATION, 3)
    other = RIDGE(network.field(network.encode(given[1:])), given[1:], [50], CALIBRATION, 4)
    assert both[1].points is not None and alone[0].points is not None and other[0].points is not None
    torch.testing.assert_close(both[1].points, alone[0].points, rtol=0, atol=1e-6)
    assert (alone[0].points - other[0].points).abs().max() > 0.01


def two_plates(points: Tensor, cloud: Tensor) -> Tensor:
    """A sure plate at z = -0.2 and a hesitant one at z = 0.2, both 0.03 thick and ending within the box."""
    heights = torch.stack([2 * (1 - ((points[:, 2] - z) / 0.015).square()) for z in (-0.2, 0.2)])
    surest = torch.maximum(heights[0], 0.1 * heights[1])
    return torch.where(points[:, :2].abs().amax(1) < 0.3, surest, -1)


def test_the_network_must_be_sure() -> None:
    cloud = [torch.zeros(10, 3)]
    heights = {}
    for margin in (0.0, 0.5):
        restorer = RidgeRestorer(MESH, margin=margin, oversample=3)
        (restored,) = restorer(two_plates, cloud, [300], CALIBRATION, 0)
        assert restored.points is not None and len(restored.points) == 300
        heights[margin] = restored.points[:, 2]
    assert 0.3 < (heights[0.0] > 0).double().mean() < 0.7
    assert (heights[0.5] < 0).all()
    assert (heights[0.5] + 0.2).abs().max() < 0.01  # the edges of the plate are less accurate


def test_the_surest_are_taken_where_too_few_are_sure() -> None:
    peak = torch.tensor([0.1, 0.9, 0.2, 0.7, 0.3])
    assert chosen(peak, 2, 0.5).tolist() == [1, 3]
    assert chosen(peak, 1, 0.5).tolist() == [1]
    assert chosen(peak, 4, 0.5).tolist() == [1, 2, 3, 4]


def test_gradients_are_passed_where_they_are_wanted_and_change_no_point() -> None:
    given, purifier = clouds(), SurfacePurifier(Shell(), RIDGE)
    expected = purifier(given, 90, 1)
    assert not any(points.requires_grad for points in expected)
    wanted = [cloud.clone().requires_grad_() for cloud in given]
    for function in (purifier, partial(purify, method=purifier)):
        results = function(wanted, num_points=90, seed=1)
        assert all(torch.equal(*each) for each in zip(results, expected, strict=True))
        gradients = torch.autograd.grad(torch.cat(results).square().sum(), wanted)
        assert all(gradient.any() for gradient in gradients)
    with torch.no_grad():
        assert not any(points.requires_grad for points in purifier(wanted, 90, 1))


def test_the_field_is_not_evaluated_again_where_no_gradient_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[bool] = []
    field_of = Shell.field

    def counted(self: Shell, code: list[Sphere]) -> Field:
        field = field_of(self, code)

        def logits(points: Tensor, cloud: Tensor) -> Tensor:
            calls.append(torch.is_grad_enabled())
            return field(points, cloud)

        return logits

    monkeypatch.setattr(Shell, "field", counted)
    purifier, cloud = SurfacePurifier(Shell(), RIDGE), clouds()[0]
    purifier(cloud, 90, 1)
    without = len(calls)
    assert without and not any(calls)
    purifier(cloud.requires_grad_(), 90, 1)
    assert sum(calls) == 1 and len(calls) == 2 * without + 1


def test_gradients_are_those_of_the_surface() -> None:
    purifier = SurfacePurifier(Shell(), RIDGE)
    exact, numeric = slopes_of_the_radius(purifier)
    assert exact == pytest.approx(numeric, rel=0.05)


def test_no_surface_is_said() -> None:
    restored = RIDGE(lambda p, c: -1 - p.norm(dim=1), clouds(), [10, 10], CALIBRATION, 0)
    assert [each.points for each in restored] == [None, None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2}, "steps must be at least 3"),
        ({"depth": 0.0}, "depth positive"),
        ({"oversample": 0.9}, "oversample at least 1"),
        ({"margin": float("nan")}, "margin must be finite"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RidgeRestorer(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("margin", "share"), [(0.25, 0.8), (2.8, 1.0), (3.3, 1.0)])
@torch.no_grad()
def test_samples_are_evaluated_as_needed_and_taken_as_if_all_had_been(
    margin: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, network = clouds(), Shell()
    shells = network.field(network.encode(given))
    asked: list[int] = []

    def field(points: Tensor, cloud: Tensor) -> Tensor:
        asked.append(len(points))
        return shells(points, cloud) * (1 + (40 * points[:, 0]).sin() / 6)  # peaks of 2.5 to 3.5

    def restored() -> tuple[list[Tensor], int]:
        asked.clear()
        results = dataclasses.replace(RIDGE, margin=margin)(field, given, [200, 80], CALIBRATION, 0)
        return [part.points for part in results if part.points is not None], sum(asked)

    points, few = restored()
    monkeypatch.setattr(ridge, "_SPARE", 1.5)
    expected, all_of_them = restored()
    for part, other in zip(points, expected, strict=True):
        torch.testing.assert_close(part, other, rtol=0, atol=1e-6)
    mesh = dataclasses.replace(RIDGE.mesh)
    asked.clear()
    mesh.surfaces(field, given, CALIBRATION)
    queries, most = few - sum(asked), all_of_them - sum(asked)
    assert most == 3 * (300 + 120)  # of four steps, one of the ends is not needed
    assert queries <= share * most


def test_sheets_between_the_planes_of_a_grid_are_kept() -> None:
    # To the shipped network a sheet is 0.03 thick, so a coarse grid has both sides between its planes.
    generator = torch.Generator().manual_seed(0)
    purifier = ifdefense.load("local-mesh")
    for gap in (0.1, 0.16, 0.24):
        sheets = torch.rand(1024, 3, generator=generator) * torch.tensor([1, 0.5, 0])
        sheets[::2, 2] = gap
        (trace,) = purifier.trace(sheets, 1024, 0)
        assert trace.mesh.area > 1.7  # two sheets of 0.5, each with two sides
        near = torch.cdist(sheets, torch.from_numpy(trace.purified)).amin(1)
        assert near.quantile(0.95) < 0.06
