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

from benchmarks import catalogue, report, result_files
from benchmarks.studies import ablation, conditions, labels, optimisation, reconstruction, refinement, repair
from benchmarks.text_tables import markdown

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


def summary(result: Result, victim: str | None = None) -> str:
    """Figures over all attacks: one row per defence of a victim, or of each."""
    names = ("clean", "static", "adaptive", "worst")
    found = [o for o in result["figures"] if o["family"] == "all" and victim in (None, o["victim"])]
    rows = [
        [
            one["defence"] if victim else f"{one['defence']}, {one['victim']}",
            *(report.figure(one[name]) for name in names),
        ]
        for one in found
    ]
    attacks = max(one["attacks"] for one in found)
    return (
        f"{markdown(['defence', 'clean', 'static, mean', 'adaptive, worst', 'worst of all'], rows)}\n\n"
        "Accuracy in % ± standard error; *worst*: the worst of up to "
        f"{attacks} attacks for each of {found[0]['clouds']} test clouds of ModelNet40, not an average."
    )


def headline(result: Result) -> str:
    """The hybrid PointNet without a defence, behind two filters, and behind the default, by attack."""
    victim = "pointnet-modelnet40-hybrid"
    cells = [
        one for one in result["cells"] if one["victim"] == victim and one["knowledge"] in ("none", "static")
    ]
    found = [one for one in result["figures"] if (one["victim"], one["family"]) == (victim, "all")]
    titles = dict.fromkeys(one["title"] for one in cells)
    shown = {(one["defence"], one["title"]): f"{one['accuracy']:.1f}" for one in cells}
    rows = [
        [
            one["defence"],
            *(shown.get((one["defence"], title), "–") for title in titles),
            f"**{one['worst']['accuracy']:.1f}**",
        ]
        for one in found
    ]
    errors = [one["error"] for one in cells] + [one["worst"]["error"] for one in found]
    return (
        f"{markdown(['defence', *titles, 'worst per cloud'], rows)}\n\n"
        "Accuracy in % of PointNet, trained on clean and on purified clouds, on "
        f"{found[0]['clouds']} test clouds of ModelNet40, {result['date']}; standard error at most "
        f"{max(errors):.1f}. *Worst*: clouds that are classified correctly clean and under every attack of "
        "the table, which know the classifier and not the defence."
    )


def grid(result: Result) -> str:
    """All figures and cells of a result."""
    return report.markdown(report.leaderboard([result])).partition("\n")[2].strip()


STANDARD = "standard.json"
"""Result of ``ifdefense-bench run --data modelnet40 --suite standard``."""

TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "ablation": ("ablation.json", ablation.table),
    "accuracy": (STANDARD, summary),
    "adaptive": ("quick-adaptive.json", grid),
    "attack-speed": ("attack_speed.json", attack_speed),
    "conditions": ("conditions.json", conditions.table),
    "corruptions": ("corruptions-standard.json", grid),
    "headline": (STANDARD, headline),
    "labels": ("labels.json", labels.table),
    "optimisation": ("optimisation.json", optimisation.table),
    "point-operations": ("point_operations.json", point_operations),
    "reconstruction": ("reconstruction.json", reconstruction.table),
    "refinement": ("refinement.json", refinement.table),
    "repair": ("repair.json", repair.table),
    "robustness": (STANDARD, grid),
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
        path.write_text(fill(path.read_text(encoding="utf-8"), result_files.FOLDER), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
