"""The demo through its entry point: output and files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

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
    assert list(rows) == ["clean", "PGD", "PGD, L∞ 0.05", "Drop-400"]
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
    cases = module.choose(module.Round("PGD", predicted, {}, traces), clean, clouds, 3)
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
