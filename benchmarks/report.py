"""Results as Markdown and as one page: ``ifdefense-bench report``.

Reads results of `benchmarks.evaluate` and cards (`benchmarks.cards`); nothing is computed that was not
measured. A *row* is a defence in front of a victim under a family of threat models, on one data set with one
suite.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks import cards as entries
from benchmarks import published
from benchmarks.cards import BASELINE, FORMAT, Card, Result
from benchmarks.cells import GUIDE, SURROGATE
from benchmarks.text_tables import markdown as table
from ifdefense.data.formats import replacing
from ifdefense.report import ViewFrame, self_contained

FAMILIES = {
    "all": "all attacks",
    "recent": "budgets of recent papers",
    "if-defense": "budgets of IF-Defense",
    "corruption": "corruptions (static: their mean)",
}
"""Families of threat models, as the page calls them."""

FIGURES = ("worst", "adaptive", "static", "clean")
KNOWLEDGE = {
    "none": "as it is",
    "static": "static",
    "straight-through": "straight-through",
    "exact": "exact gradient",
    "eot": "EOT",
    SURROGATE + GUIDE: f"start and gradient from {GUIDE}",
}
"""What attackers know, in the order of the columns."""

HEADLINE = (
    "**Worst** is the headline: the share of clouds that are classified correctly clean and under every "
    "attack, static and adaptive. It is a minimum per cloud, not an average over attacks. *Static* attacks "
    "know the classifier and not the defence; it is the mean over those that break the undefended classifier "
    "on at least 80% of the clouds. *Adaptive* attacks go through the defence; it is a minimum per cloud, "
    "too. Accuracies are in %, ± is the bootstrap standard error over clouds."
)


def leaderboard(results: Sequence[Result], cards: Sequence[Card] = ()) -> dict[str, Any]:
    """Rows, cells and certificates of results and cards, as JSON.

    Where several measured the same defence in the same way, the one with most clouds is kept, of these the
    newest.
    """
    about = {card["name"]: {key: card[key] for key in entries.ABOUT} for card in cards}
    rows: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    cells: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    certified: dict[tuple[str, str, str], dict[str, Any]] = {}
    for result in [*(result for card in cards for result in card["results"]), *results]:
        run = f"{result['data']['name']}, {result['suite']}"
        for key, found in _grouped(_rows(result, run, about)).items():
            if key not in rows or _worth(found) >= _worth(rows[key]):
                rows[key] = found
                cells[key] = _grouped(_cells(result, run)).get(key, [])
        for curve in result.get("certified", ()):
            certified[run, curve["victim"], curve["defence"]] = {"run": run, **curve}
    return {
        "format": FORMAT,
        "rows": sorted(itertools.chain(*rows.values()), key=_order),
        "cells": list(itertools.chain(*cells.values())),
        "certified": list(certified.values()),
    }


def _grouped(items: Iterable[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Rows or cells by run, victim and defence."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for item in items:
        found.setdefault((item["run"], item["victim"], item["defence"]), []).append(item)
    return found


def _worth(rows: Sequence[Mapping[str, Any]]) -> tuple[int, str]:
    return min(row["clouds"] for row in rows), max(row["measured"]["date"] for row in rows)


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    family = [*FAMILIES].index(row["family"]) if row["family"] in FAMILIES else len(FAMILIES)
    worst = row["worst"]
    return row["run"], row["victim"], family, 1.0 if worst is None else -worst["accuracy"]


def _rows(result: Result, run: str, about: Mapping[str, dict[str, str]]) -> Iterable[dict[str, Any]]:
    ahead = {(row["victim"], row["family"], row["defence"]): row for row in entries.differences(result)}
    measured = {key: result.get(key, "") for key in ("command", "date", "minutes", "machine", "versions")}
    for figures in result["figures"]:
        victim, family, defence = figures["victim"], figures["family"], figures["defence"]
        own = defence == result["row"]
        mine = [c for c in result["cells"] if c["victim"] == victim and c["defence"] == defence]
        times = [c["milliseconds"] for c in mine if c.get("milliseconds") is not None]
        yield {
            "run": run,
            "victim": victim,
            "family": family,
            "defence": entries.name_of(result, defence),
            **{name: _shown_figure(figures, name) for name in FIGURES},
            "clouds": figures["clouds"],
            "milliseconds": statistics.median(times) if times and defence != "none" else None,
            "difference": ahead.get((victim, family, defence)),
            "flags": [
                flag
                for flag in result["flags"]
                if flag.get("defence", result["row"]) == defence and _concerns(flag, mine, victim, family)
            ],
            "traits": {name: result["defence"].get(name) for name in _TRAITS}
            if own and result["defence"]
            else None,
            "about": about.get(entries.name_of(result, defence)),
            "measured": measured | {"digests": _digests(result, victim, own)},
        }


def _shown_figure(figures: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None = figures.get(name)
    if found is None or name != "static":
        return found
    # A mean over attacks, whose spread is that of the attacks and not of the draws.
    return {key: value for key, value in found.items() if key != "spread"}


def _concerns(flag: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], victim: str, family: str) -> bool:
    """Whether a flag is about the figures of a victim under a family of threat models."""
    if flag.get("victim", victim) != victim:
        return False
    if family == entries.ALL:
        return True
    families = {cell["family"] for cell in cells if cell["source"] in flag.get("sources", ())}
    return not families or bool(families & {family, "clean"})


def _digests(result: Result, victim: str, own: bool) -> dict[str, str]:
    found = {
        "clouds": result["data"].get("digest"),
        "victim": result.get("victims", {}).get(victim, {}).get("weights"),
        "defence": result["defence"].get("digest") if own else None,
    }
    return {name: value for name, value in found.items() if value}


_TRAITS = ("deterministic", "differentiable", "optimises")
_SHOWN = (
    "victim",
    "source",
    "title",
    "family",
    "defence",
    "knowledge",
    "clouds",
    "draws",
    "accuracy",
    "error",
    "spread",
    "success",
    "budget",
    "settings",
    "passes",
    "milliseconds",
)


def _cells(result: Result, run: str) -> Iterable[dict[str, Any]]:
    for cell in result["cells"]:
        shown = {key: cell.get(key) for key in _SHOWN}
        shown["defence"] = entries.name_of(result, cell["defence"])
        peers = published.comparable(result["data"]["name"], cell["victim"], cell["defence"], cell["source"])
        shown["budget"] = _budget(cell.get("budget"))
        yield {"run": run, **shown, "published": peers if cell["knowledge"] in ("none", "static") else []}


def _budget(budget: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A norm, or ``"add"`` or ``"drop"``, and the largest value; ``None`` if the size is minimised."""
    if budget is None:
        return None
    if budget["changes"] != "shift":
        return {"norm": budget["changes"], "epsilon": budget["count"]}
    return None if budget["epsilon"] is None else {"norm": budget["norm"], "epsilon": budget["epsilon"]}


