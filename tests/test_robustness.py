"""The benchmark of all attacks: what the suite holds, and that its command works on real clouds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import attacks
from benchmarks import catalogue, published
from benchmarks.robustness import markdown_rows, robustness
from benchmarks.suite import SUITE, changed, names
from classifiers.dgcnn import DGCNN
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
        for full in (False, True):
            goal = entry.attack(full).threat.goal
            assert goal == "both" or goal == ("targeted" if entry.targeted else "untargeted"), name
        assert type(entry.attack()) is type(entry.attack(published=True))


def test_settings_are_the_same_text_in_every_process() -> None:
    assert "outliers=far_from_neighbours)" in SUITE["jgba"].settings()
    for entry in SUITE.values():
        assert " at 0x" not in entry.settings() + entry.settings(published=True)


def test_only_settings_that_are_not_the_defaults_are_shown() -> None:
    assert changed(str(attacks.PGD("linf", delta=0.05))) == "PGD(norm='linf', delta=0.05)"
    assert changed(str(attacks.JGBA())) == "JGBA()"
    assert changed(SUITE["advpc"].settings()) == "AdvPC(restarts=1, iterations=100)"


def test_slow_victims_get_no_second_search_but_at_full_length() -> None:
    entry = SUITE["add-cd"]
    assert "searches=2" in entry.settings() and "searches=1," in entry.settings(slow=True)
    assert entry.attack(published=True, slow=True) == attacks.AddCD()
    assert SUITE["pgd"].attack(slow=True) == attacks.PGD()


def test_groups_are_parts_of_the_suite() -> None:
    groups = {entry.group for entry in SUITE.values()}
    assert sorted(name for group in groups for name in names(group)) == sorted(names()) == sorted(SUITE)


def run(folder: Path, *arguments: str) -> Result:
    fixed = [
        "--victim",
        f"pointnet:{folder / 'victim.safetensors'}",
        "--split",
        "validation",
        "--clouds",
        "4",
    ]
    fixed += ["--cache", str(folder / "cache"), "--out", str(folder / "out.json")]
    fixed += ["--defence", "none", "--defence", "sor"]
    return CliRunner().invoke(robustness, [*fixed, *arguments], catch_exceptions=False)


@needs_modelnet40
def test_rows_are_added_replaced_and_made_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    save_safetensors(PointNet(40, feature_transform=False), tmp_path / "victim.safetensors")
    assert run(tmp_path, "--attack", "none", "--attack", "fgm", "--plain").exit_code == 0
    assert run(tmp_path, "--attack", "fgm", "--adaptive").exit_code == 0
    result = json.loads((tmp_path / "out.json").read_text())
    kinds = [(row["attack"], row["kind"]) for row in result["rows"]]
    assert kinds == [("none", "plain"), ("fgm", "plain"), ("fgm", "adaptive")]
    plain, aware = result["rows"][1]["figures"], result["rows"][2]["figures"]
    assert set(plain) == set(aware) == {"none", "sor"}
    assert plain["none"] == aware["none"]
    assert result["rows"][2]["plain"] == plain
    assert aware["sor"]["success"] >= plain["sor"]["success"]
    header, lines = markdown_rows(result, "pointnet-victim", "plain")
    assert header[-4:] == ["none", "srs", "sor", "onet-mesh"]
    assert [line[0] for line in lines] == ["clean", "FGM"] and lines[0][-1] == "–"
    assert lines[0][3].endswith("(88.4)") and "(" not in lines[1][3]
    _, lines = markdown_rows(result, "pointnet-victim", "adaptive")
    assert lines[0][5] == f"{aware['sor']['accuracy']:.1f} ({plain['sor']['accuracy']:.1f})"

    def never(*_: object) -> None:
        raise AssertionError("a cached attack is made again")

    monkeypatch.setattr("attacks.gradient.fgm.FGM.run", never)
    fixed = ["--attack", "fgm", "--plain", "--defence", "srs"]
    assert run(tmp_path, *fixed).exit_code == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 3
    assert set(rows[-1]["figures"]) == {"none", "sor", "srs"}


@needs_modelnet40
def test_rows_of_other_clouds_replace_the_older_figures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_safetensors(PointNet(40, feature_transform=False), tmp_path / "victim.safetensors")
    assert run(tmp_path, "--attack", "none", "--plain").exit_code == 0
    assert run(tmp_path, "--attack", "none", "--plain", "--clouds", "3").exit_code == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["clouds"] == 3
    assert row["figures"]["none"]["accuracy"] in (0, 33.33, 66.67, 100)


def test_slow_victims_and_defences_get_fewer_clouds() -> None:
    pgd, fgm = SUITE["pgd"], SUITE["fgm"]
    assert pgd.affordable_clouds(PointNet(2)) == 200
    assert pgd.affordable_clouds(PointNet(2), adaptive=True) == pgd.affordable_clouds(DGCNN(2)) == 20
    assert fgm.affordable_clouds(DGCNN(2)) == 400
    assert min(entry.affordable_clouds(DGCNN(2)) for entry in SUITE.values()) == 20


@pytest.mark.parametrize(
    ("victim", "defence", "attack", "figure"),
    [
        ("pointnet-modelnet40", "onet-mesh", "drop-200", 66.94),
        ("pointnet2-ssg-modelnet40", "none", "none", 89.34),
        ("dgcnn-modelnet40", "sor", "advpc", 56.49),
        ("dgcnn-modelnet40", "sor", "pgd", None),
        ("pct-modelnet40", "sor", "none", None),
    ],
)
def test_published_figures_stand_beside_those_of_the_same_network(
    victim: str, defence: str, attack: str, figure: float | None
) -> None:
    assert published.accuracy(victim, defence, attack) == figure
