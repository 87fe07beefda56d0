"""Outliers far away, clustered or scattered, and padding: attacks without access to the classifier."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

import ifdefense
from ifdefense import Compose, purify
from ifdefense.geometry.frame import first_occurrences, within_reach
from ifdefense.purifiers import base
from ifdefense.purifiers.filters import LocalSmoothing, SimpleRandomSampling, StatisticalOutlierRemoval
from ifdefense.purifiers.pretrained import local_mesh
from ifdefense.purifiers.registry import METHODS
from ifdefense.shapes.procedural import make_shape


@pytest.fixture(scope="module")
def chair() -> np.ndarray:
    shape = make_shape("chair", np.random.default_rng(0))
    return 2 * shape.sample_surface(1024, np.random.default_rng(0))[0].astype(np.float32)


def blind(cloud: np.ndarray, count: int, radii: tuple[float, float], together: bool) -> np.ndarray:
    """The cloud with its first ``count`` points at random radii, log-uniform, in random directions or one."""
    rng = np.random.default_rng(count)
    direction = rng.normal(size=(1 if together else count, 3)).repeat(count if together else 1, 0)
    direction += 0.01 * rng.normal(size=direction.shape)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    radius = np.exp(rng.uniform(*np.log(radii), size=(count, 1)))
    if together:
        radius[:] = radius[0]
    return np.concatenate([direction * radius, cloud[count:]]).astype(np.float32)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("radii", [(2.5, 10), (10, 100), (10, 1e6), (1e5, 1e6)])
@pytest.mark.parametrize("count", [1, 2, 7, 50])
def test_no_method_is_thrown_off_by_blind_points(
    chair: np.ndarray, count: int, radii: tuple[float, float], together: bool
) -> None:
    if together and radii[0] < 10 and count > 2:
        pytest.skip("a dense cluster close by is an object of its own: what repairs are for")
    attacked = blind(chair, count, radii, together)
    (trace,) = ifdefense.load("sor").trace(attacked)
    assert not trace.kept_mask[:count].any()
    (alone,) = ifdefense.load("sor").trace(chair[count:])
    assert trace.kept_mask.sum() > 0.93 * alone.kept_mask.sum()
    if radii[0] >= 10:  # out of reach: as if they were not there
        np.testing.assert_array_equal(trace.kept_mask[count:], alone.kept_mask)
    smoothed = purify(attacked, "sor-smooth")
    assert np.linalg.norm(smoothed, axis=1).max() < 1.1 * np.linalg.norm(chair, axis=1).max()


@pytest.mark.parametrize("method", METHODS)
def test_two_blind_points_leave_the_result_in_place(chair: np.ndarray, method: str) -> None:
    attacked = chair.copy()
    attacked[0], attacked[1] = (10, 0, 0), (0, -100, 0)
    result = purify(attacked, method)
    # Nine tenths: to SRS the point at radius 10 is one like others, and half a cloud may leave a stray part.
    for points, others in ((result, chair), (chair, result)):
        assert np.quantile(cKDTree(others).query(points)[0], 0.9) < 0.15


@pytest.mark.parametrize("radius", [1.4, 2.0, 2.5])
def test_the_default_cuts_out_a_small_cluster_that_passes_for_an_object(
    chair: np.ndarray, radius: float
) -> None:
    attacked = blind(chair, 7, (radius, radius), True)
    distances = [
        np.linalg.norm(purifier.trace(attacked)[0].purified - attacked[:7].mean(0), axis=1)
        for purifier in (ifdefense.load(), local_mesh(repaired=False))
    ]
    assert [int((distance < 0.3).sum()) > 0 for distance in distances] == [False, True]


def test_reach_is_not_a_matter_of_frame_and_spares_clean_shapes(chair: np.ndarray) -> None:
    points = torch.from_numpy(chair)
    assert within_reach(points).all()
    spiked = torch.cat([points, torch.tensor([[40.0, 0, 0]])])
    for moved in (spiked, spiked.double() * 1e-6 + 3, spiked * 1e4):
        assert within_reach(moved).tolist() == [True] * len(points) + [False]
    assert within_reach(torch.zeros(20, 3)).all()


def test_first_occurrences_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    points = torch.from_numpy(rng.integers(0, 3, size=(60, 3)).astype(np.float32))
    points[7] = -0.0
    seen: set[tuple[float, ...]] = set()
    naive = []
    for row in (points + 0.0).tolist():
        naive.append(tuple(row) not in seen)
        seen.add(tuple(row))
    assert first_occurrences(points).tolist() == naive


@pytest.mark.parametrize("method", ["onet-mesh", "onet-fill"])
def test_points_are_distinct_where_there_is_a_surface(chair: np.ndarray, method: str) -> None:
    padded = np.concatenate([chair[:512], chair[:1].repeat(512, 0)])
    for cloud in (chair, padded):
        (trace,) = ifdefense.load(method).trace(cloud)
        assert trace.fallback is None
        assert len(np.unique(trace.purified, axis=0)) == 1024
    # Padding says nothing: the result is that of the cloud without it.
    np.testing.assert_array_equal(purify(padded, method), purify(chair[:512], method, num_points=1024))


def test_a_chain_looks_for_duplicates_among_new_points_only(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    look = base.first_occurrences
    monkeypatch.setattr(base, "first_occurrences", lambda points: sizes.append(len(points)) or look(points))
    pair = np.random.default_rng(0).normal(size=(60, 1, 3)) + np.array([[[0, 0, 0], [1e-3, 0, 0]]])
    cloud = np.concatenate([pair.reshape(-1, 3), np.ones((10, 3))])
    chain = [SimpleRandomSampling(1, 10), StatisticalOutlierRemoval(), LocalSmoothing(2)]
    Compose(chain)(cloud, 50)
    assert sizes == [130]  # selections of distinct points are distinct
    sizes.clear()
    (traced,) = Compose([*reversed(chain), StatisticalOutlierRemoval()]).trace(cloud, 30)
    assert sizes[0] == 130 and len(sizes) == 2  # both points of a pair have the same mean
    assert len(np.unique(traced.purified, axis=0)) == 30
