"""Fills the tables of the README and of docs/ from results and classes: ``python -m benchmarks.tables``.

A table is between ``<!-- table NAME -->`` and ``<!-- end -->``; NAME is a key of `TABLES` or `CATALOGUE`.
Tables without results are not changed.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import (
    ablation,
    adaptive,
    catalogue,
    conditions,
    corruption,
    labels,
    optimisation,
    reconstruction,
    record,
    refinement,
    repair,
    robustness,
)
from benchmarks.suite import SUITE
from benchmarks.text_tables import markdown
from ifdefense.purifiers.registry import DEFAULT

BLOCK = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
Result = dict[str, Any]


def _machine(result: Result) -> str:
    machine = result["machine"]
    return f"{machine['threads']} threads of {machine['processor']}, torch {machine['torch']}"


def speed(result: Result) -> str:
    """Time of ``purify`` and its stages."""
    rows = [[stage, f"{1000 * seconds:.0f}"] for stage, seconds in result["stages_per_cloud"].items()]
    rows.append(["**all of `purify`**", f"**{1000 * result['seconds_per_cloud']:.0f}**"])
    growth = ", ".join(f"{1000 * seconds:.0f} ms with {count}" for count, seconds in result["growth"].items())
    text = (
        f"{markdown(['stage', 'ms per cloud'], rows)}\n\n`{result['method']}`, {result['clouds']} clouds of "
        f"{result['points']:,} points, median of {result['repeats']} runs, {_machine(result)}. Clouds "
        f"together: {growth} each. Peak memory of the process: {result['peak_memory_gb']:.2f} GB."
    )
    if "large" in result:
        text += " One cloud of {points:,} points: {seconds:.1f} s, {peak_memory_gb:.2f} GB.".format(
            **result["large"]
        )
    if "decoder" in result:
        ratio = result["decoder"]["unfolded"] / result["decoder"]["folded"]
        text += f" The folded decoder is {ratio:.1f} times as fast as the one it was trained with."
    return text


def attack_speed(result: Result) -> str:
    """Time of attacks in bare passes."""
    rows = [
        [name, str(row["passes"]), f"{row['seconds']:.2f}", f"{row['ratio']:.2f}"]
        for name, row in result["attacks"].items()
    ]
    return (
        f"{markdown(['attack', 'passes', 'seconds', 'of bare passes'], rows)}\n\n{result['clouds']} clouds "
        f"of {result['points']:,} points, the shipped PointNet folded; the last column is the time of the "
        "attack over that of as many forward and backward passes on clouds of the attacked size, median of "
        f"{result['repeats']} pairs timed alternately. {_machine(result)}."
    )


def point_operations(result: Result) -> str:
    """Time of each point operation."""
    rows = [[name, f"{1000 * seconds:.1f}"] for name, seconds in result["seconds"].items()]
    return (
        f"{markdown(['operation', 'ms'], rows)}\n\n{result['clouds']} clouds of {result['points']:,} points "
        f"on the {result['device']}, {_machine(result)}."
    )


def headline(result: Result) -> str:
    """Accuracy of the hybrid PointNet under a few attacks: no defence, simple ones, and the default."""
    victim, attacks = "pointnet-modelnet40-hybrid", ("none", "add-hd", "pgd-linf", "drop-200")
    defences = ("none", "sor", "sor-smooth", "sor-ae", DEFAULT)
    found = {
        row["attack"]: row
        for row in result["rows"]
        if (row["victim"], row["kind"]) == (victim, "plain") and row["attack"] in attacks
    }
    titles = {name: SUITE[name].title if name in SUITE else "clean" for name in attacks}
    specs = robustness.latest(result)

    def cell(name: str, defence: str) -> str:
        figure = f"{found[name]['figures'][defence]['accuracy']:.1f}"
        return figure if found[name].get("specs", {}).get(defence) == specs.get(defence) else f"{figure}†"

    rows = [[defence, *(cell(name, defence) for name in attacks)] for defence in defences]
    errors = [row["figures"][defence]["standard_error"] for row in found.values() for defence in defences]
    clouds = ", ".join(f"{titles[name]}: {found[name]['clouds']}" for name in attacks)
    return (
        f"{markdown(['defence', *titles.values()], rows)}\n\nAccuracy of PointNet, trained on clean and on "
        f"purified clouds, in %; test clouds of ModelNet40 ({clouds}), "
        f"standard error at most {max(errors):.1f}."
        + (" † An earlier version of the defence." if "†" in str(rows) else "")
    )


TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "ablation": ("ablation.json", ablation.table),
    "adaptive": ("adaptive.json", adaptive.table),
    "accuracy": ("robustness.json", robustness.summary),
    "attack-speed": ("attack_speed.json", attack_speed),
    "conditions": ("conditions.json", conditions.table),
    "corruptions": ("corruptions.json", corruption.table),
    "headline": ("robustness.json", headline),
    "labels": ("labels.json", labels.table),
    "optimisation": ("optimisation.json", optimisation.table),
    "point-operations": ("point_operations.json", point_operations),
    "reconstruction": ("reconstruction.json", reconstruction.table),
    "refinement": ("refinement.json", refinement.table),
    "repair": ("repair.json", repair.table),
    "robustness": ("robustness.json", robustness.table),
    "speed": ("purify_speed.json", speed),
}
"""Result file and renderer of each table."""

CATALOGUE: dict[str, Callable[[], str]] = {
    "threat-models": catalogue.threat_models,
    "defaults": catalogue.defaults,
    "networks": catalogue.networks,
    "weights": catalogue.weights,
}
"""Renderers of tables that need no results."""

DOCUMENTS = (
    "README.md",
    "benchmarks/README.md",
    "docs/attacks.md",
    "docs/classifiers.md",
    "docs/results.md",
    "docs/training.md",
)


def fill(text: str, folder: Path) -> str:
    """Replaces every marked table whose results exist.

    Args:
        text: Markdown with markers.
        folder: folder of the JSON files.

    Raises:
        ValueError: if a marker names no table.
    """

    def table(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        if name in CATALOGUE:
            return f"{start}\n{CATALOGUE[name]()}\n\n{end}"
        if name not in TABLES:
            raise ValueError(f"there is no table {name!r}; there are {', '.join([*TABLES, *CATALOGUE])}")
        file, render = TABLES[name]
        path = folder / file
        if not path.is_file():
            return match[0]
        return f"{start}\n{render(json.loads(path.read_text(encoding='utf-8')))}\n\n{end}"

    return BLOCK.sub(table, text)


def main() -> int:
    """Fills the tables of the files named on the command line, by default of `DOCUMENTS`."""
    for name in sys.argv[1:] or DOCUMENTS:
        path = Path(name)
        path.write_text(fill(path.read_text(encoding="utf-8"), record.FOLDER), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
