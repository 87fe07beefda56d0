"""Measurements and result files of the benchmarks."""

from __future__ import annotations

import json
import time
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import attacks
import ifdefense
from benchmarks import speed, tables
from benchmarks.speed import make_clouds, median_seconds, peak_memory, stage_seconds
from benchmarks.studies import labels, optimisation
from benchmarks.text_tables import text_table
from ifdefense.implicit.base import Calibration
from ifdefense.restorers.optimised import OptimisedRestorer
from ifdefense.training.data.solids import interpolate


def bench(*arguments: object) -> str:
    (entry,) = entry_points(group="console_scripts", name="ifdefense-bench")
    result = CliRunner().invoke(entry.load(), [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_help_lists_every_command() -> None:
    output = bench("--help")
    assert all(name in output for name in ("demo", "run", "purify-speed"))


def test_clouds_are_of_as_many_classes_as_can_be() -> None:
    clouds = make_clouds(20)
    assert clouds.shape == (20, 1024, 3)
    assert len({cloud.tobytes() for cloud in clouds}) == 20
    assert np.array_equal(make_clouds(20)[:16], make_clouds(20)[:16])


def test_median_leaves_the_first_call_out() -> None:
    pauses = iter([0.2, 0.01, 0.01, 0.01])
    assert 0.01 <= median_seconds(lambda: time.sleep(next(pauses)), repeats=3) < 0.1


def test_peak_memory_sees_an_allocation() -> None:
    before = peak_memory()
    if before is None:
        pytest.skip("this system does not tell a process's peak memory")
    block = np.ones(int(before * 1e9 / 8) + 50_000_000)
    after = peak_memory()
    assert after is not None
    assert after - before > 0.3
    assert block[-1] == 1


def test_stages_add_up_to_the_whole() -> None:
    clouds = make_clouds(4)
    start = time.perf_counter()
    stages = stage_seconds(ifdefense.load("sor"), clouds, repeats=1)
    assert 0 < sum(stages.values()) <= time.perf_counter() - start


def test_speed_command_writes_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "LARGE", 5_000)
    monkeypatch.setattr(speed, "NEIGHBOURS", 1)
    monkeypatch.setattr(speed, "PGD", lambda iterations: attacks.PGD(iterations=1))
    output = bench(
        "purify-speed", "--method", "sor", "--repeats", 1, "--out", tmp_path / "new" / "speed.json"
    )
    result = json.loads((tmp_path / "new" / "speed.json").read_text())
    assert result["clouds"] == 16
    assert result["points"] == 1024
    assert result["seconds_per_cloud"] > 0
    assert set(result["growth"]) == {"4", "16", "64"}
    assert result["machine"]["torch"]
    assert result["spec"] == ifdefense.load("sor").spec()
    assert result["large"]["points"] == 5_000 and result["neighbours"]["processes"] == 1
    assert "all of purify" in output


def test_text_table_aligns() -> None:
    lines = text_table(["name", "n"], [["a", "1"], ["long name", "100"]]).splitlines()
    assert lines == ["name         n", "─────────  ───", "a            1", "long name  100"]


def test_tables_are_filled_between_their_markers(tmp_path: Path) -> None:
    result = {
        "method": "onet-fill",
        "clouds": 16,
        "points": 1024,
        "repeats": 5,
        "seconds_per_cloud": 0.2,
        "stages_per_cloud": {"outliers": 0.05, "resampling": 0.15},
        "peak_memory_gb": 0.5,
        "growth": {"4": 0.25, "16": 0.2},
        "decoder": {"unfolded": 3.0, "folded": 1.0},
        "machine": {"threads": 2, "processor": "abacus", "torch": "2.13.0"},
    }
    text = "before\n<!-- table speed -->\nstale\n<!-- end -->\nafter\n"
    assert tables.fill(text, tmp_path) == text
    (tmp_path / "purify_speed.json").write_text(json.dumps(result))
    filled = tables.fill(text, tmp_path)
    assert "stale" not in filled
    assert filled.startswith("before\n<!-- table speed -->\n")
    assert filled.endswith("<!-- end -->\nafter\n")
    assert "| outliers | 50 |" in filled
    assert "**200**" in filled
    assert "3.0 times as fast" in filled
    assert tables.fill(filled, tmp_path) == filled


def test_unknown_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no table 'magic'"):
        tables.fill("<!-- table magic -->\n<!-- end -->", tmp_path)


def test_attack_speed_times_attacks_against_bare_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "make_clouds", lambda count: make_clouds(count)[:, :256])
    few = {"PGD": (attacks.PGD(iterations=10), 10), "Add-CD": (attacks.AddCD(searches=2, iterations=5), 10)}
    monkeypatch.setattr(speed, "TIMED", few)
    options = ["--clouds", 1, "--repeats", 1, "--attack", "PGD", "--attack", "Add-CD"]
    output = bench("attack-speed", *options, "--out", tmp_path / "speed.json")
    result = json.loads((tmp_path / "speed.json").read_text())
    assert list(result["attacks"]) == ["PGD", "Add-CD"]
    assert all(0.3 < row["ratio"] < 30 for row in result["attacks"].values()), output
    assert "| PGD | 10 |" in tables.attack_speed(result)


def test_bare_passes_are_as_many_as_an_attack_makes() -> None:
    for name, (attack, passes) in speed.TIMED.items():
        seen: list[bool] = []

        def model(points: Tensor, seen: list[bool] = seen) -> Tensor:
            seen.append(points.requires_grad)
            return points.mean(1) @ torch.eye(3) * torch.tensor([1.0, -1.0, 0.5])

        points = torch.randn(1, 64, 3, generator=torch.Generator().manual_seed(0))
        targeted = attack.threat.goal != "untargeted"
        attack(model, points, torch.tensor([0]), torch.tensor([1]) if targeted else None)
        assert passes <= sum(seen) <= passes + 3, name


@pytest.mark.parametrize("name", list(optimisation.SOLVERS))
def test_evaluations_are_counted_as_they_are_made(name: str) -> None:
    solver = optimisation.SOLVERS[name]
    calls: list[int] = []

    def sphere(points: Tensor, cloud: Tensor) -> Tensor:
        calls.append(len(points))
        return 10 * (0.4 - points.norm(dim=1))

    cloud = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    cloud = 0.4 * cloud / cloud.norm(dim=1, keepdim=True)
    OptimisedRestorer(solver)(sphere, [cloud], [40], Calibration(threshold=0.5), 0)
    assert len(calls) == optimisation.evaluations(solver)


def test_known_solids_are_told_from_guesses() -> None:
    pairs = list(labels.procedural(3, seed=1))
    for cloud, grid in pairs:
        points = torch.from_numpy(cloud)[None].float()
        inside = interpolate(torch.from_numpy(grid)[None], torch.zeros(1, dtype=torch.long), points)
        assert (inside > 0).float().mean() > 0.98  # samples lie in the thickened solid
        assert labels.overlap(grid, grid) == 1
    assert labels.overlap(pairs[0][1], pairs[1][1]) < 0.9
    assert labels.overlap(pairs[0][1], np.full_like(pairs[0][1], -1)) == 0
