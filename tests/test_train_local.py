"""Training of local occupancy networks: labels, corruptions, sets of surfaces, and the command."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

from ifdefense.checkpoints import load_metadata
from ifdefense.cli import main
from ifdefense.corruptions.combined import KINDS, CombinedOptions, draw_corrupted
from ifdefense.data.cloudset import CloudSet
from ifdefense.implicit.base import Calibration, Field, load_network
from ifdefense.implicit.local import LocalConfig, LocalOccupancyNetwork
from ifdefense.training.data import surfaces as data
from ifdefense.training.data.cache import cached_set
from ifdefense.training.data.surfaces import (
    DenseSurfaces,
    held_out,
    surfaces_from_clouds,
    surfaces_from_meshes,
    surfaces_from_procedural,
)
from ifdefense.training.examples.thickened_surfaces import (
    SampledSurface,
    ThickenedOptions,
    ThickenedSampler,
    draw_cloud,
    draw_queries,
    random_rotation,
    soft_labels,
)
from ifdefense.training.fit import ImplicitRun, TrainOptions, fit
from ifdefense.training.recipes import implicit, local

Floats = NDArray[np.float32]

TINY = LocalConfig(width=16, coarse=16, values=12, hidden=16, neighbours=4, moments=8, nearest=3, blocks=1)
SAMPLING = ThickenedOptions(batch_size=4, counts=(64,), queries=64)
STILL = CombinedOptions(clean=1.0, jitter=0.0)


def ball(count: int, seed: int = 0) -> tuple[Floats, Floats]:
    """Samples and normals of the sphere of radius 0.5."""
    normals = np.random.default_rng(seed).normal(size=(count, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    return (normals / 2).astype(np.float32), normals.astype(np.float32)


def box(count: int, seed: int = 0) -> tuple[Floats, Floats]:
    """Samples and normals of the unit cube."""
    rng = np.random.default_rng(seed)
    points, normals = rng.uniform(-0.5, 0.5, (count, 3)), np.zeros((count, 3))
    axis, sign = rng.integers(0, 3, count), rng.choice([-1.0, 1.0], count)
    rows = np.arange(count)
    points[rows, axis], normals[rows, axis] = sign / 2, sign
    return points.astype(np.float32), normals.astype(np.float32)


def box_distance(queries: Floats) -> Floats:
    """Distance of queries from the surface of the unit cube."""
    beyond = np.abs(queries) - 0.5
    inside = np.minimum(beyond.max(1), 0)
    distance: Floats = np.abs(np.linalg.norm(np.maximum(beyond, 0), axis=1) + inside)
    return distance


def solids(samples: int = 2048) -> DenseSurfaces:
    """Balls and boxes, one of each held out."""
    rows = [shape(samples, seed) for seed in range(2) for shape in (ball, box)]
    points = np.stack([np.rint(points * 65534).clip(-32767, 32767) for points, _ in rows]).astype(np.int16)
    normals = np.stack([np.rint(normals * 127) for _, normals in rows]).astype(np.int8)
    return DenseSurfaces(points, normals, np.array([0, 1, 0, 1]), np.array([False, False, True, True]))


def train(
    folder: Path,
    options: TrainOptions,
    sampling: ThickenedOptions = SAMPLING,
    corruption: CombinedOptions | None = None,
    **rest: Any,
) -> ImplicitRun:
    torch.manual_seed(options.seed)
    network = LocalOccupancyNetwork(TINY)
    examples = ThickenedSampler({"solids": solids()}, sampling, corruption)
    layers = local.adam_layers(network)
    return fit(network, examples, examples.validation(2, 64), folder, options, adam_layers=layers, **rest)


def test_distances_are_those_of_the_tangent_planes() -> None:
    """Exact for a box; for a ball up to its curvature."""
    queries = np.random.default_rng(1).uniform(-0.6, 0.6, (4000, 3)).astype(np.float32)
    exact = box_distance(queries)
    # Nearest to one face, as the second largest coordinate tells.
    face = (np.sort(np.abs(queries), 1)[:, 1] < 0.4) & (exact < 0.08)
    assert face.sum() > 400
    found = SampledSurface(*box(16384), slack=0.1).distances(queries[face])
    np.testing.assert_allclose(found, exact[face], atol=1e-6)
    radius = np.linalg.norm(queries, axis=1)
    near = np.abs(radius - 0.5) < 0.05
    found = SampledSurface(*ball(16384), slack=0.1).distances(queries[near])
    np.testing.assert_allclose(found, np.abs(radius[near] - 0.5), atol=1.5e-3)
    labels = soft_labels(found, 0.015, 0.004)
    expected = 1 / (1 + np.exp((np.abs(radius[near] - 0.5) - 0.015) / 0.004))
    assert np.abs(labels - expected).mean() < 2e-3


@pytest.mark.parametrize("shape", [ball, box])
def test_tangent_planes_end_at_the_spacing_of_the_samples(
    shape: Callable[[int], tuple[Floats, Floats]],
) -> None:
    rng = np.random.default_rng(1)
    surface = SampledSurface.of_samples(*shape(16384), rng)
    assert 0.01 < surface.slack < 0.02
    queries = rng.uniform(-0.6, 0.6, (4000, 3)).astype(np.float32)
    exact = box_distance(queries) if shape is box else np.abs(np.linalg.norm(queries, axis=1) - 0.5)
    error = np.abs(surface.distances(queries) - exact)
    assert error.max() < surface.slack
    assert error[exact < 0.03].mean() < 3e-4
    beside = np.array([[0.7, 0.7, 0]], np.float32)  # in the plane of no face
    assert SampledSurface(*box(16384), slack=0.0).distances(beside)[0] == pytest.approx(
        0.2 * 2**0.5, abs=0.01
    )


def test_labels_are_a_logistic_around_the_offset() -> None:
    distances = np.array([0, 0.015, 0.019, 9], np.float32)
    expected = [1 / (1 + np.exp(-3.75)), 0.5, 1 / (1 + np.e), 0]
    np.testing.assert_allclose(soft_labels(distances, 0.015, 0.004), expected, atol=1e-6)


def test_surfaces_are_scaled_and_rotated_with_their_normals() -> None:
    rng = np.random.default_rng(0)
    axes = np.array([1.0, 0.5, 0.25])
    for _ in range(8):
        rotation = random_rotation(rng)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
        points, normals = solids().surface(0, axes, rotation)
        np.testing.assert_allclose(np.ptp(points, 0).max(), 1, rtol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, rtol=1e-5)
        # On the ellipsoid |x / a| = r, and normals are along its gradient x / a².
        own = points @ rotation.T
        level = np.linalg.norm(own / axes, axis=1)
        assert level.std() / level.mean() < 0.02
        gradient = own / axes**2
        cosine = (gradient * (normals @ rotation.T)).sum(1) / np.linalg.norm(gradient, axis=1)
        assert np.quantile(cosine, 0.05) > 0.98


def only(kind: str, **options: float) -> CombinedOptions:
    """Clouds with one kind of corruption and nothing else."""
    weights = dict.fromkeys(KINDS, 0.0) | {kind: 1.0}
    return CombinedOptions(clean=0.0, uneven=0.0, **(weights | options))


def distance_from_ball(points: Floats) -> Floats:
    distance: Floats = np.abs(np.linalg.norm(points, axis=1) - 0.5)
    return distance


@pytest.mark.parametrize(
    ("kind", "largest", "moved"),
    [("gauss", 0.1, 0.5), ("box", 0.032 * 3**0.5, 0.9), ("far", 0.15, 0.01), ("smooth", 0.06, 0.5)],
)
def test_displacements_are_bounded(kind: str, largest: float, moved: float) -> None:
    rng = np.random.default_rng(0)
    clouds = [draw_corrupted(ball(5000)[0], 500, only(kind), rng) for _ in range(30)]
    assert all(cloud.shape == (500, 3) and cloud.dtype == np.float32 for cloud in clouds)
    distances = distance_from_ball(np.concatenate(clouds))
    assert distances.max() <= largest + 1e-6
    assert (distances > 1e-5).mean() > moved


def test_drops_remove_regions_and_fill_up_from_the_rest() -> None:
    rng = np.random.default_rng(0)
    dense = ball(5000)[0]
    gaps = []
    for _ in range(30):
        cloud = draw_corrupted(dense, 500, only("drop"), rng)
        assert cloud.shape == (500, 3)
        assert distance_from_ball(cloud).max() < 1e-5
        gaps.append(np.linalg.norm(dense[:500, None] - cloud[None], axis=2).min(1).max())
    whole = np.linalg.norm(dense[:500, None] - dense[None, 1000:1500], axis=2).min(1).max()
    assert np.median(gaps) > 1.5 * whole


@pytest.mark.parametrize(("kind", "most"), [("cluster", 199), ("outliers", 99)])
def test_added_points_are_few(kind: str, most: int) -> None:
    rng = np.random.default_rng(0)
    added = [
        int((distance_from_ball(draw_corrupted(ball(5000)[0], 500, only(kind), rng)) > 1e-5).sum())
        for _ in range(30)
    ]
    assert 0 < max(added) <= most
    assert len(set(added)) > 5


def test_clean_clouds_have_jitter_only() -> None:
    cloud = draw_corrupted(ball(5000)[0], 500, CombinedOptions(clean=1.0), np.random.default_rng(0))
    assert 0 < distance_from_ball(cloud).max() < 0.003 * 5
    still = draw_corrupted(ball(5000)[0], 500, STILL, np.random.default_rng(0))
    assert distance_from_ball(still).max() < 1e-6


def test_kinds_are_drawn_by_their_weights() -> None:
    rng = np.random.default_rng(0)
    drawn = [CombinedOptions().draw_kinds(rng) for _ in range(2000)]
    sizes = np.bincount([len(kinds) for kinds in drawn], minlength=4) / 2000
    np.testing.assert_allclose(sizes, [0, 0.6, 0.3, 0.1], atol=0.04)
    single = [next(iter(kinds)) for kinds in drawn if len(kinds) == 1]
    assert single.count("box") / len(single) == pytest.approx(0.32, abs=0.04)
    assert only("far", second=1.0, third=1.0).draw_kinds(rng) == {"far"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clean": 1.5}, r"clean is 1.5, outside \[0, 1\]"),
        ({"sigma": -1}, r"sigma is -1, outside \[0, inf\)"),
        ({"far": float("nan")}, "far is nan"),
        (dict.fromkeys(KINDS, 0.0), "are all 0"),
    ],
)
def test_bad_corruptions_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CombinedOptions(**options)


def test_clouds_are_in_their_own_unit_cube_without_outliers() -> None:
    dense = ball(5000)[0]
    for filtered in (0.0, 1.0):
        rng = np.random.default_rng(0)
        cloud, moved = draw_cloud(dense, 300, filtered, only("outliers"), rng)
        assert cloud.shape == (300, 3)
        np.testing.assert_allclose(cloud.min(0) + cloud.max(0), 0, atol=1e-6)
        assert np.ptp(cloud, 0).max() == pytest.approx(1)
        # The surface moves along: the points that are not outliers stay on it.
        gap = np.linalg.norm(cloud[:, None] - moved[None], axis=2).min(1)
        assert (gap < 1e-5).mean() > 0.6
        outliers = (gap > 0.1).sum()
        assert outliers == 0 if filtered else outliers > 3


def test_few_points_are_repeated() -> None:
    cloud, _ = draw_cloud(ball(100)[0], 300, 1.0, STILL, np.random.default_rng(0))
    assert cloud.shape == (300, 3)


def test_queries_about_missing_parts_lie_there() -> None:
    dense = ball(5000)[0]
    half = dense[dense[:, 2] < 0][:400]
    options = ThickenedOptions(queries=400, uniform=0, near_surface=0, near_points=0)
    queries = draw_queries(half, dense, options, np.random.default_rng(0))
    assert queries.shape == (400, 3)
    assert (queries[:, 2] > 0).mean() > 0.9
    assert np.median(distance_from_ball(queries)) < 0.05
    uniform = dataclasses.replace(options, uniform=1.0)
    anywhere = draw_queries(half, dense, uniform, np.random.default_rng(0))
    assert np.abs(anywhere).max() <= 0.6
    np.testing.assert_allclose(anywhere.std(0), 1.2 / 12**0.5, rtol=0.1)


def test_labels_of_a_batch_follow_the_surface_through_every_corruption() -> None:
    """Half of the queries are about samples of the surface, wherever the cloud's frame is."""
    sampling = dataclasses.replace(SAMPLING, queries=400, uniform=0.5, near_surface=0.5, near_points=0)
    sampler = ThickenedSampler({"solids": solids()}, sampling)
    clouds, queries, labels = sampler.draw(torch.Generator().manual_seed(0))
    assert clouds.shape == (4, 64, 3) and queries.shape == (4, 400, 3) and labels.shape == (4, 400)
    assert clouds.dtype == queries.dtype == labels.dtype == torch.float32
    assert 0.01 < labels[:, :200].mean() < 0.3 < labels[:, 200:].mean() < 0.9
    again = sampler.draw(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip((clouds, queries, labels), again, strict=True))


