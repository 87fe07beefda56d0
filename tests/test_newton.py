"""Projection onto the level set: accuracy, distance from the mesh, and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from surface_checks import Sphere, clouds, slopes_of_the_radius, spheres
from torch import Tensor

from ifdefense.geometry.points import knn
from ifdefense.implicit.base import Calibration, Field
from ifdefense.purifiers.surface import SurfacePurifier
from ifdefense.restorers.mesh import MeshRestorer
from ifdefense.restorers.newton import NewtonRestorer
from ifdefense.stages.resampling import SurfaceSampling

CALIBRATION = Calibration(threshold=0.5, offset=0.03)


class Blob:
    """A ball about the mean of a cloud; its radius is 0.6 times the mean distance of the points from it."""

    calibration = CALIBRATION

    def encode(self, clouds: Sequence[Tensor], seed: int = 0) -> list[Sphere]:
        return spheres(clouds)

    def field(self, code: list[Sphere]) -> Field:
        centres, radii = torch.stack([m for m, _ in code]), torch.stack([r for _, r in code])
        return lambda points, cloud: 20 * (radii[cloud] - (points - centres[cloud]).norm(dim=1))


@pytest.mark.parametrize(
    "restorer", [NewtonRestorer(MeshRestorer(repair=None)), NewtonRestorer(None, 20, 0.1)]
)
def test_points_land_on_the_surface(restorer: NewtonRestorer) -> None:
    given, network = clouds(), Blob()
    code = network.encode(given)
    restored = restorer(network.field(code), given, [200, 80], CALIBRATION, 0)
    for (centre, radius), each, count in zip(code, restored, (200, 80), strict=True):
        assert each.points is not None and each.points.shape == (count, 3)
        distance = (each.points - centre).norm(dim=1)
        assert (distance - (radius - 0.03)).abs().max() < 1e-3


def test_the_twin_is_the_mesh_up_to_its_cells() -> None:
    given, network = clouds(), Blob()
    mesh = MeshRestorer(repair=None, resample=SurfaceSampling("uniform"))  # thinning may choose others
    field = network.field(network.encode(given))
    ours = NewtonRestorer(mesh)(field, given, [300, 300], CALIBRATION, 4)
    theirs = mesh(field, given, [300, 300], CALIBRATION, 4)
    for one, other in zip(ours, theirs, strict=True):
        assert one.points is not None and other.points is not None
        assert (one.points - other.points).norm(
            dim=1
        ).max() < 0.3 * 1.1 / 64  # flat faces under a round surface


def test_gradients_are_those_of_the_surface() -> None:
    purifier = SurfacePurifier(Blob(), NewtonRestorer(MeshRestorer(repair=None)))
    exact, numeric = slopes_of_the_radius(purifier)
    assert exact == pytest.approx(numeric, rel=0.05)


def test_no_surface_is_said() -> None:
    restored = NewtonRestorer()(lambda p, c: -1 - p.norm(dim=1), clouds(), [10, 10], CALIBRATION, 0)
    assert [each.points for each in restored] == [None, None]
    with pytest.raises(ValueError, match="steps must be at least 1"):
        NewtonRestorer(steps=0)


def test_the_level_set_keeps_apart_what_belongs_to_two_clouds() -> None:
    given, network = clouds(), Blob()
    restorer = NewtonRestorer(MeshRestorer(repair=None))
    both = restorer(network.field(network.encode(given)), given, [50, 50], CALIBRATION, 0)
    alone = restorer(network.field(network.encode(given[1:])), given[1:], [50], CALIBRATION, 0)
    assert both[1].points is not None and alone[0].points is not None
    assert knn(both[1].points[None], alone[0].points[None], 1)[0].max() < 1e-10
