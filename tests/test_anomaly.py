"""Anomalous points: planted ones have the shape they should have, and the surface that rests on them goes."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import ifdefense
from ifdefense.corruptions.planted import plant
from ifdefense.geometry.mesh import Mesh
from ifdefense.geometry.mesh_graph import MeshGraph
from ifdefense.geometry.points import Neighbours
from ifdefense.implicit.anomaly import CONTEXT, NEIGHBOURS, AnomalyNetwork
from ifdefense.implicit.base import Field, load_network
from ifdefense.implicit.local import LocalCode, LocalOccupancyNetwork, Structure
from ifdefense.purifiers.specs import describe, rebuild
from ifdefense.shapes.procedural import make_shape
from ifdefense.stages.anomaly import AnomalyRepair
from ifdefense.stages.extraction import ExtractionOptions, extract_meshes
from ifdefense.stages.repair import cut_out
from ifdefense.training.examples.anomalies import (
    KEPT,
    OFF,
    POINTS,
    WholeClouds,
    draw_example,
    examples,
    scattered,
)
from ifdefense.training.recipes.anomaly import fit_head, recall

Cloud = NDArray[np.float32]
RADIUS = 0.3
BLOB = (0.0, 0.0, 0.42)


def sphere(count: int, seed: int = 0, radius: float = RADIUS) -> Cloud:
    points = np.random.default_rng(seed).normal(size=(count, 3))
    return np.asarray(radius * points / np.linalg.norm(points, axis=1, keepdims=True), np.float32)


def from_sphere(points: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(np.linalg.norm(points, axis=1) - RADIUS, np.float64)


@cache
def mesh_with(centre: tuple[float, float, float] | None, size: float) -> Mesh:
    """The sphere, united with a ball."""

    def field(points: Tensor, _: Tensor) -> Tensor:
        inside: Tensor = RADIUS - points.norm(dim=1)
        if centre is not None:
            inside = torch.maximum(inside, size - (points - points.new_tensor(centre)).norm(dim=1))
        return 20 * inside

    return extract_meshes(field, 1, ExtractionOptions(64, 16, threshold=0.5))[0]


class Judge(AnomalyNetwork):
    """Knows which points are anomalous: those off the sphere."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, cloud: Tensor, field: Field | None = None, row: int = 0) -> tuple[Neighbours, Tensor]:
        return Neighbours(cloud), 20 * ((cloud.norm(dim=1) - RADIUS) > 0.02).float() - 10