def test_surfaces_are_drawn_by_source_and_root_of_the_class() -> None:
    data = solids(64)
    more = dataclasses.replace(
        data, labels=np.array([0, 1, 1, 1, 1]), held=np.zeros(5, bool), points=data.points[[0, 1, 1, 1, 1]]
    )
    sampler = ThickenedSampler({"a": more, "b": data}, SAMPLING, mix={"a": 3.0, "b": 1.0})
    assert len(sampler) == 7
    np.testing.assert_allclose(sampler._train[1], [0.25, *[0.125] * 4, 0.125, 0.125])
    assert [row[0] for row in sampler._held[0]] == ["b", "b"]
    with pytest.raises(ValueError, match=r"the mix names \['c'\], the sources are \['a'\]"):
        ThickenedSampler({"a": data}, SAMPLING, mix={"c": 1.0})
    with pytest.raises(ValueError, match="none of the surfaces is held out"):
        ThickenedSampler({"a": more}, SAMPLING).validation(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 3}, "queries must be at least 16, got 3"),
        ({"counts": ()}, "counts must be at least 16 points"),
        ({"counts": (8, 64)}, "counts must be at least 16 points"),
        ({"uniform": 0.9}, "must sum to at most 1"),
    ],
)
def test_bad_sampling_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThickenedOptions(**options)  # type: ignore[arg-type]


