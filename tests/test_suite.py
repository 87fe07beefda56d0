"""The attacks of the benchmarks, their settings and suites, and figures that others have published."""

from __future__ import annotations

from typing import get_args

import pytest

import attacks
from benchmarks import catalogue, published
from benchmarks.suite import SUITE, Effort, changed, names


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
