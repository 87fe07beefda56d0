"""Training of implicit networks: augmented labels, learning rate schedule, resumption."""

from __future__ import annotations

import dataclasses
import errno
import functools
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ifdefense.checkpoints import load_into, load_metadata, load_state
from ifdefense.data.errors import DataError
from ifdefense.data.formats import files
from ifdefense.geometry.frame import bounding_cubes
from ifdefense.implicit.base import Calibration, load_network
from ifdefense.implicit.convolutional import ConvolutionalConfig, ConvolutionalNetwork
from ifdefense.implicit.occupancy import OccupancyConfig, OccupancyNetwork
from ifdefense.shapes.procedural import make_shape
from ifdefense.training.chamfer import chamfer_l1
from ifdefense.training.data import solid_sources
from ifdefense.training.data.solid_sources import cached, solids_from_procedural, to_unit_cube
from ifdefense.training.data.solids import OFFSET, OccupancySet, cell_centres, grid_from_shape
from ifdefense.training.examples.occupancy import OccupancySampler, SamplingOptions
from ifdefense.training.fit import Batch, ImplicitRun, TrainOptions, fit, schedule
from ifdefense.training.muon import Muon, orthogonalise, split_parameters
from ifdefense.training.recipes import convonet
from ifdefense.training.recipes.onet import train_command
from ifdefense.training.runs import RunError

TINY = TrainOptions(steps=8, warmup=2)
SAMPLING = SamplingOptions(batch_size=4, points=40, queries=64)


def train(
    shapes: OccupancySet,
    folder: Path,
    options: TrainOptions = TINY,
    sampling: SamplingOptions = SAMPLING,
    mix: dict[str, float] | None = None,
    **arguments: Any,
) -> ImplicitRun:
    torch.manual_seed(options.seed)
    network = OccupancyNetwork(OccupancyConfig(16, 16, 16))
    examples = OccupancySampler(shapes, sampling, mix)
    edges = (network.encoder.fc_pos, network.decoder.fc_p, network.decoder.fc_out)
    arguments = {"every": 4, "adam_layers": edges, **arguments}
    return fit(network, examples, examples.validation(4), folder, options, **arguments)


def curve(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def _shapes_are_made_once() -> Iterator[None]:
    """Commands of several tests are given the same shapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solid_sources, "solids_from_procedural", functools.cache(solids_from_procedural))
        yield


@pytest.fixture(scope="module")
def shapes() -> OccupancySet:
    return solids_from_procedural(1, seed=0)


def test_labels_follow_the_shape_through_every_augmentation(shapes: OccupancySet) -> None:
    """With clean input the encoder's points must lie on the labelled surface."""
    options = dataclasses.replace(
        SAMPLING,
        batch_size=64,
        clean=1.0,
        jitter=0.0,
        rotated=0.5,
        max_scale=1.3,
        near_sigma=0.0,
        queries=200,
    )
    clouds, queries, labels = OccupancySampler(shapes, options).draw(torch.Generator().manual_seed(0))
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
    options = dataclasses.replace(SAMPLING, batch_size=8, points=1000, clean=1.0, jitter=0.0, queries=512)
    clouds, queries, labels = OccupancySampler(data, options).draw(torch.Generator().manual_seed(1))
    half = clouds.abs().amax(1, keepdim=True)  # semi-axes of the stretched ball in the encoder's frame
    level = (queries / half).norm(dim=-1)
    grown = 1 + OFFSET / 0.4
    assert not labels[level > grown + 0.1].any()
    assert labels[level < grown - 0.1].all()


def test_corrupted_input_moves_the_frame_but_not_the_label(shapes: OccupancySet) -> None:
    options = dataclasses.replace(SAMPLING, batch_size=32, clean=0.0, queries=100)
    sampler = OccupancySampler(shapes, options)
    clouds, _, _ = sampler.draw(torch.Generator().manual_seed(0))
    centre, extent = bounding_cubes(clouds)
    torch.testing.assert_close(centre, torch.zeros_like(centre), atol=1e-5, rtol=0)
    torch.testing.assert_close(extent, torch.ones_like(extent))


def test_mix_weighs_the_sources(shapes: OccupancySet) -> None:
    half = np.arange(len(shapes)) % 4 == 0
    data = dataclasses.replace(shapes, source=half.astype(np.int64), sources=("rest", "quarter"))
    weight = OccupancySampler(data, SAMPLING, {"quarter": 3.0, "rest": 1.0}).weight
    assert weight[torch.from_numpy(half)].sum() == pytest.approx(0.75)
    assert OccupancySampler(data, SAMPLING, {"quarter": 1.0}).weight[~torch.from_numpy(half)].sum() == 0
    with pytest.raises(ValueError, match="unknown sources"):
        OccupancySampler(data, SAMPLING, {"shapenet": 1.0})


def test_rate_warms_up_holds_and_decays() -> None:
    options = TrainOptions(steps=1000, warmup=100, cooldown=0.4)
    rates = [schedule(step, options) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[99:600] == [1.0] * 501
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[600:]))
    assert rates[-1] == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_an_interrupted_run_resumes_bit_for_bit(shapes: OccupancySet, tmp_path: Path, ema: float) -> None:
    options = dataclasses.replace(TINY, ema=ema, max_norm=1.0)
    whole = train(shapes, tmp_path / "whole", options)
    train(shapes, tmp_path / "cut", options, stop_after=4)
    assert torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["position"] == 4
    resumed = train(shapes, tmp_path / "cut", options)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert curve(tmp_path / "whole") == curve(tmp_path / "cut") and len(curve(tmp_path / "cut")) == 2
    assert resumed.best == whole.best and not resumed.changes


