"""The benchmark of all attacks: what the suite holds, and that its command works on real clouds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks import catalogue
from benchmarks.robustness import markdown_rows, robustness
from benchmarks.suite import SUITE, names
from classifiers.pointnet import PointNet
from ifdefense.checkpoints import save_safetensors

needs_modelnet40 = pytest.mark.skipif(
    "IFDEFENSE_DATA" not in os.environ, reason="IFDEFENSE_DATA is not set: no ModelNet40"
)


def test_the_suite_holds_every_attack_with_a_goal_that_it_can_have() -> None:
    assert {type(entry.attack(published=True)) for entry in SUITE.values()} == set(
        catalogue.methods().values()
    )
    for name, entry in SUITE.items():
        for published in (False, True):
            goal = entry.attack(published).threat.goal
            assert goal == "both" or goal == ("targeted" if entry.targeted else "untargeted"), name
        assert type(entry.attack()) is type(entry.attack(published=True))


def test_groups_are_parts_of_the_suite() -> None:
    groups = {entry.group for entry in SUITE.values()}
    assert sorted(name for group in groups for name in names(group)) == sorted(names()) == sorted(SUITE)


def run(folder: Path, *arguments: str) -> Result:
    fixed = ["--victim", str(folder / "victim.safetensors"), "--split", "validation", "--clouds", "4"]
    fixed += ["--cache", str(folder / "cache"), "--out", str(folder / "out.json")]
    fixed += ["--defence", "none", "--defence", "sor"]
    return CliRunner().invoke(robustness, [*fixed, *arguments], catch_exceptions=False)


@needs_modelnet40
def test_rows_are_added_replaced_and_made_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    save_safetensors(PointNet(40, feature_transform=False), tmp_path / "victim.safetensors")
    assert run(tmp_path, "--attack", "none", "--attack", "fgm").exit_code == 0
    assert run(tmp_path, "--attack", "fgm", "--adaptive").exit_code == 0
    result = json.loads((tmp_path / "out.json").read_text())
    kinds = [(row["attack"], row["kind"]) for row in result["rows"]]
    assert kinds == [("none", "plain"), ("fgm", "plain"), ("fgm", "adaptive")]
    plain, aware = result["rows"][1]["figures"], result["rows"][2]["figures"]
    assert set(plain) == {"none", "sor", "success on none"}
    assert set(aware) == {"none", "sor", "success on none", "success on sor"}
    assert plain["none"] == aware["none"]
    header, lines = markdown_rows(result)
    assert header[-4:] == ["none", "srs", "sor", "onet-mesh"]
    assert [line[1] for line in lines] == ["clean", "FGM", "FGM (adaptive)"] and lines[0][-1] == "–"

    def never(*_: object) -> None:
        raise AssertionError("a cached attack is made again")

    monkeypatch.setattr("attacks.fgm.FGM.run", never)
    assert run(tmp_path, "--attack", "fgm").exit_code == 0
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 3
