from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from benchmarks import accuracy as bench
from classifiers.pointnet import PointNet
from ifdefense.checkpoints import save_safetensors

needs_modelnet40 = pytest.mark.skipif(
    "IFDEFENSE_DATA" not in os.environ, reason="IFDEFENSE_DATA is not set: no ModelNet40"
)


def test_clouds_are_drawn_in_proportion_to_the_classes() -> None:
    labels = np.repeat([0, 1, 2], [50, 30, 21])
    chosen = bench.draw(labels, 20, seed=3)
    assert np.bincount(labels[chosen]).tolist() == [10, 6, 4]
    assert len(set(chosen.tolist())) == 20
    assert np.array_equal(chosen, bench.draw(labels, 20, seed=3))
    assert not np.array_equal(chosen, bench.draw(labels, 20, seed=4))
    assert np.array_equal(bench.draw(labels, 101, seed=0), np.arange(101))


def test_more_clouds_than_there_are_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="cannot draw 5 of 4 clouds"):
        bench.draw(np.zeros(4, int), 5, seed=0)


def test_a_cache_depends_on_weights_contents_and_settings(tmp_path: Path) -> None:
    layer, twin = nn.Linear(2, 2), nn.Linear(2, 2)
    twin.load_state_dict(layer.state_dict())
    assert bench.digest(layer, 1) == bench.digest(twin, 1)
    assert bench.digest(layer, 1) != bench.digest(layer, 2)
    twin.weight.data[0, 0] += 1
    assert bench.digest(layer) != bench.digest(twin)
    path = tmp_path / "a"
    path.write_text("a")
    before = bench.digest(path)
    path.write_text("b")
    assert bench.digest(path) != before


def measure(folder: Path, *arguments: str) -> Result:
    args = [
        "--split",
        "validation",
        "--clouds",
        "6",
        "--cw-searches",
        "1",
        "--cw-iterations",
        "2",
        "--batch",
        "4",
    ]
    args += [
        "--attack",
        "none",
        "--attack",
        "perturb",
        "--attack",
        "drop-100",
        "--row",
        f"pointnet:{folder}/victim.safetensors:none",
    ]
    args += [
        "--row",
        f"pointnet:{folder}/victim.safetensors:srs",
        "--cache",
        f"{folder}/cache",
        "--out",
        f"{folder}/out.json",
    ]
    return CliRunner().invoke(bench.accuracy, [*args, *arguments])


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_safetensors(PointNet(40, feature_transform=False), tmp_path / "victim.safetensors")
    return tmp_path


@needs_modelnet40
def test_a_run_is_written_down_and_goes_on_from_its_cache(
    victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure(victim)
    assert first.exit_code == 0, first.output
    assert "(87.4)" in first.output  # the published figure beside ours
    result = json.loads((victim / "out.json").read_text())
    assert len(set(result["names"])) == 6
    assert [row["defence"] for row in result["rows"]] == ["none", "srs"]
    assert set(result["rows"][0]["figures"]) == {"none", "perturb", "drop-100"}

    run = bench.Bench(bench.Settings("validation", 6), victim / "cache")
    model = bench.load_victim(f"pointnet:{victim / 'victim.safetensors'}")
    right = (model(run.points).argmax(1) == run.labels).double().mean().item()
    assert result["rows"][0]["figures"]["none"]["accuracy"] == pytest.approx(100 * right, abs=0.01)
    assert (run.targets != run.labels).all()

    def never(*_: object) -> None:
        raise AssertionError("a cached attack is made again")

    monkeypatch.setattr("attacks.base.Attack.__call__", never)
    assert measure(victim).exit_code == 0
    assert json.loads((victim / "out.json").read_text())["rows"] == result["rows"]
    assert measure(victim, "--seed", "1").exit_code == 1  # other clouds are another cache


def test_a_row_without_a_known_defence_is_refused(victim: Path) -> None:
    outcome = measure(victim, "--row", "pointnet-modelnet40")
    assert outcome.exit_code == 2
    assert "is no VICTIM:DEFENCE; defences are none, srs, sor, onet-mesh" in outcome.output