def test_sets_are_saved_mapped_and_cached(tmp_path: Path) -> None:
    built = itertools.count()

    def build() -> DenseSurfaces:
        next(built)
        return solids(64)

    for _ in range(2):
        found = cached_set(tmp_path / "set", build, DenseSurfaces.load, {"samples": 64})
        assert isinstance(found.points, np.memmap)
        assert (found.points == solids(64).points).all() and found.digest() == solids(64).digest()
    assert next(built) == 1
    cached_set(tmp_path / "set", build, DenseSurfaces.load, {"samples": 65})
    assert next(built) == 3


def test_every_tenth_of_a_class_is_held_out() -> None:
    labels = np.repeat([0, 1, 2], [4, 5, 25])
    assert np.flatnonzero(held_out(labels)).tolist() == [8, 13, 23, 33]


def test_procedural_surfaces_lie_in_the_unit_cube() -> None:
    data = surfaces_from_procedural(5, samples=200)
    assert len(data) == 80 and data.held.sum() == 16
    points, normals = data.surface(3)
    assert np.ptp(points, 0).max() == pytest.approx(1)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, rtol=1e-5)


def test_packed_meshes_are_sampled_with_the_normals_of_their_faces(tmp_path: Path) -> None:
    folder = tmp_path / "furniture"
    folder.mkdir()
    (folder / "classes.txt").write_text("kitchen\n")
    square = np.array([[0, 0, 0], [65535, 0, 0], [65535, 65535, 0], [0, 65535, 0]], np.uint16)
    np.savez(
        folder / "furniture_0.npz",
        vertices=np.tile(square, (6, 1)) * np.repeat([1, 0, 1, 1, 1, 1], 4)[:, None].astype(np.uint16),
        faces=np.tile([[0, 1, 2], [0, 2, 3]], (6, 1)),
        vertex_offset=np.arange(7) * 4,
        face_offset=np.arange(7) * 2,
        label=np.zeros(6, np.uint8),
        name=np.array(list("abcdef")),
    )
    data = surfaces_from_meshes(tmp_path, "furniture", samples=100)
    assert len(data) == 5, "the second mesh has no area"
    assert np.flatnonzero(data.held).tolist() == [3], "the fifth mesh"
    points, normals = data.surface(0)
    assert np.ptp(points, 0)[2] == 0
    np.testing.assert_allclose(np.abs(normals), [[0, 0, 1]] * 100, atol=1e-6)


