"""The demo through its entry point: output and files."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_report import trace_of

import ifdefense
from benchmarks import demo as module
from benchmarks.cli import main
from ifdefense.data.cloudset import CloudSet
from ifdefense.purifiers.registry import DEFAULT, METHODS
from ifdefense.shapes.procedural import make_dataset


def test_quick_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every third class and with two defences; the whole of it runs from the wheel, in ``test_wheel``."""
    assert DEFAULT in module.DEFENCES and set(module.DEFENCES) < set(METHODS)
    monkeypatch.setattr(module, "DEFENCES", ("sor", DEFAULT))
    monkeypatch.setattr(module, "make_dataset", lambda count, seed: make_dataset(count, seed=seed)[::3])
    output = tmp_path / "demo"
    result = CliRunner().invoke(main, ["demo", "--quick", "--output", str(output)])
    assert result.exit_code == 0, result.output
    figures = json.loads((output / "demo.json").read_text())
    rows = {
        row["attack"]: {name: float(value) for name, value in row.items() if name != "attack"}
        for row in figures["Accuracy, %"]
    }
    assert list(rows) == ["clean", "PGD", "PGD, L∞ 0.05", "Add-Cluster", "Drop-400"]
    # The strongest attack breaks the classifier, and the defence gives most of it back.
    assert rows["clean"]["none"] >= 85
    assert rows["PGD"]["none"] <= 30
    assert rows["PGD"][DEFAULT] >= rows["PGD"]["none"] + 30
    assert list(rows["PGD"]) == ["none", *module.DEFENCES]
    picture = (output / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", picture[16:24])
    assert width > 2 * height  # one row of three views
    assert DEFAULT in (output / "report.html").read_text()
    assert all(row in result.output for row in rows)
    # It says what it will do before it starts, and at the end what was shown.
    start, *_, shown = result.output.strip().split("\n\n")[:-1]
    assert "Add-Cluster" in start and "about a minute" in start
    assert "[5/5] Drop-400: " in result.output
    assert shown.startswith("The first cloud, ") and ", Add-Cluster: read as " in shown

    again = CliRunner().invoke(main, ["demo", "--quick", "--output", str(output)])
    assert again.exit_code == 1
    assert "report.html exists already" in again.output


def test_repaired_clouds_are_shown_first(sphere_cloud: np.ndarray) -> None:
    points = np.stack([sphere_cloud] * 4)
    clouds = CloudSet(points, np.int64([0, 1, 0, 1]), np.array(["a", "b", "c", "d"]), ("ball", "cup"))
    traces = ifdefense.load("sor").trace(points)

    # Misclassified: clouds 1, 2 and 3; repaired by the defence: cloud 3.
    predicted = {module.NO_DEFENCE: torch.tensor([0, 0, 1, 0]), DEFAULT: torch.tensor([0, 0, 1, 1])}
    clean = torch.from_numpy(points)
    chosen = module.choose(module.Round("PGD", 0, predicted, {}, traces), clean, clouds, 3)
    assert [worth for worth, _ in chosen] == [2, 1, 1]
    cases = [case for _, case in chosen]
    assert [case.title for case in cases] == ["cup, PGD", "cup, PGD", "ball, PGD"]
    assert [case.before.correct for case in cases if case.before] == [False] * 3
    assert [case.after.correct for case in cases if case.after] == [True, False, False]


@pytest.mark.parametrize("name", module.FILES)
def test_nothing_is_written_over(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("precious")
    result = CliRunner().invoke(main, ["demo", "--quick", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert f"{name} exists already" in result.output
    assert (tmp_path / name).read_text() == "precious"


def test_the_overlap_of_marked_surface_and_added_points(sphere_cloud: np.ndarray) -> None:
    """Two octahedra of unit side, the second one on the added points."""
    trace = trace_of(np.concatenate([sphere_cloud, sphere_cloud[:200] + np.float32([2, 0, 0])]), sphere_cloud)
    added = np.arange(1224) >= 1024

    def marked(*vertices: int) -> float:
        return module.overlap(dataclasses.replace(trace, mask=np.isin(np.arange(12), vertices)), added)

    assert marked(*range(6, 12)) == 1
    assert marked(*range(12)) == pytest.approx(2 / 3)  # half of the marked area, and all added points
    assert marked(*range(6)) == marked() == marked(6) == 0
