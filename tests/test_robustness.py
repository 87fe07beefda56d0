"""The robustness benchmark: suite and command."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from click.testing import CliRunner, Result

import attacks
import ifdefense
from benchmarks import catalogue, published
from benchmarks.robustness import markdown_rows, robustness, summary
from benchmarks.suite import SUITE, Effort, affordable_clouds, changed, names
from classifiers import load
from classifiers.dgcnn import DGCNN
from classifiers.pointnet import PointNet
from ifdefense.checkpoints import save_safetensors
from ifdefense.provenance import digest_of_weights

needs_modelnet40 = pytest.mark.skipif(
    "IFDEFENSE_DATA" not in os.environ, reason="IFDEFENSE_DATA is not set: no ModelNet40"
)


def test_the_suite_holds_every_attack_with_a_goal_that_it_can_have() -> None:
    assert {type(entry.attack("published")) for entry in SUITE.values()} == set(catalogue.methods().values())
    for name, entry in SUITE.items():
        for effort in get_args(Effort):
            goal = entry.attack(effort).threat.goal
            assert goal == "both" or goal == ("targeted" if entry.targeted else "untargeted"), name
        assert type(entry.attack()) is type(entry.attack("published"))


def test_settings_are_the_same_text_in_every_process() -> None:
    assert "outliers=far_from_neighbours," in SUITE["jgba"].settings()
    for entry in SUITE.values():
        assert " at 0x" not in entry.settings() + entry.settings("published")


def test_only_settings_that_are_not_the_defaults_are_shown() -> None:
    assert changed(str(attacks.PGD("linf", delta=0.05))) == "PGD(norm='linf', delta=0.05)"
    assert changed(str(attacks.JGBA())) == "JGBA()"
    assert changed(SUITE["advpc"].settings()) == "AdvPC(restarts=1, iterations=100)"


def test_affordable_settings_are_shorter_than_the_published_ones() -> None:
    entry = SUITE["add-cd"]
    assert all(part in entry.settings() for part in ("searches=5", "iterations=600", "refine=True"))
    published = entry.attack("published")
    assert published == attacks.AddCD()
    assert entry.passes < published.searches * published.iterations / 20
    assert SUITE["pgd"].attack() == attacks.PGD()


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
    weights = digest_of_weights(load("pointnet", tmp_path / "victim.safetensors"))
    for row in result["rows"]:
        assert row["weights"] == weights and row["versions"]["torch"] == torch.__version__
        assert row["attacked"] == result["rows"][row["attack"] == "fgm"]["attacked"]
        assert result["specs"][row["specs"]["sor"]] == ifdefense.load("sor").spec()
    header, lines = markdown_rows(result, "pointnet-victim", "plain")
    assert header == ["attack", "clouds", "measured", "success", "none", "sor"]
    assert [line[0] for line in lines] == ["clean", "FGM"]
    assert lines[0][2] == result["rows"][0]["date"][5:]
    assert lines[0][4].endswith("(88.4)") and "(" not in lines[1][4]
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
    quick, slow = PointNet(2), DGCNN(2)
    assert affordable_clouds("pgd", quick) == 200
    assert affordable_clouds("pgd", quick, adaptive=True) == affordable_clouds("pgd", slow) == 20
    assert affordable_clouds("pgd", slow, published=True) == affordable_clouds("none", slow) == 400
    assert affordable_clouds("fgm", slow) == 400
    assert min(affordable_clouds(name, slow) for name in SUITE) == 20


def row(victim: str, attack: str, clouds: int = 200, **accuracy: float) -> dict[str, Any]:
    figures = {
        name.replace("_", "-"): {"accuracy": value, "standard_error": 1.7, "success": 3.0}
        for name, value in accuracy.items()
    }
    described = {"victim": victim, "attack": attack, "kind": "plain", "clouds": clouds, "weights": "abc"}
    return {**described, "figures": figures}


def test_summary_has_a_line_per_victim_and_defence_and_published_figures_of_the_same_method() -> None:
    hybrid = "pointnet-modelnet40-hybrid"
    rows = [
        row("pointnet-modelnet40", "none", none=88.0, onet_mesh=70.0, onet_fill=80.0),
        row("pointnet-modelnet40", "drop-200", 100, none=40.0, onet_mesh=66.0),
        row(hybrid, "drop-200", sor_smooth=50.0),
        row("dgcnn-modelnet40", "none", none=12.3),
        row("pointnet-modelnet40", "fgm", none=12.4),
        {key: value for key, value in row(hybrid, "perturb", sor=1.0).items() if key != "weights"},
    ]
    text = summary({"rows": rows})
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == ["defence, victim", "clean", "Drop-200"]
    assert lines[2:] == [
        ["none, pointnet-modelnet40", "88.0 (88.4)", "40.0 (40.2)"],
        ["onet-mesh, pointnet-modelnet40", "70.0 (84.0)", "66.0 (66.9)"],
        ["onet-fill, pointnet-modelnet40", "80.0", "–"],
        [f"sor-smooth, {hybrid}", "–", "50.0"],
    ]
    assert "clean: 200, Drop-200: 100/200" in text
    assert "at most 1.7" in text


def test_figures_of_a_defence_that_has_changed_since_are_marked() -> None:
    older = {"date": "2026-11-25", "specs": {"onet-mesh": "a", "sor": "c"}}
    newer = {"date": "2026-11-29", "specs": {"onet-mesh": "b", "sor": "c"}}
    rows = [
        row("pointnet-modelnet40", "none", none=88.0, onet_mesh=70.0, sor=86.0) | older,
        row("pointnet-modelnet40", "fgm", none=6.0, onet_mesh=71.0, sor=60.0) | newer,
        row("pointnet-modelnet40", "pgd", none=7.0, sor=61.0) | {"date": "2026-11-22"},
    ]
    header, lines = markdown_rows({"rows": rows}, "pointnet-modelnet40", "plain")
    cells = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    assert cells["clean"]["onet-mesh"] == "70.0† (84.0)" and cells["clean"]["sor"] == "86.0 (87.9)"
    assert cells["FGM"]["onet-mesh"] == "71.0" and cells["FGM"]["sor"] == "60.0"
    assert cells["PGD"]["sor"] == "61.0†" and cells["PGD"]["none"] == "7.0"
    assert "† An earlier version" in summary({"rows": rows[:2]})
    assert "†" not in summary({"rows": rows[:1]})


@pytest.mark.parametrize(
    ("victim", "defence", "attack", "figure"),
    [
        ("pointnet-modelnet40", "onet-mesh", "drop-200", 66.94),
        ("pointnet2-ssg-modelnet40", "none", "none", 89.34),
        ("dgcnn-modelnet40", "sor", "advpc", 56.49),
        ("dgcnn-modelnet40", "sor", "pgd", None),
        ("pct-modelnet40", "sor", "none", None),
        ("pointnet-modelnet40", "onet-fill", "drop-200", None),
        ("pointnet-modelnet40", "sor-smooth", "none", None),
    ],
)
def test_published_figures_stand_beside_those_of_the_same_network(
    victim: str, defence: str, attack: str, figure: float | None
) -> None:
    assert published.accuracy(victim, defence, attack) == figure
