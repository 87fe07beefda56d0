"""Training: labels follow the augmentation, the rate its schedule, and runs resume bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ifdefense.checkpoints import load_into, load_state
from ifdefense.implicit.occupancy import OccupancyConfig, OccupancyNetwork
from ifdefense.shapes.procedural import make_shape
from ifdefense.training.collections import from_procedural, to_unit_cube
from ifdefense.training.fit import Sampler, TrainOptions, bounding_cube, fit, schedule
from ifdefense.training.muon import Muon, orthogonalise, split_parameters
from ifdefense.training.occupancies import OFFSET, OccupancySet, cell_centres, field_from_shape
from ifdefense.training.onet import train_command
from ifdefense.training.surfaces import chamfer_l1

TINY = TrainOptions(OccupancyConfig(16, 16, 16), steps=8, batch=4, points=40, queries=64, warmup=2)


@pytest.fixture(scope="module")
def shapes() -> OccupancySet:
    return from_procedural(1, seed=0)


def test_labels_follow_the_shape_through_every_augmentation(shapes: OccupancySet) -> None:
    """With clean input the encoder's points must lie on the labelled surface."""
    options = dataclasses.replace(
        TINY, batch=64, clean=1.0, jitter=0.0, turn=0.5, stretch=1.3, near=0.0, queries=200
    )
    clouds, queries, labels = Sampler(shapes, options).draw(torch.Generator().manual_seed(0))
    on_surface = labels[:, :100].float().mean(1)  # the solid is thickened: its own surface is inside
    assert on_surface.min() > 0.9
    low, high = clouds.amin(1), clouds.amax(1)
    torch.testing.assert_close(low + high, torch.zeros(64, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close((high - low).amax(1), torch.ones(64))
    far = queries[:, 100:].abs().amax(-1) > 0.57  # beyond the cloud's box and the thickening
    assert labels[:, 100:][far].float().mean() < 0.05
    assert 0.02 < labels[:, 100:].float().mean() < 0.5


def test_labels_of_a_ball_are_those_of_its_ellipsoid() -> None:
    centres = cell_centres()
    ball = OFFSET + 0.4 - np.linalg.norm(centres, axis=1)
    field = np.clip(np.rint(ball * 1000), -127, 127).astype(np.int8).reshape(1, 48, 48, 48)
    normal = np.random.default_rng(0).normal(size=(1, 1024, 3))
    surface = (0.4 * normal / np.linalg.norm(normal, axis=-1, keepdims=True)).astype(np.float16)
    data = OccupancySet(surface, field, np.zeros(1, dtype=np.int64), ("ball",))
    options = dataclasses.replace(TINY, batch=8, points=1000, clean=1.0, jitter=0.0, queries=512)
    clouds, queries, labels = Sampler(data, options).draw(torch.Generator().manual_seed(1))
    half = clouds.abs().amax(1, keepdim=True)  # semi-axes of the stretched ball in the encoder's frame
    level = (queries / half).norm(dim=-1)
    grown = 1 + OFFSET / 0.4
    assert not labels[level > grown + 0.1].any()
    assert labels[level < grown - 0.1].all()


def test_corrupted_input_moves_the_frame_but_not_the_label(shapes: OccupancySet) -> None:
    options = dataclasses.replace(TINY, batch=32, clean=0.0, queries=100)
    sampler = Sampler(shapes, options)
    clouds, _, _ = sampler.draw(torch.Generator().manual_seed(0))
    centre, extent = bounding_cube(clouds)
    torch.testing.assert_close(centre, torch.zeros_like(centre), atol=1e-5, rtol=0)
    torch.testing.assert_close(extent, torch.ones_like(extent))


def test_mix_weighs_the_sources(shapes: OccupancySet) -> None:
    half = np.arange(len(shapes)) % 4 == 0
    data = dataclasses.replace(shapes, source=half.astype(np.int64), sources=("rest", "quarter"))
    weight = Sampler(data, TINY, {"quarter": 3.0, "rest": 1.0}).weight
    assert weight[torch.from_numpy(half)].sum() == pytest.approx(0.75)
    assert Sampler(data, TINY, {"quarter": 1.0}).weight[~torch.from_numpy(half)].sum() == 0
    with pytest.raises(ValueError, match="unknown sources"):
        Sampler(data, TINY, {"shapenet": 1.0})


def test_rate_warms_up_holds_and_decays() -> None:
    options = TrainOptions(steps=1000, warmup=100, decay=0.4)
    rates = [schedule(step, options) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[99:600] == [1.0] * 501
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[600:]))
    assert rates[-1] == pytest.approx(0.01, rel=0.1)


def test_an_interrupted_run_resumes_bit_for_bit(shapes: OccupancySet, tmp_path: Path) -> None:
    whole = fit(shapes, shapes, tmp_path / "whole", TINY, every=4, validate=4)
    fit(shapes, shapes, tmp_path / "cut", TINY, every=4, validate=4, stop_after=4)
    assert torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["step"] == 4
    resumed = fit(shapes, shapes, tmp_path / "cut", TINY, every=4, validate=4)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    curve = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    again = [json.loads(line)["loss"] for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert curve == again and len(curve) == 2


def test_training_learns(shapes: OccupancySet, tmp_path: Path) -> None:
    options = dataclasses.replace(TINY, steps=120, batch=16, queries=128, warmup=10)
    fit(shapes, shapes, tmp_path, options, every=40, validate=16)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.93 * losses[0]


def test_command_writes_weights_and_card(tmp_path: Path) -> None:
    arguments = [
        "--steps",
        "4",
        "--batch",
        "4",
        "--queries",
        "32",
        "--widths",
        "16",
        "16",
        "16",
        "--per-class",
        "1",
    ]
    arguments += ["--cache", str(tmp_path / "cache"), "--run", str(tmp_path / "run"), "--every", "2"]
    out = tmp_path / "weights" / "onet.safetensors"
    result = CliRunner().invoke(train_command, [*arguments, "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    state = load_state(out)
    network = OccupancyNetwork(OccupancyConfig.of_state(state))
    load_into(network, state, out)
    card = out.with_suffix(".md").read_text()
    assert "validation IoU" in card and "procedural (weight 1)" in card and "seed: 0" in card
    bad = CliRunner().invoke(train_command, ["--mix", "shapenet=1"])
    assert bad.exit_code == 2 and "none of modelnet40, meshes, procedural" in bad.output


def test_unit_cube() -> None:
    cloud = to_unit_cube(np.random.default_rng(0).uniform(3, 9, (50, 3)) * [1, 2, 1])
    assert np.abs(cloud).max() == pytest.approx(0.5) and np.ptp(cloud, axis=0).max() == pytest.approx(1)


def test_procedural_fields_agree_with_their_shapes(shapes: OccupancySet) -> None:
    shape = make_shape("airplane", np.random.default_rng([0, 0, 0]))
    np.testing.assert_array_equal(shapes.fields[0], field_from_shape(shape))


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.min() > 0.6 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(
        orthogonalise(matrix).ravel(), (left @ right).ravel(), dim=0
    )
    assert cosine > 0.97


def test_muon_takes_steps_of_its_length_whatever_the_gradient() -> None:
    for scale in (1e-4, 1e4):
        weight = torch.nn.Parameter(torch.zeros(8, 8, 1))
        optimiser = Muon([weight], lr=0.1)
        weight.grad = scale * torch.randn(8, 8, 1, generator=torch.Generator().manual_seed(1))
        optimiser.step()
        assert 0.06 < torch.linalg.matrix_norm(weight.detach()[..., 0], 2) < 0.13


def test_weight_decay_bounds_weights_that_no_gradient_holds() -> None:
    weight = torch.nn.Parameter(torch.full((4, 4, 1), 3.0))
    optimiser = Muon([weight], lr=0.1, weight_decay=0.5)
    weight.grad = torch.zeros_like(weight)
    for _ in range(3):
        optimiser.step()
    torch.testing.assert_close(weight.detach(), torch.full((4, 4, 1), 3 * 0.95**3))


class Ball(OccupancyNetwork):
    """A ball of a given radius, whatever it is given."""

    def __init__(self, radius: float) -> None:
        super().__init__(OccupancyConfig(4, 4, 4))
        self.radius = radius

    def field(self, code: torch.Tensor) -> object:  # type: ignore[override]
        return lambda points, cloud: 40 * (self.radius - points.norm(dim=-1))


def test_chamfer_l1_of_surfaces_known_in_closed_form() -> None:
    normal = np.random.default_rng(0).normal(size=(3, 1024, 3))
    points = (0.5 * normal / np.linalg.norm(normal, axis=2, keepdims=True)).astype(np.float16)
    held = OccupancySet(points, np.zeros((3, 2, 2, 2), np.int8), np.zeros(3, np.int64), ("balls",))
    options = TrainOptions(points=64)
    exact = chamfer_l1(Ball(0.5 + OFFSET), held, options)["clean"]
    larger = chamfer_l1(Ball(0.6 + OFFSET), held, options)
    # Between two random samplings of a sphere of area pi the mean distance is about half the spacing.
    assert exact == pytest.approx(10 * 0.5 * (np.pi / 1024) ** 0.5, rel=0.15)
    assert larger["clean"] == pytest.approx(1.0, rel=0.1) and larger["missing"] == 0
    assert chamfer_l1(Ball(-1.0), held, options)["missing"] == 1


def test_only_hidden_matrices_are_muon_s() -> None:
    network = OccupancyNetwork(OccupancyConfig(8, 8, 8))
    edge = (network.encoder.fc_pos, network.decoder.fc_p, network.decoder.fc_out)
    hidden, others = split_parameters(network, edge)
    assert len(hidden) + len(others) == len(list(network.parameters()))
    assert {id(p) for p in others} >= {id(network.decoder.fc_p.weight), id(network.decoder.fc_out.weight)}
    assert any(p is network.encoder.block_3.fc_0.weight for p in hidden)
