"""Resampling: exact numbers of points, on the surface, by area, independent of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from test_mesh import CORNERS, CUBE_FACES

from ifdefense.geometry.mesh import Mesh
from ifdefense.geometry.sampling import sample_surface
from ifdefense.stages.resampling import (
    SamplingMethod,
    _throw_darts,
    fill,
    resample,
)

METHODS: list[SamplingMethod] = ["farthest", "uniform", "poisson"]


def box(*sides: float) -> Mesh:
    return Mesh(CORNERS * np.array(sides, np.float32), CUBE_FACES)


def sampled(meshes: list[Mesh], *args: Any, **kwargs: Any) -> NDArray[np.float32]:
    return resample(meshes, *args, **kwargs).points.numpy()


def filled(
    meshes: list[Mesh], evidence: Sequence[NDArray[Any]], *args: Any, **kwargs: Any
) -> NDArray[np.float32]:
    return fill(meshes, [torch.from_numpy(np.asarray(e)) for e in evidence], *args, **kwargs).numpy()


def spacing(points: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.asarray(cKDTree(points).query(points, 2)[0])[:, 1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 17, 256])
def test_exactly_as_many_distinct_points_as_asked_for_on_the_surface(
    method: SamplingMethod, count: int
) -> None:
    points = sampled([box(1, 2, 3), box(1, 1, 1)], count, method=method)
    assert points.shape == (2, count, 3)
    assert points.dtype == np.float32
    for cloud, sides in zip(points, ([1, 2, 3], [1, 1, 1]), strict=True):
        to_side = np.minimum(np.abs(cloud), np.abs(cloud - sides)).min(axis=1)
        assert to_side.max() < 1e-6
        assert (cloud > -1e-6).all()
        assert (cloud < np.array(sides) + 1e-6).all()
        assert len(np.unique(cloud, axis=0)) == count


def test_points_fall_on_faces_by_their_area() -> None:
    mesh = box(1, 2, 3)
    _, face = sample_surface(mesh, 40_000, generator=np.random.default_rng(0))
    share = np.bincount(face, minlength=12) / 40_000
    expected = mesh.face_areas() / mesh.area
    assert np.abs(share - expected).max() < 4 * np.sqrt(expected.max() / 40_000)


def test_points_are_uniform_within_a_triangle() -> None:
    triangle = Mesh(np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32), np.array([[0, 1, 2]]))
    points, _ = sample_surface(triangle, 40_000, generator=np.random.default_rng(0))
    assert np.allclose(points.mean(axis=0), [1 / 3, 1 / 3, 0], atol=0.005)
    # The triangle cut off at x + y < 1/2 holds a quarter of the area.
    assert (points.sum(axis=1) < 0.5).mean() == pytest.approx(0.25, abs=0.01)


def test_faces_without_area_get_no_point() -> None:
    faces = np.concatenate([[[0, 0, 1]], CUBE_FACES, [[2, 2, 2], [0, 1, 0]]])
    _, face = sample_surface(Mesh(CORNERS, faces), 5_000, generator=np.random.default_rng(0))
    assert set(face.tolist()) == set(range(1, 13))


@pytest.mark.parametrize("method", METHODS)
def test_equal_seeds_give_equal_points_whatever_the_batch(method: SamplingMethod) -> None:
    meshes = [box(1, 2, 3), box(1, 1, 1), box(0.1, 2, 0.5)]
    together = sampled(meshes, 100, method=method, seed=3)
    for mesh, cloud in zip(meshes, together, strict=True):
        assert np.array_equal(sampled([mesh], 100, method=method, seed=3)[0], cloud)
        assert not np.array_equal(sampled([mesh], 100, method=method, seed=4)[0], cloud)


def test_thinning_spreads_the_points() -> None:
    uniform, farthest, poisson = (
        spacing(sampled([box(1, 1, 1)], 500, method=method)[0])
        for method in ("uniform", "farthest", "poisson")
    )
    # 500 points on area 6 as hexagons lie 0.118 apart; thinning reaches 0.6 of it, chance almost nothing.
    assert min(farthest.min(), poisson.min()) > 0.6 * 0.118
    assert uniform.min() < 0.02


def test_more_candidates_spread_farther() -> None:
    spread = [spacing(sampled([box(1, 1, 1)], 300, oversample=k)[0]).min() for k in (1, 2, 8)]
    assert spread == sorted(spread)
    assert spread[0] < spread[2]


def test_normals_are_those_of_the_box() -> None:
    points, normals = (x.numpy() for x in vars(resample([box(1, 1, 1)], 200)).values())
    side = np.abs(points[0] - 0.5).argmax(axis=1)
    expected = np.zeros((200, 3))
    expected[np.arange(200), side] = np.sign(points[0] - 0.5)[np.arange(200), side]
    assert np.allclose(normals[0], expected, atol=1e-6)


def test_parallel_darts_equal_darts_thrown_one_by_one() -> None:
    random = np.random.default_rng(0)
    for size in (1, 5, 60):
        pairs = np.sort(random.integers(0, size, (2 * size, 2)), axis=1)
        pairs = pairs[pairs[:, 0] < pairs[:, 1]]
        naive: list[int] = []
        for i in range(size):
            if not any(i == b and a in naive for a, b in pairs.tolist()):
                naive.append(i)
        assert _throw_darts(pairs, size).tolist() == naive


def test_no_meshes_give_no_clouds() -> None:
    assert len(resample([], 10).points) == 0


def test_errors_name_the_mesh() -> None:
    flat = Mesh(np.zeros((3, 3), np.float32), np.array([[0, 1, 2]]))
    with pytest.raises(ValueError, match="mesh 1 of 2 cannot be resampled: the mesh is empty"):
        resample([box(1, 1, 1), Mesh.empty()], 10)
    with pytest.raises(
        ValueError, match="mesh 0 of 1 cannot be resampled: the mesh has no area: all of its 1"
    ):
        resample([flat], 10)
    with pytest.raises(ValueError, match="at least 1, got 0 and 4"):
        resample([box(1, 1, 1)], 0)
    with pytest.raises(ValueError, match="farthest, uniform, poisson, got 'grid'"):
        resample([box(1, 1, 1)], 10, method="grid")  # type: ignore[arg-type]


def sphere(count: int, seed: int = 0) -> NDArray[np.float32]:
    normal = np.random.default_rng(seed).normal(size=(count, 3))
    return (0.5 * normal / np.linalg.norm(normal, axis=1, keepdims=True)).astype(np.float32)


def ball() -> Mesh:
    trimesh = pytest.importorskip("trimesh")
    mesh = trimesh.creation.icosphere(subdivisions=4, radius=0.5)
    return Mesh(np.asarray(mesh.vertices, np.float32), np.asarray(mesh.faces, np.int64))


def test_confirmed_points_are_kept_contradicting_ones_are_not() -> None:
    on, off = sphere(300), 1.2 * sphere(40, seed=1)
    points = filled([ball()], [np.concatenate([on, off])], 1500, tolerance=0.05)[0]
    kept = {tuple(p) for p in points}
    assert (
        len({tuple(p) for p in on} & kept) > 200
    )  # the others have a sample or a neighbour almost as far from the rest
    assert not {tuple(p) for p in off} & kept
    assert np.abs(np.linalg.norm(points, axis=1) - 0.5).max() < 0.01


def test_the_surface_fills_in_where_points_are_missing() -> None:
    half = sphere(1500)
    half = half[half[:, 2] < 0]
    points = filled([ball()], [half], 1000, tolerance=0.05)[0]
    upper = points[points[:, 2] > 0.05]
    assert len(upper) == pytest.approx(
        490, abs=60
    )  # 45% of the area, and random points pack worse than its samples
    assert not {tuple(p) for p in upper} & {tuple(p) for p in half}


def test_evidence_is_batched_exactly_and_always_gives_enough_points() -> None:
    meshes = [ball(), box(1, 0.5, 0.2), ball()]
    evidence = [sphere(500), sphere(500, 1)[:30], 3 * sphere(64)]  # confirmed, partly, not at all
    together = filled(meshes, evidence, 600, tolerance=0.04)
    for i, points in enumerate(together):
        assert len(np.unique(points, axis=0)) == 600
        alone = filled(meshes[i : i + 1], evidence[i : i + 1], 600, tolerance=0.04)[0]
        np.testing.assert_array_equal(points, alone)
    with pytest.raises(ValueError, match="tolerance must be positive, got 0"):
        filled(meshes, evidence, 600, tolerance=0)


def test_a_dense_confirmed_cloud_is_only_thinned() -> None:
    dense = sphere(5000)
    points = filled([ball()], [dense], 500, tolerance=0.05)[0]
    assert {tuple(p) for p in points} <= {tuple(p) for p in dense}


def test_smoothing_takes_back_shifts_made_point_by_point() -> None:
    noise = 0.03 * np.random.default_rng(3).normal(size=(2000, 3)).astype(np.float32)
    spoilt = [sphere(2000) + noise]

    def error(smoothing: int) -> float:
        points = filled([ball()], spoilt, 800, tolerance=0.2, smoothing=smoothing)[0]
        return float(np.abs(np.linalg.norm(points, axis=1) - 0.5).mean())

    assert error(8) < error(1) / 2


def test_smoothed_points_are_the_means_of_their_neighbours() -> None:
    points = np.float32(
        [[0.5, 0, 0], [0.5, 0.01, 0], [0, 0.5, 0], [0.01, 0.5, 0], [0, 0, 0.5], [0, 0.01, 0.5]]
    )
    kept = filled([ball()], [points], 400, tolerance=0.05, smoothing=2)[0]
    for middle in ([0.5, 0.005, 0], [0.005, 0.5, 0], [0, 0.005, 0.5]):
        assert np.abs(kept - np.float32(middle)).max(1).min() < 1e-6
    with pytest.raises(ValueError, match="smoothing must be at least 1, got 0"):
        filled([ball()], [points], 400, tolerance=0.05, smoothing=0)