def test_a_state_that_does_not_fit_on_the_disk_leaves_the_one_before(
    shapes: OccupancySet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out_of_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    whole = train(shapes, tmp_path / "whole")
    train(shapes, tmp_path / "cut", stop_after=4)
    before = {path.name for path in (tmp_path / "cut").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", run_out_of_space)
        with pytest.raises(DataError, match=r"last\.pt: it could not be written: No space left on device"):
            train(shapes, tmp_path / "cut")
    assert {path.name for path in (tmp_path / "cut").iterdir()} == before
    assert curve(tmp_path / "whole") == [*curve(tmp_path / "cut"), curve(tmp_path / "whole")[1]]
    resumed = train(shapes, tmp_path / "cut")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_the_average_is_that_of_the_weights(shapes: OccupancySet, tmp_path: Path) -> None:
    """The decay at step n is (1 + n) / (10 + n) at most, which weighs the weights of step 1 with 9 / 11."""
    options = dataclasses.replace(TINY, steps=1, ema=0.9)
    torch.manual_seed(0)
    start = OccupancyNetwork(OccupancyConfig(16, 16, 16)).decoder.fc_out.weight.detach()
    run = train(shapes, tmp_path / "average", options)
    after = train(shapes, tmp_path / "plain", dataclasses.replace(options, ema=0.0)).model
    expected = (2 * start + 9 * after.decoder.fc_out.weight) / 11  # type: ignore[operator,union-attr]
    torch.testing.assert_close(run.model.decoder.fc_out.weight, expected, rtol=2e-3, atol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"options": dataclasses.replace(TINY, muon_lr=0.01)}, "muon_lr was 0.02, not 0.01"),
        ({"options": dataclasses.replace(TINY, seed=1)}, "seed was 0, not 1"),
        ({"sampling": dataclasses.replace(SAMPLING, batch_size=5)}, "batch_size was 4, not 5"),
        ({"mix": {"procedural": 1.0}}, r"mix was None, not \{'procedural': 1.0\}"),
        ({"settings": {"network": "large"}}, "network was None, not large"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(
    shapes: OccupancySet, tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    train(shapes, tmp_path, stop_after=4)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(RunError, match=named):
        train(shapes, tmp_path, **changed)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_run_is_not_resumed_with_other_shapes(shapes: OccupancySet, tmp_path: Path) -> None:
    train(shapes, tmp_path, stop_after=4)
    with pytest.raises(RunError, match="shapes was"):
        train(solids_from_procedural(1, seed=1), tmp_path)


def test_more_steps_are_allowed_and_remembered(shapes: OccupancySet, tmp_path: Path) -> None:
    train(shapes, tmp_path)
    run = train(shapes, tmp_path, dataclasses.replace(TINY, steps=12))
    assert run.position == 12 and run.changes == ["from step 8 on, steps was 8, not 12"]
    with pytest.raises(RunError, match="is from step 12, beyond the 10 asked for"):
        train(shapes, tmp_path, dataclasses.replace(TINY, steps=10))


@pytest.mark.parametrize("content", [b"", b"PK", b"truncated"])
def test_a_damaged_state_says_what_to_delete(shapes: OccupancySet, tmp_path: Path, content: bytes) -> None:
    train(shapes, tmp_path, stop_after=4)
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2] if content == b"truncated" else content)
    with pytest.raises(RunError, match=r"last\.pt is .*; delete .* to start over"):
        train(shapes, tmp_path)


def test_a_run_of_another_version_is_refused(shapes: OccupancySet, tmp_path: Path) -> None:
    torch.save({"model": {}, "step": 3}, tmp_path / "last.pt")
    with pytest.raises(RunError, match="is not of this version; delete"):
        train(shapes, tmp_path)


def test_training_stops_where_the_loss_is_not_finite(shapes: OccupancySet, tmp_path: Path) -> None:
    train(shapes, tmp_path, stop_after=4)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    state["parts"]["model"]["decoder.fc_out.bias"].fill_(math.nan)
    torch.save(state, tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(FloatingPointError, match="the loss is nan before step 8"):
        train(shapes, tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_training_learns(shapes: OccupancySet, tmp_path: Path) -> None:
    options = dataclasses.replace(TINY, steps=60, warmup=10)
    train(shapes, tmp_path, options, dataclasses.replace(SAMPLING, batch_size=16, queries=128), every=20)
    assert curve(tmp_path)[-1] < 0.93 * curve(tmp_path)[0]


class Balls:
    """Balls of random radius, with soft labels: another source of examples for the same trainer."""

    def draw(self, generator: torch.Generator) -> Batch:
        radius = 0.2 + 0.3 * torch.rand(16, 1, 1, generator=generator)
        normals = torch.nn.functional.normalize(torch.randn(16, 24, 3, generator=generator), dim=-1)
        queries = torch.rand(16, 64, 3, generator=generator) - 0.5
        return radius * normals, queries, ((radius[..., 0] - queries.norm(dim=-1)) / 0.02).sigmoid()

    def describe(self) -> dict[str, Any]:
        return {"shapes": "balls"}


class RadiusNetwork(torch.nn.Module):
    """Another network: the logit is linear in the norms of the cloud and of the query."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def encode(self, clouds: torch.Tensor) -> torch.Tensor:
        return clouds.norm(dim=-1).mean(1)

    def forward(self, clouds: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        norms = queries.norm(dim=-1)
        code = self.encode(clouds)[:, None].expand_as(norms)
        return self.linear(torch.stack([code, norms], -1)).squeeze(-1) * 30


def test_another_network_is_trained_by_the_same_loop_on_its_own_examples(tmp_path: Path) -> None:
    balls = Balls()
    probes = {"balls": [balls.draw(torch.Generator().manual_seed(9))]}
    options = TrainOptions(steps=200, adam_lr=0.02, warmup=5)
    network = RadiusNetwork()
    run = fit(network, balls, probes, tmp_path, options, adam_layers=[network], every=50)
    assert run.best["balls"] == run.best["mean"] > 0.9
    weight = network.linear.weight.detach()[0]
    assert weight[0] > 0 > weight[1] and weight.sum().abs() < 0.2 * weight[0]


def command(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    options = "--steps 4 --batch-size 4 --queries 32 --widths 16 16 16 --per-class 1 --every 2"
    tiny = options.split()
    tiny += ["--cache", str(tmp_path / "cache"), "--run", str(tmp_path / "run")]
    result = CliRunner().invoke(train_command, [*tiny, *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_the_command_writes_weights_with_their_calibration_and_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ifdefense.training.recipes.implicit.MEASURED", 2)
    out = tmp_path / "weights" / "onet.safetensors"
    code, output = command(tmp_path, "--out", str(out))
    assert code == 0, output
    metadata = load_metadata(out)
    assert metadata.keys() == {"network", "config", "calibration", "up"}
    assert metadata["up"] == "z"
    assert json.loads(metadata["config"]) == dataclasses.asdict(OccupancyConfig(16, 16, 16, 5))
    network = load_network(out)
    assert isinstance(network, OccupancyNetwork) and network.config == OccupancyConfig(16, 16, 16, 5)
    assert network.calibration == Calibration(1.2, 0.5, 0.2, OFFSET, 300)
    load_into(network, load_state(out), out)
    card = out.with_suffix(".md").read_text()
    assert "validation IoU" in card and "procedural (weight 1)" in card and '"seed": 0' in card

    assert command(tmp_path, "--out", str(out)) == (1, f"Error: {out} exists already; --force replaces it\n")
    code, output = command(tmp_path, "--out", str(out), "--force", "--steps", "6")
    assert code == 0, output
    card = out.with_suffix(".md").read_text()
    assert "* resumed: from step 4 on, steps was 4, not 6" in card and '"steps": 6' in card
    assert f"resumed {tmp_path / 'run'} after step 4" in caplog.text and "'step': 6" in caplog.text
    code, output = command(tmp_path, "--muon-lr", "0.3")
    assert code == 1 and "muon_lr was 0.02, not 0.3" in output
    (tmp_path / "run" / "last.pt").write_bytes(b"PK")
    code, output = command(tmp_path)
    assert code == 1 and f"delete {tmp_path / 'run'} to start over" in output


def test_the_convolutional_network_learns_from_the_same_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ifdefense.training.recipes.implicit.MEASURED", 2)
    out = tmp_path / "convonet.safetensors"
    options = "--steps 4 --batch-size 4 --queries 32 --points 200 --per-class 1 --every 2"
    options += " --widths 8 8 8 8 --depth 2 --resolution 12"
    tiny = [*options.split(), "--cache", str(tmp_path / "cache"), "--run", str(tmp_path / "run")]
    result = CliRunner().invoke(convonet.train_command, [*tiny, "--out", str(out)])
    assert result.exit_code == 0, result.output
    network = load_network(out)
    assert isinstance(network, ConvolutionalNetwork)
    assert network.config == ConvolutionalConfig(8, 8, 8, 2, 8, 12)
    assert network.calibration == Calibration(1.2, 0.5, 0.2, OFFSET, 200)
    assert "Convolutional Occupancy Network" in out.with_suffix(".md").read_text()
    longer = CliRunner().invoke(convonet.train_command, [*tiny, "--steps", "6"])
    assert longer.exit_code == 0, longer.output
    other = CliRunner().invoke(convonet.train_command, [*tiny, "--resolution", "16"])
    assert other.exit_code == 1 and "resolution" in other.output
    bad = CliRunner().invoke(convonet.train_command, [*tiny, "--resolution", "13"])
    assert bad.exit_code == 1 and "must be a multiple of 2, got 13" in bad.output


def test_the_command_learns_from_a_folder_of_clouds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ifdefense.training.recipes.implicit.MEASURED", 2)
    (tmp_path / "clouds").mkdir()
    rng = np.random.default_rng(0)
    shapes = [make_shape("mug", rng).sample_surface(400, rng)[0] for _ in range(20)]
    np.save(tmp_path / "clouds" / "mugs.npy", np.stack(shapes) * 7 + 3)
    out = tmp_path / "onet.safetensors"
    code, output = command(
        tmp_path, "--from-points", str(tmp_path / "clouds"), "--out", str(out), "--labels", "estimated"
    )
    assert code == 0, output
    card = out.with_suffix(".md").read_text()
    assert "data: points (weight 1); 18 shapes; solids behind clouds: estimated" in card
    held = OccupancySet.load(tmp_path / "cache" / "points-validation")
    assert len(held) == 2  # every tenth
    np.testing.assert_allclose(np.ptp(held.points.astype(np.float64), axis=1).max(1), 1, atol=1e-3)
    code, output = command(tmp_path, "--mix", "points")
    assert code == 1 and "the source points and --from-points FOLDER belong together" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--mix shapenet=1", "'shapenet' is not one of modelnet40, meshes, procedural"),
        ("--mix procedural=-1", "the weight of procedural must be positive"),
        ("--mix procedural=nan", "the weight of procedural must be positive"),
        ("--mix procedural --mix procedural=2", "procedural is given twice"),
        ("--steps 0", "steps must be at least 1, got 0"),
        ("--batch-size 0", "batch_size must be at least 1, got 0"),
        ("--muon-lr nan", "muon_lr must be from 0 to 10, got nan"),
        ("--cooldown 2", "cooldown must be from 0 to 1, got 2"),
        ("--widths 0 4 4", "encoder of the network must be positive, got 0"),
        ("--device warp", "Invalid value for '--device': device 'warp' cannot be used"),
        ("--out weights.pth", "weights are written as .safetensors"),
        ("--out /dev/null/w.safetensors", "/dev/null cannot be written"),
        ("--mix modelnet40", "IFDEFENSE_DATA"),
        ("--mix modelnet40 --data nowhere", "nowhere: there is no such folder"),
    ],
)
def test_the_command_refuses_bad_options_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IFDEFENSE_DATA", raising=False)
    monkeypatch.setattr(
        "ifdefense.training.data.solid_sources.solids_from_procedural",
        lambda *_: pytest.fail("shapes were made"),
    )
    code, output = command(tmp_path, *arguments.split())
    assert code in (1, 2) and message in output
    assert not list(tmp_path.glob("run/*"))


def test_a_cache_is_built_again_when_its_settings_change(shapes: OccupancySet, tmp_path: Path) -> None:
    built = []

    def build() -> OccupancySet:
        built.append(1)
        return shapes

    for seed in (0, 0, 1):
        assert len(cached(tmp_path / "set", build, {"seed": seed})) == len(shapes)
    assert len(built) == 2
    (tmp_path / "set" / "settings.json").unlink()  # as if the save had been interrupted
    cached(tmp_path / "set", build, {"seed": 1})
    assert len(built) == 3


def test_unit_cube() -> None:
    cloud = to_unit_cube(np.random.default_rng(0).uniform(3, 9, (50, 3)) * [1, 2, 1])
    assert np.abs(cloud).max() == pytest.approx(0.5) and np.ptp(cloud, axis=0).max() == pytest.approx(1)


def test_procedural_grids_agree_with_their_shapes(shapes: OccupancySet) -> None:
    shape = make_shape("airplane", np.random.default_rng([0, 0, 0]))
    np.testing.assert_array_equal(shapes.grids[0], grid_from_shape(shape))


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
        super().__init__(OccupancyConfig(4, 4, 4), Calibration(1.2, 0.5, 0.2, OFFSET, 64))
        self.radius = radius

    def field(self, code: torch.Tensor) -> object:  # type: ignore[override]
        return lambda points, cloud: 40 * (self.radius - points.norm(dim=-1))


def test_chamfer_l1_of_surfaces_known_in_closed_form() -> None:
    normal = np.random.default_rng(0).normal(size=(3, 1024, 3))
    points = (0.5 * normal / np.linalg.norm(normal, axis=2, keepdims=True)).astype(np.float16)
    data = OccupancySet(points, np.zeros((3, 2, 2, 2), np.int8), np.zeros(3, np.int64), ("balls",))
    sampler = OccupancySampler(data, SamplingOptions(points=64))
    exact = chamfer_l1(Ball(0.5 + OFFSET), sampler)["clean"]
    larger = chamfer_l1(Ball(0.6 + OFFSET), sampler)
    # Between two random samplings of a sphere of area pi the mean distance is about half the spacing.
    assert exact == pytest.approx(10 * 0.5 * (np.pi / 1024) ** 0.5, rel=0.15)
    assert larger["clean"] == pytest.approx(1.0, rel=0.1) and larger["missing"] == 0
    assert chamfer_l1(Ball(-1.0), sampler)["missing"] == 1


def test_only_hidden_matrices_are_muon_s() -> None:
    network = OccupancyNetwork(OccupancyConfig(8, 8, 8))
    edge = (network.encoder.fc_pos, network.decoder.fc_p, network.decoder.fc_out)
    hidden, others = split_parameters(network, edge)
    assert len(hidden) + len(others) == len(list(network.parameters()))
    assert {id(p) for p in others} >= {id(network.decoder.fc_p.weight), id(network.decoder.fc_out.weight)}
    assert any(p is network.encoder.block_3.fc_0.weight for p in hidden)