@pytest.mark.parametrize("size", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("kind", ["spike", "bump", "blob"])
def test_anomalies_stand_out_of_a_sphere_as_far_as_they_should(kind: str, size: float) -> None:
    planted = plant(sphere(8192), kind, size, 400, np.random.default_rng(1))
    assert planted is not None and planted.shape == (400, 3)
    height = from_sphere(planted)
    lowest, highest = {"spike": (0, size), "bump": (0, size / 2), "blob": (0.04, size + 0.12)}[kind]
    assert height.min() > lowest - 0.015
    assert 0.8 * highest - 0.1 * (kind == "blob") < height.max() < highest + 0.01


def test_a_bridge_spans_free_space_between_two_plates() -> None:
    rng = np.random.default_rng(0)
    plates = rng.uniform(-0.3, 0.3, (8192, 3)).astype(np.float32)
    plates[:, 2] = np.where(np.arange(8192) % 2, 0.08, -0.08)
    planted = plant(plates, "bridge", 0.16, 300, rng)
    assert planted is not None
    assert planted[:, 2].min() < -0.05 and planted[:, 2].max() > 0.05
    assert (np.abs(planted[:, 2]) < 0.04).any()


def test_a_ball_has_no_place_for_a_short_bridge_and_bad_arguments_are_named() -> None:
    assert plant(sphere(40_000), "bridge", 0.05, 10, np.random.default_rng(0)) is None
    with pytest.raises(ValueError, match="no kind of anomaly 'dent'; there are spike, bump"):
        plant(sphere(64), "dent", 0.1, 10, np.random.default_rng(0))
    with pytest.raises(ValueError, match="size must be positive, got 0"):
        plant(sphere(64), "spike", 0, 10, np.random.default_rng(0))


@pytest.mark.parametrize(("centre", "size", "components"), [(BLOB, 0.05, 1), ((0, 0, RADIUS), 0.08, 0)])
def test_what_rests_on_anomalous_points_goes_and_the_rest_stays(
    centre: tuple[float, float, float], size: float, components: int
) -> None:
    mesh = mesh_with(centre, size)
    ball = sphere(300, 1, size) + np.array(centre, np.float32)
    evidence = np.concatenate([sphere(1000), ball[from_sphere(ball) > 0]])
    repair = AnomalyRepair(Judge(), smoothing=1)(mesh, evidence)
    assert from_sphere(mesh.vertices).max() > 0.06
    assert from_sphere(repair.mesh.vertices).max() < 0.03
    assert repair.mesh.is_watertight
    assert (repair.removed_components, repair.rebuilt_regions) == (components, 1 - components)
    kept = {vertex.tobytes() for vertex in repair.mesh.vertices}
    assert all(vertex.tobytes() in kept for vertex in mesh.vertices[~repair.mask])
    assert repair.mask[from_sphere(mesh.vertices) > 0.04].all()
    assert not repair.mask[mesh.vertices[:, 2] < 0].any()
    assert repair.score.shape == (len(mesh.vertices),) and repair.score.max() > 1


def test_a_shape_without_anomalous_points_is_left_alone() -> None:
    mesh = mesh_with(None, 0.0)
    repair = AnomalyRepair(Judge())(mesh, sphere(1000))
    assert not repair.mask.any()
    assert np.array_equal(repair.mesh.vertices, mesh.vertices)


def test_parts_larger_than_allowed_stay() -> None:
    mesh = mesh_with((0, 0, RADIUS), 0.15)
    ball = sphere(300, 1, 0.15) + np.array((0, 0, RADIUS), np.float32)
    evidence = np.concatenate([sphere(1000), ball[from_sphere(ball) > 0]])
    assert AnomalyRepair(Judge())(mesh, evidence).mask.any()
    assert not AnomalyRepair(Judge(), largest=0.05)(mesh, evidence).mask.any()


def test_a_mesh_marked_all_over_comes_back() -> None:
    mesh = mesh_with(None, 0.0)
    score = np.full(len(mesh.vertices), 2, np.float32)
    repair = cut_out(MeshGraph(mesh), np.ones(len(score), bool), score)
    assert repair.mesh is mesh
    assert not repair.mask.any()
    assert cut_out(MeshGraph(Mesh.empty()), np.zeros(0, bool), np.zeros(0, np.float32)).mesh.is_empty


@pytest.mark.parametrize(
    ("evidence", "message"),
    [
        (np.zeros((0, 3)), r"shape \(K, 3\) with K >= 1, got \(0, 3\)"),
        (np.array([[0, np.nan, 0]]), "not finite"),
    ],
)
def test_bad_evidence_is_named(evidence: NDArray[np.float64], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnomalyRepair(Judge())(mesh_with(None, 0.0), evidence)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"core": 0.2}, "must rise in"),
        ({"core": float("nan")}, "must rise in"),
        ({"smoothing": 0}, "smoothing must be at least 1, got 0"),
        ({"largest": 0.0}, "largest a share"),
    ],
)
def test_options_are_checked(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnomalyRepair(Judge(), **options)  # type: ignore[arg-type]


@cache
def shipped() -> AnomalyNetwork:
    return AnomalyNetwork.load()


def test_the_shipped_network_finds_a_blob_beside_a_chair_and_nothing_on_the_chair() -> None:
    dense = make_shape("chair", np.random.default_rng(5)).sample_surface(8192, np.random.default_rng(5))[0]
    blob = plant(dense, "blob", 0.15, 120, np.random.default_rng(2))
    assert blob is not None
    purifier = ifdefense.load()
    clean, attacked = purifier.trace([dense[:POINTS], np.concatenate([dense[:POINTS], blob])], POINTS)
    assert clean.mask is not None and attacked.mask is not None and attacked.mesh is not None
    assert clean.mask.mean() < 0.01
    centre = blob.mean(0)
    beside = np.linalg.norm(attacked.mesh.vertices - centre, axis=1) < 0.1
    assert beside.sum() > 30
    assert attacked.mask[beside].mean() > 0.9
    assert attacked.mask[~beside].mean() < 0.05
    assert np.linalg.norm(attacked.purified - centre, axis=1).min() > 0.07


def test_equal_clouds_get_equal_scores_and_few_points_will_do() -> None:
    network = shipped()
    neighbours, logits = network(torch.from_numpy(sphere(500)))
    again = network(torch.from_numpy(sphere(500)))[1]
    assert torch.equal(logits, again)
    assert neighbours.source.shape == (500, 3) and logits.shape == (500,)
    assert network(torch.from_numpy(sphere(5)))[1].isfinite().all()


def test_a_field_of_its_local_network_spares_it_the_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = torch.from_numpy(sphere(400))
    local = load_network("local")
    assert isinstance(local, LocalOccupancyNetwork)
    field = local.field(local.encode([cloud.flip(0), cloud]))
    network = AnomalyNetwork.load()
    expected = network(cloud, field, 1)[1]  # of another instance: encoded again
    assert network.share(local).local is local
    monkeypatch.setattr(local, "encode", None)
    assert torch.equal(network(cloud, field, 1)[1], expected)
    assert not torch.equal(network(cloud, field, 0)[1], expected)


def test_networks_with_other_weights_are_not_shared() -> None:
    network = AnomalyNetwork.load()
    own, other = network.local, copy.deepcopy(network.local)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert network.share(other).share(network.prior).local is own


def test_the_default_encodes_every_cloud_once_also_as_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    clouds = [sphere(300), sphere(300, 1), sphere(300, 2)]
    purifier = copy.deepcopy(ifdefense.load())
    encoded: list[int] = []
    encode = LocalOccupancyNetwork.codes

    def counted(self: LocalOccupancyNetwork, given: Tensor, graph: Structure) -> LocalCode:
        encoded.append(len(given))
        return encode(self, given, graph)

    monkeypatch.setattr(LocalOccupancyNetwork, "codes", counted)
    traces = purifier.trace(clouds)
    assert all(trace.score is not None for trace in traces)
    assert sum(encoded) == len(clouds)


def test_a_repair_is_described_and_rebuilt() -> None:
    repair = AnomalyRepair(shipped(), core=0.6)
    spec = json.loads(json.dumps(describe(repair)))
    again = rebuild(spec)
    assert again.core == 0.6
    assert describe(again) == spec


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(ValueError, match=r"onet.safetensors: not an anomaly network: it does not name its"):
        AnomalyNetwork.load("onet")
    with pytest.raises(ValueError, match="needed, got onet and onet: OccupancyNetwork and OccupancyNetwork"):
        AnomalyNetwork.untrained("onet", "onet")


def test_a_head_is_saved_without_its_networks_and_refused_beside_others(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    shipped().save(path, note="a test")
    assert path.stat().st_size < 300_000
    again = AnomalyNetwork.load(path)
    for name, value in shipped().state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    other = AnomalyNetwork.untrained("local", "onet")
    with torch.no_grad():
        next(other.prior.parameters()).add_(1)
    other.save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="its head was trained on other weights of local or onet"):
        AnomalyNetwork.load(tmp_path / "other.safetensors")


def test_labels_of_examples_say_what_is_off_the_surface() -> None:
    seen = set()
    for seed in range(12):
        cloud, labels = draw_example(sphere(8192), np.random.default_rng(seed))
        off = np.abs(from_sphere(cloud))
        assert cloud.shape == (len(labels), 3) and cloud.dtype == np.float32
        assert (off[labels == 1] > 0.01).all()
        assert (off[labels == 0] < OFF + 0.01).all()
        seen |= set(labels.tolist())
    assert seen == {-1, 0, 1}


def test_inputs_of_a_point_are_its_own_and_the_means_around_it() -> None:
    neighbours, values = AnomalyNetwork.untrained("local", "onet").features(torch.from_numpy(sphere(300)))
    own, around = values.chunk(2, 1)
    points = neighbours.source
    near = torch.cdist(points, points).topk(CONTEXT, largest=False).indices
    torch.testing.assert_close(around, own[near].mean(1), atol=1e-4, rtol=1e-4)
    support = own[:, -len(NEIGHBOURS) :]
    assert (support[:, 1:] >= support[:, :-1]).all()  # farther neighbours are farther


def test_examples_come_from_the_split_that_is_asked_for_and_a_part_of_every_cloud() -> None:
    shapes = np.stack([sphere(1024), sphere(1024) * np.array([1, 1, 0.1], np.float32)])
    clouds = WholeClouds(5 * shapes + 3, np.array([False, True]))
    assert np.abs(np.ptp(clouds.surface(0)[0], axis=0) - 1).max() < 0.02
    network = AnomalyNetwork.untrained("local", "onet")
    drawn = [examples(network, {"modelnet40": clouds}, 2, 0, held) for held in (False, False, True)]
    for inputs, labels in drawn:
        assert inputs.shape == (2 * KEPT, len(network.head.mean)) and inputs.dtype == torch.float16
        assert labels.shape == (2 * KEPT,)
    assert torch.equal(drawn[0][0], drawn[1][0]) and not torch.equal(drawn[0][0], drawn[2][0])


def test_scattered_groups_are_of_the_size_they_say() -> None:
    sizes = [len(scattered(sphere(2048), np.random.default_rng(seed))) for seed in range(20)]
    assert min(sizes) >= 16 and max(sizes) <= 320


def test_the_head_learns_what_separates_points() -> None:
    torch.manual_seed(0)
    network = AnomalyNetwork.untrained("local", "onet")
    inputs = torch.randn(4000, len(network.head.mean))
    labels = (inputs[:, 3] > 1).long()
    before = recall(network, inputs, labels)
    fit_head(network, inputs, labels, 100, 0)
    assert before < 0.3 < 0.9 < recall(network, inputs, labels)
