"""The demo through its entry point: what it prints, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from benchmarks import demo as module
from benchmarks.cli import main
from ifdefense.data.cloudset import CloudSet
from ifdefense.purifiers.base import Purifier


def test_quick_demo(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    result = CliRunner().invoke(main, ["demo", "--quick", "--output", str(output)])
    assert result.exit_code == 0, result.output
    figures = json.loads((output / "demo.json").read_text())
    rows = {
        row["attack"]: {name: float(value) for name, value in row.items() if name != "attack"}
        for row in figures["Accuracy, %"]
    }
    assert list(rows) == ["clean", "PGD", "CW Perturb", "Drop-400"]
    # The strongest attack breaks the classifier, and the defence gives most of it back.
    assert rows["clean"]["none"] >= 85
    assert rows["PGD"]["none"] <= 30
    assert rows["PGD"]["onet-mesh"] >= rows["PGD"]["none"] + 30
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "onet-mesh" in (output / "report.html").read_text()
    assert all(row in result.output for row in rows)

    again = CliRunner().invoke(main, ["demo", "--quick", "--output", str(output)])
    assert again.exit_code == 1
    assert "report.html exists already" in again.output


def test_shown_are_first_the_clouds_that_were_put_right(sphere_cloud: np.ndarray) -> None:
    points = np.stack([sphere_cloud] * 4)
    clouds = CloudSet(points, np.int64([0, 1, 0, 1]), np.array(["a", "b", "c", "d"]), ("ball", "cup"))
    traces = Purifier.from_pretrained("sor").trace(points)

    def outcome(read: list[int]) -> module.Outcome:
        return module.Outcome(torch.tensor(read), 0.0, traces)

    # Read wrongly: clouds 1, 2 and 3; put right by the defence: cloud 3.
    outcomes = {module.NO_DEFENCE: outcome([0, 0, 1, 0]), module.SHOWN: outcome([0, 0, 1, 1])}
    clean: Tensor = torch.from_numpy(points)
    cases = module.choose(module.Attacked("PGD", clean, 0.0), clean, clouds, outcomes, 3)
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