def figure(value: Mapping[str, Any] | None) -> str:
    """An accuracy with its error, and the spread over draws where there are several."""
    if value is None or value.get("accuracy") is None:
        return "–"
    text = f"{value['accuracy']:.1f}"
    if value.get("error") is not None:
        text += f" ± {value['error']:.1f}"
    if value.get("spread"):
        text += f" (draws ± {value['spread']:.1f})"
    return text


def _signed(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return "–"
    return "{difference:+.1f} [{low:+.1f}, {high:+.1f}]".format(**difference)


def markdown(board: Mapping[str, Any]) -> str:
    """A `leaderboard`, with every attack and certificates, as Markdown."""
    parts = ["# Leaderboard", HEADLINE]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in board["rows"]:
        groups.setdefault((row["run"], row["victim"], row["family"]), []).append(row)
    for (run, victim, family), rows in groups.items():
        parts += [f"## {victim}, {FAMILIES.get(family, family)} ({run})", _board(rows)]
        parts.append("\n".join(f"* {_flag(row['defence'], flag)}" for row in rows for flag in row["flags"]))
        if family == entries.ALL or (run, victim, entries.ALL) not in groups:
            of_group = [c for c in board["cells"] if (c["run"], c["victim"]) == (run, victim)]
            shown = (family, "clean")
            parts.append(_attacks([c for c in of_group if family == entries.ALL or c["family"] in shown]))
    for curve in board["certified"]:
        parts += [f"## Certified: {curve['defence']}, {curve['victim']} ({curve['run']})", _curve(curve)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _board(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["defence", *FIGURES, f"worst − {BASELINE}, 95%", "ms per cloud", "clouds", "flags"]
    lines = [
        [
            row["defence"],
            *(figure(row[name]) for name in FIGURES),
            _signed(row["difference"]),
            "–" if row["milliseconds"] is None else f"{row['milliseconds']:.1f}",
            str(row["clouds"]),
            ", ".join(flag["name"] for flag in row["flags"]) or "none",
        ]
        for row in rows
    ]
    return table(header, lines)


def _flag(defence: str, flag: Mapping[str, Any]) -> str:
    where = f" ({', '.join(flag['sources'])})" if flag.get("sources") else ""
    return f"`{defence}`, **{flag['name']}**{where}: {flag['says']}"


def _attacks(cells: Sequence[Mapping[str, Any]]) -> str:
    known = _columns(cells)
    lines: dict[tuple[str, str], dict[str, str]] = {}
    peers: dict[tuple[str, str], str] = {}
    for cell in cells:
        key = cell["title"] or cell["source"], cell["defence"]
        lines.setdefault(key, {})[cell["knowledge"]] = figure(cell)
        if cell["published"]:
            peers[key] = "; ".join("{accuracy:.1f} {paper}: {differs}".format(**p) for p in cell["published"])
    header = ["attack", "defence", *(_known(name) for name in known)]
    rows = [[*key, *(found.get(name, "–") for name in known)] for key, found in lines.items()]
    if peers:
        header.append("published, and what differs")
        rows = [[*row, peers.get((row[0], row[1]), "–")] for row in rows]
    return table(header, rows, words=2)


def _known(knowledge: str) -> str:
    """What an attacker knows, in words."""
    return KNOWLEDGE.get(knowledge, knowledge.replace(":", " from "))


def _columns(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the attackers of cells know, in order."""
    found = {cell["knowledge"] for cell in cells}
    return [*(name for name in KNOWLEDGE if name in found), *sorted(found - KNOWLEDGE.keys())]


def _curve(curve: Mapping[str, Any]) -> str:
    names = {"certified": "certified", "empirical_add": "under Add", "empirical_drop": "under Drop"}
    there = [name for name in names if curve.get(name)]
    rows = [
        [str(count), *("–" if i >= len(curve[name]) else f"{curve[name][i]:.1f}" for name in there)]
        for i, count in enumerate(curve["removed_or_added"])
    ]
    return table(["points added or removed", *(names[name] for name in there)], rows)


def page(
    board: Mapping[str, Any], results: Sequence[Result] = (), *, title: str = "Leaderboard of purifiers"
) -> str:
    """One self-contained page with a `leaderboard`, charts, every attack and certificates.

    Args:
        board: the leaderboard.
        results: results whose examples are shown.
        title: heading.
    """
    template = (resources.files("benchmarks") / "templates" / "leaderboard.html").read_text(encoding="utf-8")
    examples = [
        {"defence": result["name"], **_example(each)}
        for result in results
        for each in result.get("examples", ())
    ]
    content = {"title": title, "families": FAMILIES, "knowledge": KNOWLEDGE, **board, "examples": examples}
    return self_contained(template, content)


def write_page(result: Result, path: Path) -> None:
    """Writes the page of one result, without the cards."""
    with replacing(path, force=True) as partial:
        partial.write_text(
            page(leaderboard([result]), [result], title=f"{result['name']} under attack"), encoding="utf-8"
        )


def _example(example: Mapping[str, Any]) -> dict[str, Any]:
    clouds = {
        name: np.asarray(example[name], np.float64).reshape(-1, 3)
        for name in ("clean", "attacked", "purified")
        if example.get(name) is not None
    }
    frame = ViewFrame.around(*_middle(clouds["clean"]), np.concatenate([*clouds.values()]))
    known = {key: value for key, value in example.items() if key not in clouds}
    return known | {"clouds": {name: frame.pack(cloud) for name, cloud in clouds.items()}, **frame.model()}


def _middle(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    centre = (points.min(axis=0) + points.max(axis=0)) / 2
    return centre, float(np.linalg.norm(points - centre, axis=1).max()) or 1.0


FILES = ("leaderboard.json", "leaderboard.md", "leaderboard.html")


@click.command()
@click.argument("results", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("leaderboard"),
    show_default=True,
    help="Folder of the report.",
)
@click.option("--cards/--no-cards", "with_cards", default=True, help="Include the cards of this package.")
@click.option("--force", is_flag=True, help="Replace an earlier report.")
def report(results: tuple[Path, ...], output: Path, with_cards: bool, force: bool) -> None:
    """Writes results of `run`, and the cards, as JSON, Markdown and one page.

    A file that is not a result is skipped, and the exit code is 1.
    """
    for name in FILES:
        if (output / name).exists() and not force:
            raise click.ClickException(f"{output / name} exists already; --force replaces it")
    found, failed = [], False
    for path in results:
        try:
            found.append(entries.load_result(path))
        except ValueError as error:
            failed = True
            click.echo(f"Error: {error}", err=True)
    cards = entries.load_all() if with_cards else []
    if not found and not cards:
        raise click.ClickException("there is nothing to report: name the files of results")
    board = leaderboard(found, cards)
    texts = (
        json.dumps(board, indent=1, allow_nan=False) + "\n",
        markdown(board),
        page(board, found),
    )
    output.mkdir(parents=True, exist_ok=True)
    for name, text in zip(FILES, texts, strict=True):
        with replacing(output / name, force=True) as partial:
            partial.write_text(text, encoding="utf-8")
    click.echo(f"see {output / FILES[2]}")
    if failed:
        raise click.exceptions.Exit(1)
