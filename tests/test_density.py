"""Samples at the density of the input: planted densities, added points, seeds and batches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from surface_checks import clouds
from test_ridge import CALIBRATION, RIDGE, Shell
from torch import Tensor

from ifdefense.geometry.mesh import Mesh
from ifdefense.restorers.mesh import MeshRestorer
from ifdefense.stages.density import DensitySampling, drawn_without_replacement
from ifdefense.stages.extraction import Extraction
from ifdefense.stages.resampling import resample

MATCHED = DensitySampling()


def bar(x: float, length: float, width: float) -> Mesh:
    """A flat bar along y, ``width`` wide, about ``x``."""
    left, right, end = x - width / 2, x + width / 2, length / 2
    corners = np.array([[left, -end, 0], [right, -end, 0], [right, end, 0], [left, end, 0]], np.float32)
    return Mesh(corners, np.array([[0, 1, 2], [0, 2, 3]]))


def joined(a: Mesh, b: Mesh) -> Mesh:
    return Mesh(
        np.concatenate([a.vertices, b.vertices]), np.concatenate([a.faces, b.faces + len(a.vertices)])
    )


def points_of(mesh: Mesh, count: int, seed: int) -> Tensor:
    return resample([mesh], count, seed=seed, method="uniform").points[0]


PLATE, WIRE = bar(-0.2, 0.6, 0.6), bar(0.35, 1.0, 0.3)
"""A plate, and the mesh of a wire: a bar as wide as the thickening makes it."""

MESH = joined(PLATE, WIRE)


def evidence(of_wire: int, count: int = 1024) -> Tensor:
    """Points of the plate, and of a wire in the middle of its bar."""
    wire = points_of(WIRE, of_wire, 1)
    wire[:, 0] = 0.35 + (wire[:, 0] - 0.35) / 10
    return torch.cat([points_of(PLATE, count - of_wire, 2), wire])


def share_of_wire(points: Tensor) -> float:
    return float((points[..., 0] > 0.15).double().mean())


def test_a_wire_keeps_about_its_share() -> None:
    """A wire that has 130 of 1,024 points, and 45% of the area of the mesh."""
    assert share_of_wire(points_of(MESH, 1024, 0)) == pytest.approx(0.45, abs=0.05)
    (found,) = MATCHED([MESH], [evidence(130)], 1024, 0, 0.0)
    assert found.shape == (1024, 3)
    assert share_of_wire(found) < 0.27
    closer = DensitySampling(power=1.5, oversample=6)  # more to choose from
    (found,) = closer([MESH], [evidence(130)], 1024, 0, 0.0)
    assert share_of_wire(found) == pytest.approx(130 / 1024, abs=0.04)


def test_what_is_missing_is_uniform() -> None:
    """Of 1,024 points 512 are left: the other half of the samples does not follow them."""
    given = evidence(20, 512)
    found = [
        share_of_wire(MATCHED.draw(MESH, given, 1024, seed=0, share=share).points)
        for share in (1.0, len(given) / 1024, 0.0)
    ]
    assert found[0] < found[1] - 0.05 < found[2] - 0.1
    assert found[2] == pytest.approx(0.45, abs=0.05)
    assert torch.equal(
        MATCHED([MESH], [given], 1024, 0, 0.0), MATCHED.draw(MESH, given, 1024, share=0.5).points
    )


def test_an_added_cluster_gains_nothing() -> None:
    """200 points added to one place of the plate attract no more samples than without them."""
    given = evidence(130)
    centre = torch.tensor([-0.2, 0.0, 0.0])
    cluster = centre + 0.02 * (points_of(PLATE, 200, 3) - centre)
    near = [
        float(((found[0] - centre).norm(dim=1) < 0.1).double().mean())
        for found in (
            MATCHED([MESH], [given], 1024, 0, 0.0),
            MATCHED([MESH], [torch.cat([given, cluster])], 1024, 0, 0.0),
        )
    ]
    assert near[0] > 0.03
    assert near[1] < 1.15 * near[0]


def test_weights_are_at_most_one_and_fall_with_the_power() -> None:
    samples, given = points_of(MESH, 2048, 0), evidence(60)
    one, two = (DensitySampling(power=power).weights(samples, given) for power in (1.0, 2.0))
    torch.testing.assert_close(two, one.square())
    assert float(one.max()) == 1 and float(one.min()) >= 0.02
    assert one[samples[:, 0] > 0.15].mean() < 0.5 * one[samples[:, 0] < 0.15].mean()
    assert (DensitySampling(power=0.0).weights(samples, given) == 1).all()


def test_draws_are_without_replacement_in_proportion() -> None:
    weights = torch.tensor([1.0, 0.1, 0.5, 0.25], dtype=torch.float64)
    first = torch.stack([drawn_without_replacement(weights, 1, seed) for seed in range(4000)]).flatten()
    share = torch.bincount(first, minlength=4).double() / 4000
    torch.testing.assert_close(share, weights / weights.sum(), rtol=0, atol=0.03)
    assert sorted(drawn_without_replacement(weights, 4, 0).tolist()) == [0, 1, 2, 3]


def test_equal_seeds_give_equal_samples_in_any_batch() -> None:
    meshes, given = [PLATE, MESH], [evidence(60)[:700], evidence(130)]
    together, again = (MATCHED(meshes, given, 100, seed, 0.01) for seed in (3, 4))
    assert torch.equal(together[1], MATCHED(meshes[1:], given[1:], 100, 3, 0.01)[0])
    assert not torch.equal(together[1], again[1])
    assert (together[..., 2] == -0.01).all()  # moved against the normals


@pytest.mark.parametrize("count", [1, 4, 40, 5000])
def test_any_number_of_input_points(count: int) -> None:
    given = points_of(MESH, count, 5)
    (found,) = MATCHED([MESH], [given], 64, 0, 0.0)
    assert found.shape == (64, 3) and found.isfinite().all()
    (found,) = MATCHED([MESH], [given[:1].expand(count, 3)], 64, 0, 0.0)
    assert found.isfinite().all()


def test_restorers_sample_at_the_density_of_their_input() -> None:
    """A sphere of which one half has a tenth of the points."""
    network = Shell()
    points = points_on_a_sphere(2000)
    given = torch.cat([points[points[:, 0] < 0], points[points[:, 0] > 0][:100]])
    field = network.field([(torch.zeros(3), torch.tensor(0.45))])
    uniform = MeshRestorer(Extraction(48, 12), None)
    ridge = dataclasses.replace(RIDGE, density=DensitySampling(oversample=4))
    for restorer in (ridge, dataclasses.replace(uniform, resample=DensitySampling(oversample=4)), uniform):
        (restored,) = restorer(field, [given], [500], CALIBRATION, 0)
        assert restored.points is not None and len(restored.points) == 500
        share = float((restored.points[:, 0] > 0).double().mean())
        assert share == pytest.approx(0.5, abs=0.07) if restorer is uniform else share < 0.3


def points_on_a_sphere(count: int) -> Tensor:
    points = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    return 0.45 * points / points.norm(dim=1, keepdim=True)


def test_gradients_pass_and_the_points_stay_the_same() -> None:
    """The choice of samples is held fixed, like the samples."""
    given, network = clouds(), Shell()
    matched = dataclasses.replace(RIDGE, density=MATCHED)
    results = []
    for needed in (False, True):
        leaves = [cloud.clone().requires_grad_(needed) for cloud in given]
        with torch.set_grad_enabled(needed):
            restored = matched(network.field(network.encode(leaves)), leaves, [90, 90], CALIBRATION, 1)
        points = [each.points for each in restored if each.points is not None]
        assert len(points) == 2
        assert all(part.requires_grad == needed for part in points)
        results.append(torch.cat(points).detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)
    slopes = torch.autograd.grad(torch.cat(points).norm(dim=1).sum(), leaves)
    assert all(slope.isfinite().all() and slope.abs().max() > 0 for slope in slopes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": -1.0}, "power must not be negative"),
        ({"neighbours": 0}, "neighbours at least 1"),
        ({"oversample": 0.5}, "oversample must be at least 1"),
        ({"lowest": 0.0}, r"lowest in \(0, 1\]"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DensitySampling(**options)  # type: ignore[arg-type]