class BallTeacher:
    """Knows the ball of radius 0.5, thickened by 0.05, whatever the cloud is."""

    calibration = Calibration(box=1.3, threshold=0.5, offset=0.05, points=None)

    def encode(self, clouds: Sequence[torch.Tensor], seed: int = 0) -> Any:
        return len(clouds)

    def field(self, code: Any) -> Field:
        return lambda points, cloud: (0.55 - points.norm(dim=1)) * 100


def test_a_teacher_labels_the_clouds_that_fit_its_surface() -> None:
    rng = np.random.default_rng(0)
    clouds = np.stack([ball(2000)[0] * 3, rng.uniform(-1, 1, (2000, 3)), ball(2000, 1)[0]], dtype=np.float32)
    names = np.array(["a", "b", "c"])
    data = CloudSet(clouds, np.array([0, 1, 1]), names, ("x", "y"))
    found = surfaces_from_clouds(data, BallTeacher(), samples=8000)
    assert sorted(found.labels) == [0, 1] and not found.held.any()
    for index in range(2):
        points, normals = found.surface(index)
        assert distance_from_ball(points).max() < 0.02
        assert ((points * normals).sum(1) / np.linalg.norm(points, axis=1)).min() > 0.9
    assert len(surfaces_from_clouds(data, BallTeacher(), limit=1, samples=8000)) == 1


