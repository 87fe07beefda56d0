"""Writes the tables of the README and of docs/ from results and classes: ``python -m benchmarks.tables``.

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->``; NAME is one of :data:`TABLES` or
:data:`CATALOGUE`. Where the results of a table are missing, what stands there stays.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import record

BLOCK = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
Result = dict[str, Any]


def markdown(header: list[str], rows: list[list[str]], words: int = 1) -> str:
    """A Markdown table: columns of words to the left, as many as said, then numbers to the right."""
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def _machine(result: Result) -> str:
    """What a time was measured on."""
    machine = result["machine"]
    return f"{machine['threads']} threads of {machine['processor']}, torch {machine['torch']}"


def speed(result: Result) -> str:
    """Stages of ``purify`` and what they cost."""
    rows = [[stage, f"{1000 * seconds:.0f}"] for stage, seconds in result["stages_per_cloud"].items()]
    rows.append(["**the whole of `purify`**", f"**{1000 * result['seconds_per_cloud']:.0f}**"])
    growth = ", ".join(f"{1000 * seconds:.0f} ms with {count}" for count, seconds in result["growth"].items())
    decoder = result["decoder"]["unfolded"] / result["decoder"]["folded"]
    return "\n".join(
        [
            markdown(["stage", "ms a cloud"], rows),
            "",
            f"{result['clouds']} clouds of {result['points']:,} points, median of {result['repeats']} runs, "
            f"{_machine(result)}. "
            f"Clouds together: {growth} each. Peak memory of the process: {result['peak_memory_gb']:.2f} GB. "
            f"The folded decoder is {decoder:.1f} times as fast as the one it was trained with.",
        ]
    )


def accuracy(result: Result) -> str:
    """Accuracy of each victim and defence under each attack, beside the published figures."""
    # Not above: that module lays out its own tables with `markdown`.
    from benchmarks.accuracy import table

    settings = result["settings"]
    errors = [figure["standard_error"] for row in result["rows"] for figure in row["figures"].values()]
    published, own = "", ""
    if "perturb" in result["attacks"]:
        published = ", Perturb with 10 × 500 iterations"
        own = (
            f" Ours had {settings['cw_searches']} × {settings['cw_iterations']}; the published setting is "
            "the default of `attacks.Perturb`."
        )
    caption = (
        f"Accuracy in %, {settings['clouds']} {settings['split']} clouds of ModelNet40 drawn in proportion "
        f"to the classes (seed {settings['seed']}; names and targets are in the JSON), standard error at "
        f"most {max(errors):.1f}. In brackets IF-Defense's figure, table 2, where there is one: all 2,468 "
        f"clouds, each row with a classifier trained for that defence{published}.{own}"
    )
    return f"{table(result)}\n\n{caption}"


def robustness(result: Result) -> str:
    """Every attack of the suite against every defence, a table for each victim and kind of attack."""
    # Not above: the suite needs every attack, which the other tables do not.
    from benchmarks.robustness import markdown_rows
    from benchmarks.suite import changed

    headings = {
        "plain": "In brackets IF-Defense's figure (tables 2 and 4: 2,468 clouds, attacks at full length).",
        "adaptive": "Each defence attacked anew by one who knows it; in brackets the plain attack on the "
        "same clouds.",
    }
    parts = []
    for victim, kind in dict.fromkeys((row["victim"], row["kind"]) for row in _in_order(result["rows"])):
        parts.append(f"**{victim}, {kind} attacks.** {headings[kind]}")
        parts.append(markdown(*markdown_rows(result, victim, kind)))
    settings = {changed(row["settings"]): None for row in result["rows"] if row["settings"]}
    parts.append(
        "Accuracy in %, test clouds of ModelNet40 drawn in proportion to the classes (seed 0); *success* is "
        "the attack's own, in %, on the undefended classifier: the target predicted, or without one any "
        "other class than the label. Standard errors and all settings are in `results/robustness.json`; they "
        "are the published ones but for "
        + "; ".join(f"`{one}`" for one in sorted(settings) if not one.endswith("()"))
        + "."
    )
    return "\n\n".join(parts)


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by victim, PointNet first, plain attacks before adaptive ones."""
    return sorted(
        rows, key=lambda row: (row["victim"] != "pointnet-modelnet40", row["victim"], row["kind"] != "plain")
    )


