"""Purifiers end to end: frames, batches, seeds, devices, fallbacks, planted attacks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from quick import CLOUDS, quick
from torch import Tensor, nn

import ifdefense
from ifdefense import Compose, Defended, Purifier, purify
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.geometry.points import knn
from ifdefense.implicit.base import Calibration, Field, ImplicitNetwork
from ifdefense.purifiers.registry import METHODS
from ifdefense.purifiers.surface import SurfacePurifier
from ifdefense.restorers.mesh import MeshRestorer
from ifdefense.shapes.procedural import make_shape


class Ball:
    """An implicit function known in closed form: a ball of a given radius in the unit cube, for any cloud."""

    def __init__(self, radius: float, **calibration: Any) -> None:
        self.radius = radius
        self.calibration = Calibration(**{"threshold": 0.5, **calibration})

    def encode(self, clouds: Sequence[Tensor], seed: int = 0) -> None:
        return None

    def field(self, code: None) -> Field:
        return lambda points, cloud: 40 * (self.radius - points.norm(dim=-1))


def pipeline(network: ImplicitNetwork, **stages: Any) -> Compose:
    """SOR, the network and its mesh."""
    surface = SurfacePurifier(network, MeshRestorer(**stages), name="surface")
    return Compose([ifdefense.load("sor"), surface], "pipeline")


@pytest.fixture(scope="module")
def chairs() -> np.ndarray:
    clouds = [
        make_shape("chair", np.random.default_rng(s)).sample_surface(512, np.random.default_rng(s))[0]
        for s in range(3)
    ]
    return np.stack(clouds).astype(np.float32)


@pytest.fixture(scope="module")
def purifier() -> Purifier:
    return ifdefense.load("onet-fill")


def nearest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (
        knn(torch.from_numpy(a)[None].double(), torch.from_numpy(b)[None].double(), 1)[0][0, :, 0]
        .sqrt()
        .numpy()
    )


def test_points_of_a_ball_lie_on_the_ball_in_the_caller_s_frame() -> None:
    normal = np.random.default_rng(0).normal(size=(800, 3))
    cloud = 5 * normal / np.linalg.norm(normal, axis=1, keepdims=True) + [100.0, -20.0, 3.0]
    clean = pipeline(Ball(0.5), repair=None)(cloud, num_points=333)
    assert isinstance(clean, np.ndarray) and clean.shape == (333, 3) and clean.dtype == np.float64
    radius = np.linalg.norm(clean - (cloud.min(0) + cloud.max(0)) / 2, axis=1)
    np.testing.assert_allclose(radius, 5.0, rtol=0.02)


def test_offset_is_taken_back_along_the_normals() -> None:
    normal = np.random.default_rng(0).normal(size=(800, 3))
    cloud = normal / np.linalg.norm(normal, axis=1, keepdims=True)
    purifier = pipeline(Ball(0.52, offset=0.02), repair=None)
    radius = np.linalg.norm(purifier(cloud) - (cloud.min(0) + cloud.max(0)) / 2, axis=1)
    np.testing.assert_allclose(radius, 1.0, rtol=0.02)


class Faint(Ball):
    """A ball whose field nowhere reaches a probability of one half, as happens to thin shapes."""

    def field(self, code: None) -> Field:
        return lambda points, cloud: -0.5 - 4 * points.norm(dim=-1)


def test_a_faint_surface_is_found_at_the_second_threshold(caplog: pytest.LogCaptureFixture) -> None:
    cloud = np.random.default_rng(0).uniform(-1, 1, size=(200, 3))
    with caplog.at_level(logging.WARNING):
        (found,) = pipeline(Faint(0.5, second_threshold=0.2)).trace(cloud)
        assert not caplog.records
        (lost,) = pipeline(Faint(0.5)).trace(cloud)
    assert found.fallback is None and found.mesh is not None
    assert lost.fallback == "no surface" and lost.mesh is None


def cheap(method: str) -> str | Purifier:
    """The method by its name; with few steps where it optimises points."""
    return quick(method) if method.endswith("-opt") else method


@pytest.mark.parametrize("method", METHODS)
def test_kinds_shapes_and_counts(chairs: np.ndarray, method: str) -> None:
    before = chairs.copy()
    purifier = cheap(method)
    one = purify(chairs[0], purifier)
    batch = purify(torch.from_numpy(chairs), purifier, num_points=100)
    many = purify([chairs[0], chairs[1][:300]], purifier)
    assert isinstance(one, np.ndarray) and one.shape == (512, 3) and one.dtype == np.float32
    assert isinstance(batch, Tensor) and batch.shape == (3, 100, 3)
    assert [cloud.shape for cloud in many] == [(512, 3), (300, 3)]
    assert np.isfinite(one).all()
    np.testing.assert_array_equal(chairs, before)


@pytest.mark.parametrize("method", METHODS)
def test_results_do_not_depend_on_the_batch(chairs: np.ndarray, method: str) -> None:
    purifier = cheap(method)
    together = purify(chairs, purifier, batch_size=3)
    apart = np.concatenate([purify(chairs[i : i + 1], purifier) for i in range(3)])
    uneven = purify(list(chairs), purifier, batch_size=2)
    np.testing.assert_allclose(together, apart, atol=1e-4)
    np.testing.assert_allclose(together, np.stack(uneven), atol=1e-4)


def test_seeds(chairs: np.ndarray) -> None:
    first, again, other = (purify(chairs[0], seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    state = torch.get_rng_state()
    purify(chairs[0], seed=5)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("scale", "shift"), [(1e-6, 0.0), (1e6, 0.0), (3.0, 1e3), (1.0, -50.0)])
def test_equivariant_to_translation_and_scale(chairs: np.ndarray, scale: float, shift: float) -> None:
    cloud = chairs[0].astype(np.float64)
    moved = purify(cloud * scale + shift)
    np.testing.assert_allclose((moved - shift) / scale, purify(cloud), atol=2e-3)


def test_duplicates_planes_and_few_points_work(chairs: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    duplicated = np.concatenate([chairs[0]] * 2)
    plane = np.c_[rng.uniform(-1, 1, (200, 2)), np.zeros(200)]
    few = chairs[0][:: 512 // 16][:16]
    for cloud in (duplicated, plane, few):
        clean = purify(cloud)
        assert clean.shape == cloud.shape and np.isfinite(clean).all()


def test_without_a_surface_the_filtered_input_is_resampled(
    chairs: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    purifier = pipeline(Ball(-1.0))
    with caplog.at_level(logging.WARNING, "ifdefense"):
        (trace,) = purifier.trace(chairs[0], num_points=700)
    assert "cloud 0: no surface" in caplog.text
    assert trace.fallback == "no surface" and trace.mesh is None and trace.repaired is None
    assert trace.purified.shape == (700, 3)
    assert {tuple(p) for p in trace.purified} == {tuple(p) for p in trace.kept}


def test_trace_tells_every_stage_in_the_caller_s_frame(purifier: Purifier, chairs: np.ndarray) -> None:
    cloud = chairs[0] * 4 + 10
    (trace,) = purifier.trace(cloud)
    np.testing.assert_array_equal(trace.points, cloud)
    assert trace.kept_mask.shape == (512,) and 300 < trace.kept_mask.sum() <= 512
    assert trace.mesh is not None and trace.repaired is not None and trace.fallback is None
    assert trace.score is not None and trace.score.shape == (len(trace.mesh.vertices),) == trace.mask.shape  # type: ignore[union-attr]
    for mesh in (trace.mesh, trace.repaired):
        assert mesh.is_watertight and mesh.volume > 0
        assert np.abs(mesh.vertices.mean(0) - cloud.mean(0)).max() < 2
    assert set(trace.seconds) == {
        "outliers",
        "implicit function",
        "field to mesh",
        "mesh repair",
        "resampling",
    }
    np.testing.assert_array_equal(trace.purified, purifier(cloud))


def test_outliers_do_not_reach_the_result(purifier: Purifier, chairs: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    attacked = np.concatenate([chairs[0], rng.uniform(-1.5, 1.5, (20, 3)).astype(np.float32)])
    clean = purifier(attacked, num_points=512)
    assert nearest(clean, chairs[0]).max() < 0.35 < nearest(attacked, chairs[0]).max()


def test_random_sampling_draws_from_the_seed(chairs: np.ndarray) -> None:
    first, again, other = (purify(chairs[0], "srs", num_points=200, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    kept = [ifdefense.load("srs").trace(chairs[0], seed=seed)[0].kept_mask for seed in (1, 2)]
    assert kept[0].sum() == kept[1].sum() == 512 - 250 and (kept[0] != kept[1]).any()
    assert not np.array_equal(first, other)


def test_sor_and_srs_keep_points_of_the_input(chairs: np.ndarray) -> None:
    for method, least in (("sor", 400), ("srs", 262)):
        clean = purify(chairs[0], method)
        assert {tuple(p) for p in clean} <= {tuple(p) for p in chairs[0]}
        assert len({tuple(p) for p in clean}) >= least


def test_defended_is_a_classifier_of_purified_clouds() -> None:
    purifier, points = quick("onet-fill"), CLOUDS.clone()

    class Extent(nn.Module):
        def forward(self, points: Tensor) -> Tensor:
            return points.amax(1) - points.amin(1)

    plain = Defended(Extent(), purifier, num_points=128, normalise=False, seed=3)
    torch.testing.assert_close(plain(points), Extent()(purifier(points, 128, 3)))
    defended = Defended(Extent(), purifier, num_points=128, seed=3)
    torch.testing.assert_close(defended(points), Extent()(to_unit_sphere(purifier(points, 128, 3))))
    assert not defended(points.requires_grad_()).requires_grad


def test_a_part_may_be_in_a_chain_twice(chairs: np.ndarray) -> None:
    part = ifdefense.load("sor")
    twice, chain = Compose([part, part]), Compose([part, ifdefense.load("sor")])
    np.testing.assert_array_equal(twice(chairs, 100), chain(chairs, 100))


def test_double_and_half_precision_come_back(chairs: np.ndarray) -> None:
    for dtype in (torch.float16, torch.float64):
        assert purify(torch.from_numpy(chairs).to(dtype)).dtype == dtype


ERRORS = {
    "method": (
        lambda c: purify(c, "onet"),
        "unknown method 'onet'; there are local-mesh, local-random",
    ),
    "removed": (
        lambda c: purify(c, "local-random-newton"),
        "local-random-newton is no longer a method: use local-random, which passes gradients",
    ),
    "count": (lambda c: purify(c, num_points=0), "num_points must be at least 1, got 0"),
    "batch": (lambda c: purify(c, batch_size=0), "batch_size must be at least 1, got 0"),
    "cloud": (lambda c: purify([c[0], c[1] * np.nan]), "cloud 1 has 512 points with NaN"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(chairs: np.ndarray, name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call(chairs)