def test_adam_trains_the_layers_of_positions_and_the_outermost_ones() -> None:
    network = LocalOccupancyNetwork(TINY)
    chosen = {id(layer) for layer in local.adam_layers(network)}
    hidden = {
        name for name, m in network.named_modules() if isinstance(m, torch.nn.Linear) and id(m) not in chosen
    }
    assert {"encoder.second", "decoder.inner", "decoder.attend", "encoder.fine.0.source"} <= hidden
    assert not any("position" in name or "absolute" in name for name in hidden)
    assert not {"encoder.first", "encoder.values", "encoder.whole_1", "decoder.out"} & hidden


def test_a_tiny_network_learns_two_solids(tmp_path: Path) -> None:
    sampling = dataclasses.replace(
        SAMPLING, offset=0.06, softness=0.01, uniform=1.0, near_surface=0.0, near_points=0.0
    )
    options = TrainOptions(
        steps=60, warmup=5, ema=0.9, muon_lr=0.03, adam_lr=1e-2, max_norm=64.0, bfloat16=True
    )
    run = train(tmp_path, options, sampling, STILL, every=15)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]
    assert run.best["clean"] > 0.5, "0.38 if everything is inside"


SMALL = "--width 16 --coarse 16 --values 12 --hidden 16 --queries 32 --batch-size 2 --steps 2 --warmup 1"


def test_the_command_writes_weights_and_their_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implicit, "MEASURED", 1)
    monkeypatch.setattr(local, "VALIDATED", 2)
    monkeypatch.setattr(
        data, "surfaces_from_procedural", lambda per_class: surfaces_from_procedural(per_class, samples=1000)
    )
    paths = [f"--{name}={tmp_path / name}" for name in ("cache", "run")]
    out = tmp_path / "local.safetensors"
    arguments = ["train", "local", *SMALL.split(), "--per-class", "5", *paths, "--out", str(out)]
    outcome = CliRunner().invoke(main, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert "validation Chamfer-L1: " in outcome.output
    network = load_network(out)
    assert isinstance(network, LocalOccupancyNetwork)
    assert network.config == LocalConfig(width=16, coarse=16, values=12, hidden=16)
    assert network.calibration == Calibration(1.2, 0.5, 0.2, 0.015, 1024)
    metadata = load_metadata(out)
    assert metadata["network"] == "local"
    assert json.loads(metadata["config"]) == dataclasses.asdict(network.config)
    card = out.with_suffix(".md").read_text()
    assert "* data: procedural (weight 1, 64 surfaces)" in card
    assert '"adam_beta2": 0.99' in card and '"max_norm": 32.0' in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--mix modelnet40 --mix meshes", "--mix modelnet40 and --teacher are given together"),
        ("--teacher there.safetensors", "--mix modelnet40 and --teacher are given together"),
        ("--mix modelnet40 --teacher there.safetensors", "the mix needs a second source"),
        ("--mix shapenet", "'shapenet' is not one of meshes, furniture, procedural, modelnet40"),
        ("--width 4", "width must be at least 8, got 4"),
        ("--coarse 4", "coarse must be at least 8, got 4"),
        ("--values 50", "values must be a multiple of 6"),
        ("--out there.safetensors", "exists already; --force replaces it"),
        ("--queries 2", "queries must be at least 16, got 2"),
        ("--mix meshes", "set the variable IFDEFENSE_DATA"),
    ],
)
def test_the_command_refuses_bad_options_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IFDEFENSE_DATA", raising=False)
    monkeypatch.setattr(implicit, "fit", lambda *_, **__: pytest.fail("a training began"))
    Path("there.safetensors").touch()
    outcome = CliRunner().invoke(main, ["train", "local", "--run", "run", *arguments.split()])
    assert outcome.exit_code in (1, 2) and message in outcome.output, outcome.output
    assert isinstance(outcome.exception, SystemExit)
