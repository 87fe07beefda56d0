"""Every attack of the suite against every defence, plain and adaptive; see `benchmarks.protocol`.

Plain attacks know the classifier, not the defence. Adaptive ones know both and are computed for every
defence; each cloud counts as the worse of its adaptive and its plain version.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from torch import Tensor

from benchmarks import record
from benchmarks.protocol import (
    DEFENCES,
    NO_DEFENCE,
    Bench,
    Protocol,
    Victim,
    protocol_options,
    rate,
    several,
    specs,
)
from benchmarks.published import accuracy as published_accuracy
from benchmarks.suite import SUITE, affordable_clouds, changed, names
from benchmarks.text_tables import markdown
from ifdefense.provenance import digest, versions

KIND = ("victim", "attack", "kind")
"""Keys of a row."""

KEY = ("settings", "split", "clouds", "seed", "weights", "versions", "attacked")
"""Common keys of comparable rows."""

Row = dict[str, Any]


def figures(bench: Bench, predicted: Tensor, targeted: bool) -> dict[str, float]:
    """Accuracy, its standard error and success of the attack in %."""
    reached = predicted == bench.targets if targeted else predicted != bench.labels
    right = rate(predicted == bench.labels)
    return {**right, "success": rate(reached)["accuracy"]}


def measure(
    bench: Bench, victim: Victim, name: str, defences: tuple[str, ...], knows: bool, published: bool
) -> Row:
    """A row of the results.

    Args:
        bench: clouds, targets and cache.
        victim: the classifier.
        name: attack of the suite, or ``"none"``.
        defences: names of defences.
        knows: whether the attack knows the defence. The row then also has the figures of the plain attack.
        published: whether the attack has its published settings.
    """
    entry = SUITE.get(name)
    targeted = entry is not None and entry.targeted
    plain = bench.points
    row: Row = {
        "victim": victim.title,
        "attack": name,
        "kind": "adaptive" if knows else "plain",
        "settings": None,
        **bench.about(),
        "date": record.today(),
        "weights": victim.weights,
        "versions": versions(),
    }
    if entry is not None:
        row["settings"] = entry.settings("published" if published else "affordable")
        attack = entry.attack("published" if published else "affordable")
        plain = bench.attacked(victim, name, attack, targeted)
    row["attacked"] = digest(plain)
    row["specs"] = {name: digest(spec) for name, spec in specs(defences).items()}
    row["figures"] = {}
    for defence in defences:
        predicted = bench.predictions(victim, bench.purified(plain, defence), defence)
        if knows:
            row.setdefault("plain", {})[defence] = figures(bench, predicted, targeted)
        if knows and defence != NO_DEFENCE:
            aware = bench.attacked(victim, name, attack, targeted, defence)
            predicted = bench.predictions(victim, bench.purified(aware, defence), defence)
        row["figures"][defence] = figures(bench, predicted, targeted)
    return row


@click.command()
@protocol_options("robustness.json", clouds="what the suite says for each attack")
@several("attack", type=click.Choice(["none", *SUITE]), help="Repeatable; all by default.")
@click.option("--adaptive/--plain", "knows", default=None, help="Only one kind of attacks; both by default.")
@click.option("--published", is_flag=True, help="Published settings on 400 clouds, for hours of a GPU.")
def robustness(
    protocol: Protocol,
    victims: tuple[str, ...],
    attacks: tuple[str, ...],
    defences: tuple[str, ...],
    knows: bool | None,
    published: bool,
    out: Path,
) -> None:
    """Every attack against every defence on ModelNet40 (needs IFDEFENSE_DATA).

    Resumes after an interruption. Rows are written to the JSON immediately. A row replaces an older one of
    the same victim, attack and kind, but keeps its figures for other defences if measured on the same
    attacked clouds.
    """
    for knowing in (False, True) if knows is None else (knows,):
        usual = [name for name in names() if SUITE[name].adaptive] if knowing else ["none", *names()]
        for victim in (Victim.load(name, protocol.device) for name in victims):
            for name in attacks or usual:
                bench = protocol.bench(affordable_clouds(name, victim.model, knowing, published))
                row = measure(bench, victim, name, defences, knowing, published)
                add(out, row, {digest(spec): spec for spec in specs(defences).values()})
                shown = ", ".join(f"{one} {row['figures'][one]['accuracy']:.1f}" for one in defences)
                click.echo(f"{victim.title}, {row['kind']} {name}, {bench.clouds} clouds: {shown}")


def add(out: Path, row: Row, described: dict[str, Any]) -> None:
    """Writes a row into the results, replacing an older one.

    Args:
        out: the JSON.
        row: result of `measure`.
        described: descriptions of its defences by their digests.
    """
    old = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"rows": []}
    others = [one for one in old["rows"] if any(one[key] != row[key] for key in KIND)]
    for same in (one for one in old["rows"] if one not in others):
        if all(same.get(key) == row[key] for key in KEY):
            row |= {
                part: {**same[part], **row[part]} for part in ("specs", "figures", "plain") if part in row
            }
    rows = [*others, row]
    used = {key for each in rows for key in each.get("specs", {}).values()}
    known = old.get("specs", {}) | described
    record.write(out, "robustness", specs={key: known[key] for key in sorted(used)}, rows=rows)


def markdown_rows(result: Row, victim: str, kind: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of a victim: one line per attack, one column per measured defence.

    Args:
        result: the JSON.
        victim: title of the victim.
        kind: ``"plain"``, with published figures in brackets, or ``"adaptive"``, with the accuracy under the
            plain attack on the same clouds.
    """
    order = {name: place for place, name in enumerate(("none", *SUITE))}
    rows = [row for row in result["rows"] if (row["victim"], row["kind"]) == (victim, kind)]
    measured = [name for name in DEFENCES if any(name in row["figures"] for row in rows)]
    lines, specs = [], latest(result)
    for row in sorted(rows, key=lambda row: order[row["attack"]]):
        clean = row["attack"] == "none"
        success = "" if clean else f"{row['figures']['none']['success']:.1f}"
        title = "clean" if clean else SUITE[row["attack"]].title
        cells = [_cell(row, defence, specs) for defence in measured]
        lines.append([title, str(row["clouds"]), row["date"][5:], success, *cells])
    return ["attack", "clouds", "measured", "success", *measured], lines


