"""The benchmark of corruptions on real clouds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import tables
from benchmarks.corruption import corrupted, corruptions, markdown_rows, means
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
    header, lines = markdown_rows(result)
    assert header == ["family", "corruption", "pointnet-victim, none", "pointnet-victim, sor"]
    assert [line[1] for line in lines] == ["cutout", "shear", "**mean**"]
    assert "severities 1, 5; 4 validation clouds" in tables.corruptions(result)


def test_means_are_over_the_severities_of_each_victim_and_defence() -> None:
    rows = [
        {"victim": "a", "defence": "sor", "corruption": "shear", "severity": 1, "accuracy": 80.0},
        {"victim": "a", "defence": "sor", "corruption": "shear", "severity": 5, "accuracy": 60.0},
        {"victim": "a", "defence": "sor", "corruption": "cutout", "severity": 5, "accuracy": 40.0},
        {"victim": "b", "defence": "sor", "corruption": "shear", "severity": 5, "accuracy": 10.0},
    ]
    assert means(rows, "shear") == {"a:sor": 70, "b:sor": 10}
    assert means(rows) == {"a:sor": 60, "b:sor": 10}


def test_columns_stand_victim_by_victim() -> None:
    rows = [
        {"victim": victim, "defence": defence, "corruption": "shear", "severity": 1, "accuracy": 1.0}
        for defence in ("none", "sor")
        for victim in ("b", "a")
    ]
    header, _ = markdown_rows({"rows": rows})
    assert header[2:] == ["b, none", "b, sor", "a, none", "a, sor"]
