"""Mesh repair: anomalies planted on analytic solids are removed, everything else is kept.

The meshes are extracted from signed distance functions as those of a network would be; the input points are
drawn from the clean solid, and a few lie on the anomaly, as an attacker would leave them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

from ifdefense.geometry.mesh import Mesh
from ifdefense.geometry.mesh_graph import adjacency, walked
from ifdefense.geometry.sampling import sample_surface
from ifdefense.stages.cutting import boundary_loops
from ifdefense.stages.extraction import ExtractionOptions, extract_meshes
from ifdefense.stages.repair import BulgeRepair, Repair, repair_mesh

Distance = Callable[[Tensor], Tensor]
OPTIONS = ExtractionOptions()
CELL = OPTIONS.spacing


def box(centre: tuple[float, float, float], half: tuple[float, float, float]) -> Distance:
    def distance(points: Tensor) -> Tensor:
        q = (points - points.new_tensor(centre)).abs() - points.new_tensor(half)
        outside: Tensor = torch.linalg.vector_norm(q.clamp(min=0), dim=1)
        return outside + q.amax(dim=1).clamp(max=0)

    return distance


def rod(start: tuple[float, float, float], stop: tuple[float, float, float], radius: float) -> Distance:
    """A cylinder with round ends; a ball where they coincide."""

    def distance(points: Tensor) -> Tensor:
        a, b = points.new_tensor(start), points.new_tensor(stop)
        along = ((points - a) @ (b - a) / (b - a).square().sum().clamp(min=1e-12)).clamp(0, 1)
        length: Tensor = torch.linalg.vector_norm(points - a - along[:, None] * (b - a), dim=1)
        return length - radius

    return distance


def ball(centre: tuple[float, float, float], radius: float) -> Distance:
    return rod(centre, centre, radius)


def union(*parts: Distance, blend: float = 0.0) -> Distance:
    """Smaller of the distances, the fold between two of them filled over a length ``blend``."""

    def distance(points: Tensor) -> Tensor:
        result = parts[0](points)
        for part in parts[1:]:
            other = part(points)
            overlap = (blend - (result - other).abs()).clamp(min=0)
            result = torch.minimum(result, other) - (overlap.square() / (4 * blend) if blend else 0)
        return result

    return distance


LEGS = [box((x, y, -0.05), (0.03, 0.03, 0.35)) for x in (-0.4, 0.4) for y in (-0.4, 0.4)]
SHAPES = {
    "sphere": ball((0, 0, 0), 0.35),
    "box": box((0, 0, 0), (0.45, 0.3, 0.2)),
    "table": union(box((0, 0, 0.3), (0.45, 0.45, 0.04)), *LEGS),
    "chair": union(
        box((0, 0, 0), (0.25, 0.25, 0.03)),
        box((0, 0.23, 0.25), (0.25, 0.025, 0.25)),
        *(box((x, y, -0.25), (0.03, 0.03, 0.25)) for x in (-0.22, 0.22) for y in (-0.22, 0.22)),
    ),
}
ANOMALIES = {
    ("sphere", "spike"): rod((0, 0, 0.3), (0, 0, 0.51), 0.03),
    ("sphere", "bump"): ball((0.35, 0, 0), 0.1),
    ("sphere", "blob"): ball((0.4, 0.4, 0.4), 0.06),
    ("box", "spike"): rod((0, 0, 0.2), (0, 0, 0.4), 0.03),
    ("box", "bump"): ball((0.1, 0, 0.2), 0.1),
    ("box", "blob"): ball((0.3, 0, 0.4), 0.07),
    ("table", "spike"): rod((0, 0, 0.3), (0, 0, 0.5), 0.04),
    ("table", "bump"): ball((0.1, 0, 0.36), 0.1),
    ("table", "blob"): ball((0, 0, -0.2), 0.07),
    ("chair", "spike"): rod((0, 0, 0), (0, 0, -0.25), 0.03),
    ("chair", "bridge"): rod((-0.22, -0.22, -0.3), (0.22, -0.22, -0.3), 0.025),
    ("chair", "blob"): ball((0, -0.3, 0.3), 0.07),
}


def extract(distance: Distance) -> Mesh:
    return extract_meshes(lambda points, _: OPTIONS.level - 20 * distance(points), 1, OPTIONS)[0]


@cache
def clean_mesh(shape: str) -> Mesh:
    return extract(SHAPES[shape])


def points_on(mesh: Mesh, count: int, seed: int = 0) -> NDArray[np.float32]:
    return sample_surface(mesh, count, generator=np.random.default_rng(seed))[0]


@cache
def attacked(shape: str, anomaly: str) -> tuple[Mesh, NDArray[np.float32]]:
    """Mesh with the anomaly; a thousand points of the clean shape and three on what the anomaly added."""
    mesh = extract(union(SHAPES[shape], ANOMALIES[shape, anomaly], blend=0.02))
    candidates = points_on(mesh, 5000)
    added = candidates[SHAPES[shape](torch.tensor(candidates)).numpy() > 0.02][:3]
    return mesh, np.concatenate([points_on(clean_mesh(shape), 1000), added])


def deviation(mesh: Mesh, shape: str) -> NDArray[np.float32]:
    """Distance of each vertex from the clean surface."""
    signed: NDArray[np.float32] = SHAPES[shape](torch.tensor(mesh.vertices)).numpy()
    return np.abs(signed)


def distances(points: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.asarray(cKDTree(others).query(points)[0])


def farthest_from(surface: Mesh, points: NDArray[np.float32]) -> float:
    """Largest distance of the points to the surface, up to the spacing of forty thousand samples on it."""
    return float(distances(points, points_on(surface, 40_000)).max())


@pytest.mark.parametrize(("shape", "anomaly"), ANOMALIES)
def test_a_planted_anomaly_is_removed_and_the_rest_stays(shape: str, anomaly: str) -> None:
    mesh, evidence = attacked(shape, anomaly)
    repair = repair_mesh(mesh, evidence)
    assert mesh.is_watertight
    assert repair.mesh.is_watertight
    assert deviation(mesh, shape).max() > 3 * CELL
    # Where a bridge leaves a leg the edge of the leg is lost to the patch, for less than two cells.
    allowed = 2 if anomaly == "bridge" else 1
    assert deviation(repair.mesh, shape).max() < allowed * CELL
    assert farthest_from(repair.mesh, points_on(clean_mesh(shape), 5000)) < allowed * CELL
    assert repair.mask[deviation(mesh, shape) > 1.5 * CELL].all()
    # Whatever is not masked is not merely near, but the same.
    kept = {vertex.tobytes() for vertex in repair.mesh.vertices}
    assert all(vertex.tobytes() in kept for vertex in mesh.vertices[~repair.mask])
    assert repair.mask.mean() < 0.15
    assert (repair.removed_components, repair.rebuilt_regions) == ((1, 0) if anomaly == "blob" else (0, 1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1000, 2048])
def test_a_clean_shape_is_left_alone(shape: str, count: int) -> None:
    mesh = clean_mesh(shape)
    repair = repair_mesh(mesh, points_on(mesh, count))
    assert not repair.mask.any()
    assert repair.removed_area == 0
    assert np.array_equal(repair.mesh.vertices, mesh.vertices)
    assert np.array_equal(repair.mesh.faces, mesh.faces)


@pytest.mark.parametrize("shape", ["table", "chair"])
def test_sparse_points_cost_a_clean_shape_less_than_two_per_cent_of_chamfer(shape: str) -> None:
    mesh, clean = clean_mesh(shape), points_on(clean_mesh(shape), 1024, seed=9)
    repaired = [repair_mesh(mesh, points_on(mesh, 500, seed)).mesh for seed in range(4)]
    before, *after = (
        distances(clean, samples).mean() + distances(samples, clean).mean()
        for samples in (points_on(each, 1024, seed=5) for each in (mesh, *repaired))
    )
    assert np.mean(after) < 1.02 * before


def test_a_leg_that_lost_all_of_its_points_stays() -> None:
    mesh = clean_mesh("table")
    points = points_on(mesh, 1000)
    points = points[~((points[:, 0] > 0.3) & (points[:, 1] > 0.3) & (points[:, 2] < 0.26))]
    repair = repair_mesh(mesh, points)
    assert farthest_from(repair.mesh, points_on(mesh, 5000)) < CELL


def test_a_cluster_on_the_tip_does_not_support_the_bump() -> None:
    mesh, evidence = attacked("box", "bump")
    cluster = np.array([0.1, 0, 0.3]) + np.random.default_rng(0).normal(0, 0.004, (40, 3))
    repair = repair_mesh(mesh, np.concatenate([evidence, cluster]))
    assert deviation(repair.mesh, "box").max() < CELL


def test_a_bump_that_is_supported_like_the_rest_stays() -> None:
    mesh, _ = attacked("box", "bump")
    repair = repair_mesh(mesh, points_on(mesh, 1000))
    assert not repair.mask.any()


def test_the_score_is_highest_on_the_anomaly_and_says_what_is_masked() -> None:
    mesh, evidence = attacked("table", "spike")
    repair = repair_mesh(mesh, evidence)
    assert repair.score.shape == repair.mask.shape == (len(mesh.vertices),)
    assert repair.score.dtype == np.float32
    assert repair.score.min() >= 0
    assert deviation(mesh, "table")[repair.score.argmax()] > 3 * CELL
    assert repair.mask[repair.score >= 1].all()
    assert repair.removed_area == pytest.approx(mesh.area - _unmasked_area(mesh, repair), rel=0.2)


def _unmasked_area(mesh: Mesh, repair: Repair) -> float:
    return float(mesh.face_areas()[~repair.mask[mesh.faces].any(axis=1)].sum())


def test_floating_components_need_points() -> None:
    supported = [ball((0, 0, 0), 0.25), ball((0.4, 0.4, 0.4), 0.08)]
    # Smaller than a cell of the coarse grid, so they sit on points of it.
    specks = [ball((0.4125, -0.4125, 0.4125), 0.02), ball((-0.4125, 0.4125, -0.4125), 0.02)]
    mesh = extract(union(*supported, ball((-0.4, -0.4, -0.4), 0.08), *specks))
    evidence = np.concatenate([points_on(extract(union(*supported)), 800), points_on(extract(specks[0]), 3)])
    repair = repair_mesh(mesh, evidence)
    assert repair.removed_components == 2  # a ball and a speck without points; a speck with three stays
    assert repair.mesh.volume == pytest.approx(extract(union(*supported, specks[0])).volume, rel=1e-3)
    assert repair.mesh.is_watertight
    assert (repair.score[repair.mask] >= 1).all()
    assert (mesh.vertices[repair.mask, 0] < 0).all()


@pytest.mark.parametrize("radius", [0.04, 0.06, 0.1])
def test_a_component_with_points_on_one_side_is_not_laid_flat(radius: float) -> None:
    mesh = extract(union(ball((0, 0, 0), 0.25), ball((0.4125, 0.4125, 0.4125), radius)))
    # Enough for the component, while its far side bulges without any.
    side = np.tile([[0.4125, 0.4125, 0.4125 + radius]], (60, 1))
    repair = repair_mesh(mesh, np.concatenate([points_on(extract(ball((0, 0, 0), 0.25)), 800), side]))
    assert (repair.score >= 1).any()
    assert repair.removed_components == 0
    assert repair.mesh.is_watertight
    assert repair.mesh.volume == pytest.approx(mesh.volume, rel=0.02)
    assert distances(side, repair.mesh.vertices).max() < CELL


def test_small_components_elsewhere_are_no_islands_of_a_region() -> None:
    solid, speck = SHAPES["box"], ball((-0.4125, -0.4125, -0.4125), 0.02)
    mesh = extract(union(solid, ANOMALIES["box", "spike"], speck, blend=0.02))
    evidence = np.concatenate([attacked("box", "spike")[1], points_on(extract(speck), 5)])
    repair = repair_mesh(mesh, evidence)
    assert repair.rebuilt_regions == 1
    assert not repair.mask[mesh.vertices[:, 2] < -0.3].any()


def test_one_component_is_left_even_if_no_point_is_near() -> None:
    mesh = extract(union(ball((-0.3, 0, 0), 0.1), ball((0.3, 0, 0), 0.15)))
    repair = repair_mesh(mesh, np.full((20, 3), 9.0))
    assert repair.removed_components == 1
    assert (repair.mesh.vertices[:, 0] > 0).all()  # the larger


def test_the_caller_s_arrays_are_not_modified_and_equal_input_gives_equal_output() -> None:
    mesh, evidence = attacked("chair", "bridge")
    vertices, faces, points = mesh.vertices.copy(), mesh.faces.copy(), evidence.copy()
    first, second = repair_mesh(mesh, evidence), repair_mesh(mesh, evidence)
    assert np.array_equal(mesh.vertices, vertices)
    assert np.array_equal(mesh.faces, faces)
    assert np.array_equal(evidence, points)
    assert np.array_equal(first.mesh.vertices, second.mesh.vertices)


def test_the_order_of_the_points_does_not_matter() -> None:
    mesh, evidence = attacked("sphere", "spike")
    forward, backward = repair_mesh(mesh, evidence), repair_mesh(mesh, evidence[::-1])
    assert np.array_equal(forward.mask, backward.mask)


def test_an_empty_mesh_comes_back() -> None:
    repair = repair_mesh(Mesh.empty(), np.zeros((5, 3)))
    assert repair.mesh.is_empty
    assert repair.score.shape == repair.mask.shape == (0,)


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_the_fast_walk_equals_single_steps(steps: int) -> None:
    mesh = extract_meshes(
        lambda p, _: 0.3 - torch.linalg.vector_norm(p, dim=1), 1, ExtractionOptions(8, 8, threshold=0.5)
    )[0]
    graph = adjacency(mesh.faces, len(mesh.vertices)).toarray()
    walk = graph / graph.sum(axis=0)
    mass = np.random.default_rng(0).random((len(walk), 2))
    expected = np.linalg.matrix_power(walk, steps) @ mass
    assert np.allclose(walked(walk, mass, steps), expected, atol=2e-2 * mass.mean())
    assert np.allclose(walked(walk, mass, steps).sum(axis=0), mass.sum(axis=0))


def test_boundary_loops_of_a_tube_a_disc_and_two_discs_that_touch() -> None:
    tube = np.array([[0, 1, 4], [0, 4, 3], [1, 2, 5], [1, 5, 4], [2, 0, 3], [2, 3, 5]])
    disc = np.array([[0, 1, 2], [0, 2, 3], [0, 3, 1]])
    touching = np.array([[0, 1, 2], [0, 3, 4]])
    as_edges = [
        {
            tuple(edge)
            for loop in boundary_loops(faces)
            for edge in np.stack([loop, np.roll(loop, -1)], 1).tolist()
        }
        for faces in (tube, disc, touching)
    ]
    assert [len(boundary_loops(faces)) for faces in (tube, disc, touching)] == [2, 1, 2]
    assert as_edges[0] == {(0, 1), (1, 2), (2, 0), (4, 3), (5, 4), (3, 5)}
    assert as_edges[1] == {(1, 2), (2, 3), (3, 1)}
    assert as_edges[2] == {(0, 1), (1, 2), (2, 0), (0, 3), (3, 4), (4, 0)}


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.zeros((0, 3)), r"shape \(K, 3\) with K >= 1, got \(0, 3\)"),
        (np.zeros((5, 2)), r"shape \(K, 3\) with K >= 1, got \(5, 2\)"),
        (np.array([[0, np.inf, 0]]), "not finite"),
    ],
)
def test_bad_evidence_is_named(points: NDArray[np.float64], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        repair_mesh(clean_mesh("sphere"), points)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radius": 0.0}, "radius must be positive, got 0.0"),
        ({"height": -1.0}, "height must be positive"),
        ({"max_share": float("nan")}, "max_share must be positive"),
        ({"min_support": 1.0}, "fraction below 1, got 1.0"),
    ],
)
def test_options_are_checked(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BulgeRepair(**arguments)


def test_a_mesh_far_too_small_is_an_error_and_does_not_hang() -> None:
    tiny = clean_mesh("box").transformed(1e-6, (0, 0, 0))
    with pytest.raises(ValueError, match="too short for a radius"):
        repair_mesh(tiny, tiny.vertices)
