"""Trainings and benchmarks on an accelerator, or on the stand-in for one; see `test_devices`."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path
from typing import Any

import fake_device
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import attacks
from benchmarks import accelerator, speed
from benchmarks import cli as bench
from benchmarks.cells import Cell
from benchmarks.clouds import load_clouds
from benchmarks.shards import Store, Task, run_shard
from classifiers import train as classifier_training
from ifdefense.cli import main
from ifdefense.data.cloudset import CloudSet
from ifdefense.reconstruction import examples, recipes
from ifdefense.shapes import procedural
from ifdefense.training.data.clouds import TrainingClouds
from ifdefense.training.data.surfaces import DenseSurfaces, surfaces_from_procedural
from ifdefense.training.fit import TrainOptions, fit
from ifdefense.training.recipes import anomaly, autoencoder, implicit, local, punet
from ifdefense.training.runs import ResumableRun


def balls(count: int = 12, points: int = 32) -> TrainingClouds:
    """Two classes of clouds: round and flat ones."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 2
    shapes = np.where(labels[:, None] == 0, [1, 1, 1], [1, 1, 0.1])[:, None]
    return TrainingClouds.of_arrays(rng.normal(size=(count, points, 3)) * shapes, labels)


def cloud_set(count: int, points: int, classes: int = 2) -> CloudSet:
    """The same as a set of clouds with names."""
    clouds = balls(count, points)
    names = np.array([f"cloud {index}" for index in range(count)])
    return CloudSet(
        clouds.points.numpy(), clouds.labels.numpy(), names, tuple(f"class {i}" for i in range(classes))
    )


@pytest.fixture(scope="module")
def surfaces() -> DenseSurfaces:
    return surfaces_from_procedural(5, samples=1000)


@pytest.fixture
def little(surfaces: DenseSurfaces, monkeypatch: pytest.MonkeyPatch) -> None:
    """As little data as the trainings can do with."""
    clouds = balls()
    for module in (examples, recipes, procedural):
        monkeypatch.setattr(module, "CLASSES", ("bottle", "table"))
    monkeypatch.setattr(implicit, "MEASURED", 1)
    for module in (examples, recipes):
        monkeypatch.setattr(module, "HELD_PER_CLASS", 1)
    monkeypatch.setattr(local, "VALIDATED", 2)
    monkeypatch.setattr(local, "collect", lambda *_: surfaces)
    monkeypatch.setattr(autoencoder, "load_training_clouds", lambda _: (clouds, clouds, 2))
    monkeypatch.setattr(punet, "collect", lambda *_: surfaces)
    small = functools.partial(punet.PUNetOptions, points=32)
    monkeypatch.setattr(punet, "PUNetOptions", small)
    monkeypatch.setattr(anomaly, "collect", lambda *_: surfaces)
    monkeypatch.setattr(anomaly, "load_modelnet40", lambda *_: cloud_set(12, 1100))
    monkeypatch.setattr(anomaly, "held_out", lambda labels: np.arange(len(labels)) < 4)
    monkeypatch.setattr(anomaly, "examples", functools.partial(few, anomaly.examples))
    monkeypatch.setattr(classifier_training, "load_data", lambda *_: (clouds, {"validation": clouds}, 2))


def few(examples: Any, network: Any, sources: Any, *_: int, held: bool) -> tuple[Tensor, Tensor]:
    """Examples of two clouds."""
    return examples(network, sources, 2, 0, held)


