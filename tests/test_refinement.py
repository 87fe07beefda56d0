"""Simplification and refinement of meshes, on analytic spheres."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.studies.refinement import compare, table
from ifdefense.geometry.mesh import Mesh
from ifdefense.implicit.base import Calibration, Field
from ifdefense.reconstruction.refinement import RefinedExtraction, Refinement, refinement_loss
from ifdefense.reconstruction.simplification import Simplification
from ifdefense.restorers.mesh import MeshRestorer
from ifdefense.stages.extraction import Extraction

CALIBRATION = Calibration()
RADII = (0.4, 0.3)


def spheres(slope: float = 60.0) -> Field:
    """Balls of `RADII`; the logit falls quadratically from the centre, by ``slope`` a unit at the surface."""

    def field(points: Tensor, cloud: Tensor) -> Tensor:
        radius = points.new_tensor(RADII)[cloud]
        return CALIBRATION.level + slope * (radius**2 - points.square().sum(1)) / (2 * radius)

    return field


def clouds() -> list[Tensor]:
    normal = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0))
    return list(normal / normal.norm(dim=-1, keepdim=True) * torch.tensor(RADII)[:, None, None])


def extracted(resolution: int = 32) -> Mesh:
    return Extraction(resolution, 16)(spheres(), clouds(), CALIBRATION)[0]


def error(mesh: Mesh, radius: float = RADII[0]) -> float:
    return float(np.abs(np.linalg.norm(mesh.vertices, axis=1) - radius).max())


def misaligned(mesh: Mesh) -> float:
    """Mean angle between the normals of faces and of the sphere, in radians."""
    centre = mesh.triangles().mean(1)
    outward = centre / np.linalg.norm(centre, axis=1, keepdims=True)
    cosine = (mesh.face_normals() * outward).sum(1)
    return float(np.arccos(np.clip(cosine, -1, 1)).mean())


# Refinement


def test_a_disturbed_sphere_lands_on_the_sphere() -> None:
    mesh = extracted()
    noise = np.random.default_rng(0).normal(size=mesh.vertices.shape) * 0.002
    disturbed = Mesh(mesh.vertices + noise.astype(np.float32), mesh.faces)
    before = disturbed.vertices.copy()
    refined = Refinement(steps=60)(disturbed, spheres(), torch.tensor(0), CALIBRATION)
    assert error(disturbed) > 5e-3 and error(refined) < 1e-3
    assert misaligned(refined) < 0.3 * misaligned(disturbed)
    assert np.array_equal(refined.faces, mesh.faces)
    np.testing.assert_array_equal(disturbed.vertices, before)


def test_normals_alone_align_the_faces() -> None:
    mesh = Simplification(400)(extracted())
    plain, aligned = (
        Refinement(steps=60, normals=weight)(mesh, spheres(), torch.tensor(0), CALIBRATION)
        for weight in (0.0, 1.0)
    )
    assert misaligned(aligned) < 0.9 * misaligned(plain)


def test_the_nearer_threshold_is_taken() -> None:
    mesh = extracted()
    # The mesh lies at the second threshold; that of the first is 0.1 further inside.
    twice = Calibration(threshold=0.9, second_threshold=CALIBRATION.threshold)
    refined = Refinement(steps=30)(mesh, spheres(), torch.tensor(0), twice)
    assert error(refined) < 1e-3


def test_the_loss_is_differentiated_through_the_gradient_of_the_field() -> None:
    generator = torch.Generator().manual_seed(0)
    vertices = torch.randn(6, 3, generator=generator, dtype=torch.float64) * 0.3
    faces = torch.tensor([[0, 1, 2], [2, 1, 3], [3, 4, 5]])
    weights = torch.rand(3, 3, generator=generator, dtype=torch.float64)
    weights = weights / weights.sum(1, keepdim=True)
    owner = torch.zeros(3, dtype=torch.int64)

    def loss(x: Tensor) -> Tensor:
        return refinement_loss(x, faces, weights, spheres(2.0), owner, 0.2, 0.7)

    assert torch.autograd.gradcheck(loss, vertices.requires_grad_())


def test_the_loss_is_that_of_the_paper_in_closed_form() -> None:
    """A face in a plane at height h over a ball: both terms are known."""
    h, step = 0.5, 0.1
    vertices = torch.tensor([[0.0, 0, h], [step, 0, h], [0, step, h]], dtype=torch.float64)
    weights = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    owner = torch.zeros(1, dtype=torch.int64)
    faces = torch.tensor([[0, 1, 2]])
    value = refinement_loss(vertices.requires_grad_(), faces, weights, spheres(), owner, 0.2, 0.01)
    point = torch.tensor([step / 2, 0, h], dtype=torch.float64)
    occupancy = torch.sigmoid(spheres()(point[None], owner))[0]
    apart = 2 - 2 * h / float(point.norm())  # |n - n'|² of unit vectors, the face's being z
    assert value.item() == pytest.approx((float(occupancy) - 0.2) ** 2 + 0.01 * apart, rel=1e-9)


def test_equal_seeds_are_equal_and_clouds_are_apart() -> None:
    stage = RefinedExtraction(Extraction(16, 16), None, Refinement(steps=3))
    first, again = (stage(spheres(), clouds(), CALIBRATION) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.vertices, b.vertices)
    only = stage(lambda p, c: spheres()(p, c + 1), clouds()[1:], CALIBRATION)[0]
    np.testing.assert_array_equal(first[1].vertices, only.vertices)
    other = RefinedExtraction(Extraction(16, 16), None, Refinement(steps=3, seed=1))
    assert not np.array_equal(other(spheres(), clouds(), CALIBRATION)[0].vertices, first[0].vertices)


def test_it_is_a_part_of_a_restorer_and_needs_no_gradients() -> None:
    restorer = MeshRestorer(RefinedExtraction(Extraction(32, 16), Simplification(500)), None)
    with torch.no_grad():
        restored = restorer(spheres(), clouds(), [300, 200], CALIBRATION, 0)
    for result, radius, count in zip(restored, RADII, (300, 200), strict=True):
        assert result.points is not None and result.points.shape == (count, 3)
        assert result.mesh is not None and len(result.mesh.faces) <= 500
        assert (result.points.norm(dim=1) - radius).abs().max() < 0.02 * radius


def test_an_empty_mesh_stays_empty() -> None:
    assert Refinement()(Mesh.empty(), spheres(), torch.tensor(0), CALIBRATION).is_empty
    assert Simplification()(Mesh.empty()).is_empty


@pytest.mark.parametrize("settings", [{"steps": 0}, {"rate": 0.0}, {"normals": -1.0}])
def test_settings_out_of_range_are_errors(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        Refinement(**settings)  # type: ignore[arg-type]


# Simplification


def test_simplified_meshes_have_few_faces_and_stay_close() -> None:
    pytest.importorskip("fast_simplification")
    mesh = extracted(64)
    small = Simplification(1000)(mesh)
    assert len(mesh.faces) > 5000 and 900 < len(small.faces) <= 1000
    assert error(small) < 3e-3 and small.is_watertight
    assert small.volume == pytest.approx(4 / 3 * np.pi * 0.4**3, rel=0.01)
    assert Simplification(len(mesh.faces))(mesh) is mesh


def test_refinement_brings_a_simplified_mesh_nearer() -> None:
    pytest.importorskip("fast_simplification")
    small = Simplification(1000)(extracted(64))
    refined = Refinement(steps=100)(small, spheres(), torch.tensor(0), CALIBRATION)
    centre = [np.linalg.norm(m.triangles().mean(1), axis=1) - 0.4 for m in (small, refined)]
    assert np.abs(centre[1]).mean() < np.abs(centre[0]).mean()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fast_simplification", None)
    with pytest.raises(ImportError, match=r"pip install 'ifdefense\[simplify\]'"):
        Simplification(100)(extracted())
    with pytest.raises(ValueError, match="at least 4 faces, got 3"):
        Simplification(3)


# The measurement


def test_comparison_of_parallel_planes() -> None:
    grid = torch.cartesian_prod(torch.arange(10.0), torch.arange(10.0), torch.zeros(1))
    up = torch.tensor([0.0, 0, 1]).expand(100, 3)
    tilted = torch.tensor([0.0, 0.6, -0.8]).expand(100, 3)
    distance, cosine = compare((grid + torch.tensor([0, 0, 0.2]), tilted), (grid, up))
    assert distance == pytest.approx(0.2, abs=1e-6) and cosine == pytest.approx(0.8, abs=1e-6)


def test_table() -> None:
    row = {"faces": 1234.0, "chamfer": 0.1, "normals": 0.9, "seconds": 1.5, "shapes": 2}
    text = table(
        {"rows": {"x": {"refined": row}}, "names": ["a"], "samples": 9, "steps": 3, "date": "2026-01-01"}
    )
    assert "| x | refined | 1,234 | 0.1000 | 0.9000 | 1.50 |" in text