def latest(result: Row) -> dict[str, str]:
    """Digest of the latest spec of each defence; rows are in order of measurement."""
    return {name: spec for row in result["rows"] for name, spec in row.get("specs", {}).items()}


def _cell(row: Row, defence: str, specs: dict[str, str]) -> str:
    """The accuracy behind a defence, with a figure in brackets; † if the defence has changed since."""
    if defence not in row["figures"]:
        return "–"
    changed = "†" if row.get("specs", {}).get(defence) != specs.get(defence) else ""
    if row["kind"] == "adaptive":
        beside = row["plain"][defence]["accuracy"]
    else:
        beside = published_accuracy(row["victim"], defence, row["attack"])
    figure = f"{row['figures'][defence]['accuracy']:.1f}{changed}"
    return figure if beside is None else f"{figure} ({beside:.1f})"


def table(result: Row) -> str:
    """All figures: a table per victim and kind of attack."""
    headings = {
        "plain": "In brackets IF-Defense's figure (tables 2 and 4: 2,468 clouds, attacks at full length).",
        "adaptive": "Attacks know the defence; in brackets the plain attack on the same clouds.",
    }
    rows = sorted(
        result["rows"],
        key=lambda row: (row["victim"] != "pointnet-modelnet40", row["victim"], row["kind"] != "plain"),
    )
    parts = []
    for victim, kind in dict.fromkeys((row["victim"], row["kind"]) for row in rows):
        parts.append(f"**{victim}, {kind} attacks.** {headings[kind]}")
        parts.append(markdown(*markdown_rows(result, victim, kind)))
    settings = sorted({changed(row["settings"]) for row in rows if row["settings"]})
    parts.append(
        "Accuracy in %, test clouds of ModelNet40 drawn in proportion to the classes (seed 0); *success* is "
        "that of the attack in %, on the undefended classifier: the target predicted, or without a target "
        "any class but the label; † an earlier version of the defence. Standard errors and all settings "
        "are in `results/robustness.json`; settings are the published ones but for "
        + "; ".join(f"`{one}`" for one in settings if not one.endswith("()"))
        + "."
    )
    return "\n\n".join(parts)


SUMMARY = ("none", "perturb", "add-cd", "add-hd", "knn", "pgd-linf", "drop-200")
"""Attacks of the short table."""


def summary(result: Row) -> str:
    """A short table of PointNet: one line per victim and defence with most of the figures.

    Rows without digests of the weights are skipped, because their defences have changed.
    """
    rows = {
        (row["victim"], row["attack"]): row
        for row in result["rows"]
        if row["kind"] == "plain"
        and row["attack"] in SUMMARY
        and "weights" in row
        and row["victim"].startswith("pointnet-modelnet40")
    }
    attacks = [name for name in SUMMARY if any(name == attack for _, attack in rows)]
    lines, shown, specs = [], set(), latest(result)
    for victim in sorted({victim for victim, _ in rows}):
        for defence in DEFENCES:
            cells = [
                _cell(rows[victim, name], defence, specs) if (victim, name) in rows else "–"
                for name in attacks
            ]
            if cells.count("–") <= len(cells) // 2:
                lines.append([f"{defence}, {victim}", *cells])
                shown.add(victim)
    rows = {key: row for key, row in rows.items() if key[0] in shown}
    titles = {name: SUITE[name].title if name in SUITE else "clean" for name in attacks}
    clouds = {
        name: "/".join(map(str, sorted({row["clouds"] for (_, one), row in rows.items() if one == name})))
        for name in attacks
    }
    errors = [figure["standard_error"] for row in rows.values() for figure in row["figures"].values()]
    return (
        f"{markdown(['defence, victim', *titles.values()], lines)}\n\n"
        "Accuracy in %, test clouds of ModelNet40 drawn in proportion to the classes ("
        + ", ".join(f"{titles[name]}: {clouds[name]}" for name in attacks)
        + f"), standard error at most {max(errors):.1f}. In brackets IF-Defense's figure for the same "
        "method, table 2: 2,468 clouds, each row with a classifier trained for that defence, published "
        "settings. Our settings are in `benchmarks/results/robustness.json`."
        + (" † An earlier version of the defence." if "†" in str(lines) else "")
    )