SHARED = "--per-class 1 --batch-size 2 --queries 32 --every 1 --steps 1 --no-progress"
COMMANDS = {
    "onet": f"{SHARED} --widths 16 16 16",
    "convonet": f"{SHARED} --widths 8 8 8 8 --depth 2 --resolution 12 --points 200",
    "local": "--width 16 --coarse 16 --values 12 --hidden 16 --queries 32 --batch-size 2 --steps 1",
    "generative": f"{SHARED} --widths 3 6 8",
    "voxel": f"{SHARED} --widths 2 5 8",
    "image": f"{SHARED} --widths 4 5 8 --size 32 --views 1",
    "autoencoder": "--epochs 1 --batch-size 6 --points 16",
    "punet": "--steps 1 --batch-size 2 --every 1",
    "anomaly": "--clouds 20 --steps 2",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_trains_on_the_device(command, device, little, tmp_path):
    out = tmp_path / "weights.safetensors"
    arguments = ["train", command, *COMMANDS[command].split(), "--out", str(out), "--device", device.type]
    if command != "anomaly":
        arguments += ["--run", str(tmp_path / "run")]
    if command not in ("autoencoder",):
        arguments += ["--cache", str(tmp_path / "cache")]
    with fake_device.watch() as seen:
        result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    assert out.is_file()
    if device.type == fake_device.NAME:
        assert any("backward" in name for *_, name in seen)  # trained there


def test_trains_classifiers_on_the_device(device, little, tmp_path):
    """With every part of the recipe."""
    arguments = "--model dgcnn --schedule 16x1 --batch-size 6 --mix 1 --adversarial 0.5 --coherent 64"
    arguments += " --through local-random --through-share 0.5"
    arguments += f" --average 0.5 --run {tmp_path / 'run'} --out {tmp_path / 'a.safetensors'}"
    result = CliRunner().invoke(classifier_training.main, f"{arguments} --device {device.type}".split())
    assert result.exit_code == 0, (result.output, result.exception)
    scores = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert scores["validation, attacked"] >= 0 and scores["attacked through the purifier"] >= 0
    assert "(local-random, gradient of sor-smooth)" in (tmp_path / "a.md").read_text()


@pytest.mark.parametrize("command", [*COMMANDS, "classifier"])
def test_a_device_that_is_not_there_is_refused(command):
    program, arguments = main, ["train", command, "--out", "a.safetensors"]
    if command == "classifier":
        program, arguments = classifier_training.main, ["--run", "run"]
    result = CliRunner().invoke(program, [*arguments, "--device", "nowhere"])
    assert result.exit_code == 2 and "device 'nowhere' cannot be used" in result.output


class Drawn(nn.Module):
    """Its output is random, as that of a generative network."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, points: Tensor, queries: Tensor) -> Tensor:
        return self.layer(queries + 0.3 * torch.randn_like(queries) + points.mean(1, keepdim=True)).squeeze(2)


class Fixed:
    """Examples of one batch, drawn anew every time."""

    def draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        points, queries = (torch.randn(2, 8, 3, generator=generator) for _ in range(2))
        return points, queries, queries.sum(2) > 0

    def describe(self) -> dict[str, Any]:
        return {}


def drawing(folder: Path, device: torch.device, stop: int | None = None) -> ResumableRun:
    """A run of four steps, up to one of them."""
    torch.manual_seed(0)
    probes = {"some": [Fixed().draw(torch.Generator().manual_seed(1))]}
    network = Drawn().to(device)
    return fit(network, Fixed(), probes, folder, TrainOptions(steps=4), every=2, stop_after=stop)


def test_a_resumed_run_draws_on_the_device_what_an_uninterrupted_one_does(device, tmp_path):
    whole = drawing(tmp_path / "whole", device)
    drawing(tmp_path / "parts", device, stop=2)
    parts = drawing(tmp_path / "parts", device)
    assert parts.position == 4 and parts.device == device
    last = [torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts")]
    assert last[0]["device_rng"][0] == device.type
    for name, value in last[0]["parts"]["model"].items():
        assert torch.equal(value.cpu(), last[1]["parts"]["model"][name].cpu()), name
    assert whole.best == parts.best


def test_a_run_goes_on_on_another_device(device, tmp_path):
    """Not bit for bit, but with all that it has learned."""
    drawing(tmp_path, device, stop=2)
    run = drawing(tmp_path, torch.device("cpu"))
    assert run.position == 4 and run.device.type == "cpu"


# Benchmarks


def invoke(*arguments: object) -> None:
    result = CliRunner().invoke(bench.main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)


def test_every_benchmark_of_networks_takes_a_device():
    for name in bench.COMMANDS:
        output = CliRunner().invoke(bench.main, [name, "--help"]).output
        assert ("--device" in output) == (name not in ("labels", "report", "submit")), name


def test_shards_of_the_benchmark(device, tmp_path):
    """What one device has made is not taken for that of another."""
    labelled, store = load_clouds(clouds=2, num_points=256), Store(tmp_path)
    keys = set()
    for kind in (str(device), "cpu"):
        for source, knowledge in (("apgd-linf", "exact"), ("corruption:uniform@1", "none")):
            cell = Cell("pointnet-procedural", source, "sor-ae", knowledge)
            given = {"victim": cell.victim, "defence": "sor-ae", "effort": "quick", "device": kind}
            task = Task("scored", cell, 0, labelled, **given)
            run_shard(task, store)
            keys.add(task.key)
            assert store.read(task.path)["predicted"].shape[1] == 2
    assert len(keys) == 4


def test_times_on_the_device(device, monkeypatch, tmp_path):
    out = tmp_path / "times.json"
    for module in (accelerator, speed):
        monkeypatch.setattr(module, "make_clouds", lambda count: balls(count, 128).points.numpy())
    monkeypatch.setattr(accelerator, "COUNTS", (1, 2))
    monkeypatch.setitem(speed.TIMED, "PGD", (attacks.PGD(iterations=1), 1))
    commands = {
        "accelerator": ["--no-tests", "--method", "sor-ae"],
        "point-operations": ["--clouds", 1, "--points", 64],
        "attack-speed": ["--clouds", 1, "--attack", "PGD"],
    }
    for name, arguments in commands.items():
        with fake_device.watch() as seen:
            invoke(name, *arguments, "--repeats", 1, "--device", device.type, "--out", out)
        assert json.loads(out.read_text())["device"] == str(device)
        if device.type == fake_device.NAME:
            assert any(operation == "synchronize" for *_, operation in seen), name


def test_the_tests_of_an_accelerator_are_run_on_it(monkeypatch, tmp_path):
    """By the command for that; a failure is one."""
    seen = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        seen.append(command)
        return subprocess.CompletedProcess(command, len(seen) - 1)

    monkeypatch.setattr(subprocess, "run", run)
    assert accelerator.passed(torch.device("cuda", 0)) is True
    assert accelerator.passed(torch.device("cuda", 0)) is False
    *_, file, option, device = seen[0]
    assert Path(file).name == "test_devices.py" and (option, device) == ("--device", "cuda:0")
    monkeypatch.setattr(accelerator, "TESTS", tmp_path / "missing.py")
    assert accelerator.passed(torch.device("cuda", 0)) is None and len(seen) == 2


def test_evidence_for_flags(device, tmp_path):
    labelled = load_clouds(clouds=2, num_points=256)
    cell = Cell("pointnet-procedural", "probe", "sor-ae")
    task = Task("probe", cell, 0, labelled, cell.victim, "sor-ae", device=str(device))
    found = json.loads(str(run_shard(task, Store(tmp_path))["evidence"]))
    assert len(found["ladder"]) == 3 and found["clean"].count("1") > 0
    assert found["gradients"]["exact"] == {"zero": 0, "not finite": 0}
