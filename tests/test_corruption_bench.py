"""The benchmark of corruptions on real clouds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.corruption import corrupted, corruptions, markdown_rows, means, table
from classifiers.pointnet import PointNet
from ifdefense.checkpoints import save_safetensors
from ifdefense.corruptions.natural import CORRUPTIONS
from ifdefense.geometry.frame import to_unit_sphere

needs_modelnet40 = pytest.mark.skipif(
    "IFDEFENSE_DATA" not in os.environ, reason="IFDEFENSE_DATA is not set: no ModelNet40"
)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupted_clouds_stay_in_their_frame_and_repeat(name: str) -> None:
    points = to_unit_sphere(torch.randn(2, 256, 3, generator=torch.Generator().manual_seed(0)))
    first, second = corrupted(points, name, 3), corrupted(points, name, 3)
    assert torch.equal(first, second)
    assert first.shape[1] == CORRUPTIONS[name].size(256, 3)
    extent = (first.amax(1) - first.amin(1)).amax(1) / (points.amax(1) - points.amin(1)).amax(1)
    assert ((extent > 0.5) & (extent < 1.5)).all(), extent


@needs_modelnet40
def test_command_measures_and_lays_out_a_table(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_safetensors(PointNet(40, feature_transform=False), tmp_path / "victim.safetensors")
    arguments = ["--victim", f"pointnet:{tmp_path / 'victim.safetensors'}", "--split", "validation"]
    arguments += ["--clouds", "4", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out.json")]
    arguments += ["--corruption", "cutout", "--corruption", "shear", "--severity", "1", "--severity", "5"]
    arguments += ["--defence", "none", "--defence", "sor"]
    outcome = CliRunner().invoke(corruptions, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    result = json.loads((tmp_path / "out.json").read_text())
    assert len(result["rows"]) == 2 * 2 * 2
    assert set(result["specs"]) == {"sor"} and set(result["weights"]) == {"pointnet-victim"}
    header, lines = markdown_rows(result, "pointnet-victim")
    assert header == ["family", "corruption", "none", "sor"]
    assert [line[1] for line in lines] == ["cutout", "shear", "**mean**"]
    assert "severities 1, 5; 4 validation clouds" in table(result)


def test_means_are_over_the_severities_of_each_victim_and_defence() -> None:
    rows = [
        {"victim": "a", "defence": "sor", "corruption": "shear", "severity": 1, "accuracy": 80.0},
        {"victim": "a", "defence": "sor", "corruption": "shear", "severity": 5, "accuracy": 60.0},
        {"victim": "a", "defence": "sor", "corruption": "cutout", "severity": 5, "accuracy": 40.0},
        {"victim": "b", "defence": "sor", "corruption": "shear", "severity": 5, "accuracy": 10.0},
    ]
    assert means(rows, "shear") == {"a:sor": 70, "b:sor": 10}
    assert means(rows) == {"a:sor": 60, "b:sor": 10}


def test_each_victim_has_its_table() -> None:
    rows = [
        {"victim": victim, "defence": defence, "corruption": name, "severity": 1, "accuracy": accuracy}
        for victim, accuracy in (("b", 1.0), ("a", 2.0))
        for defence in ("none", "sor")
        for name in ("shear", "cutout")
    ]
    header, lines = markdown_rows({"rows": rows}, "a")
    assert header == ["family", "corruption", "none", "sor"]
    assert lines[0] == ["density", "cutout", "2.0", "2.0"]
    assert lines[-1] == ["**all**", "**mean**", "**2.0**", "**2.0**"]
    about = {"severities": [1], "clouds": 3, "split": "test", "seed": 0, "date": "2026-01-01"}
    text = table({"rows": rows, **about})
    assert text.index("**b**") < text.index("| density | cutout | 1.0 | 1.0 |") < text.index("**a**")
