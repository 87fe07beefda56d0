"""Normalisation to the unit cube and back."""

from __future__ import annotations

import pytest
import torch

from ifdefense.geometry.frame import Frame, to_unit_sphere


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_round_trip_is_exact_to_float_rounding(scale: float, shift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    points = (torch.rand(200, 3, dtype=torch.float64, generator=generator) * scale) + shift
    frame = Frame.of(points)
    cube = frame.to_cube(points)
    # The centre itself is a float64 in the caller's frame, rounded to half a unit in its last place.
    assert cube.abs().max() == pytest.approx(0.5, abs=1e-6 + shift * 2**-52 / float(frame.extent))
    error = (frame.from_cube(cube, torch.float64) - points).abs().max()
    assert error <= float(frame.extent) * 1e-7 + shift * 1e-15


def test_an_asymmetric_cloud_stays_inside_unclamped() -> None:
    points = torch.cat([torch.rand(500, 3) * 0.1, torch.tensor([[5.0, 0.0, 0.0]])])
    cube = Frame.of(points).to_cube(points)
    assert cube.abs().max() <= 0.5
    assert len(torch.unique(cube, dim=0)) == len(torch.unique(points, dim=0))
    assert torch.allclose(cube.amin(0) + cube.amax(0), torch.zeros(3), atol=1e-6)


def test_a_plane_keeps_its_scale() -> None:
    points = torch.rand(50, 3) * torch.tensor([2.0, 1.0, 0.0])
    frame = Frame.of(points)
    assert frame.to_cube(points)[:, 2].abs().max() == 0


def test_no_extent_is_an_error() -> None:
    with pytest.raises(ValueError, match="zero extent"):
        Frame.of(torch.ones(20, 3))


def test_unit_sphere() -> None:
    clouds = torch.rand(3, 50, 3) * torch.tensor([1.0, 5.0, 100.0])[:, None, None] + 7
    sphere = to_unit_sphere(clouds)
    torch.testing.assert_close(sphere.mean(1), torch.zeros(3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(sphere.norm(dim=-1).amax(1), torch.ones(3))