def corruptions(result: Result) -> str:
    """Every corruption, its mean over the severities."""
    # Not above: that module needs the victims, which the other tables do not.
    from benchmarks.corruption import markdown_rows

    numbers = ", ".join(map(str, result["severities"]))
    severities = f"mean over severities {numbers}" if len(result["severities"]) > 1 else f"severity {numbers}"
    return (
        f"{markdown(*markdown_rows(result), words=2)}\n\nAccuracy in %, {severities}; "
        f"{result['clouds']} {result['split']} clouds of ModelNet40 drawn in proportion to the classes (seed "
        f"{result['seed']}), {result['date']}. Clouds stay in the frame of the clean ones."
    )


def attack_speed(result: Result) -> str:
    """What attacks cost beyond their passes."""
    rows = [
        [name, str(row["passes"]), f"{row['seconds']:.2f}", f"{row['ratio']:.2f}"]
        for name, row in result["attacks"].items()
    ]
    return (
        f"{markdown(['attack', 'passes', 'seconds', 'of bare passes'], rows)}\n\n"
        f"{result['clouds']} clouds of {result['points']:,} points, the shipped PointNet folded; the last "
        "column is the time of the attack over that of as many forward and backward passes on clouds of the "
        f"attacked size, timed in turn, median of {result['repeats']} pairs. {_machine(result)}."
    )


def point_operations(result: Result) -> str:
    """Time of each point operation."""
    rows = [[name, f"{1000 * seconds:.1f}"] for name, seconds in result["seconds"].items()]
    return (
        f"{markdown(['operation', 'ms'], rows)}\n\n{result['clouds']} clouds of {result['points']:,} points "
        f"on the {result['device']}, {_machine(result)}."
    )


TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "accuracy": ("accuracy.json", accuracy),
    "accuracy-perturb": ("accuracy_perturb.json", accuracy),
    "attack-speed": ("attack_speed.json", attack_speed),
    "corruptions": ("corruptions.json", corruptions),
    "point-operations": ("point_operations.json", point_operations),
    "robustness": ("robustness.json", robustness),
    "speed": ("purify_speed.json", speed),
}
"""Result file and renderer of each table."""

CATALOGUE = {
    "threat-models": "threat_models",
    "defaults": "defaults",
    "networks": "networks",
    "weights": "weights",
}
"""Function of `benchmarks.catalogue` of each table that needs no results."""

DOCUMENTS = ("README.md", "benchmarks/README.md", "docs/attacks.md", "docs/classifiers.md")


def fill(text: str, folder: Path) -> str:
    """Replaces every marked table whose results are there.

    Args:
        text: Markdown with markers.
        folder: of the JSON files.

    Raises:
        ValueError: if a marker names no table.
    """

    def table(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        if name in CATALOGUE:
            # Not above: that module lays out its own tables with `markdown`.
            from benchmarks import catalogue

            return f"{start}\n{getattr(catalogue, CATALOGUE[name])()}\n\n{end}"
        if name not in TABLES:
            raise ValueError(f"there is no table {name!r}; there are {', '.join([*TABLES, *CATALOGUE])}")
        file, render = TABLES[name]
        path = folder / file
        if not path.is_file():
            return match[0]
        return f"{start}\n{render(json.loads(path.read_text(encoding='utf-8')))}\n\n{end}"

    return BLOCK.sub(table, text)


def main() -> int:
    """Fills the tables of the Markdown files named on the command line, by default of all that have some."""
    for name in sys.argv[1:] or DOCUMENTS:
        path = Path(name)
        path.write_text(fill(path.read_text(encoding="utf-8"), record.FOLDER), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
