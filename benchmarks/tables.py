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


def speed(result: Result) -> str:
    """Stages of ``purify`` and what they cost."""
    machine = result["machine"]
    rows = [[stage, f"{1000 * seconds:.0f}"] for stage, seconds in result["stages_per_cloud"].items()]
    rows.append(["**the whole of `purify`**", f"**{1000 * result['seconds_per_cloud']:.0f}**"])
    growth = ", ".join(f"{1000 * seconds:.0f} ms with {count}" for count, seconds in result["growth"].items())
    decoder = result["decoder"]["unfolded"] / result["decoder"]["folded"]
    return "\n".join(
        [
            markdown(["stage", "ms a cloud"], rows),
            "",
            f"{result['clouds']} clouds of {result['points']:,} points, median of {result['repeats']} runs, "
            f"{machine['threads']} threads of {machine['processor']}, torch {machine['torch']}. "
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
    """Every attack of the suite against every defence."""
    # Not above: the suite needs every attack, which the other tables do not.
    from benchmarks.robustness import markdown_rows

    settings = {row["settings"]: None for row in result["rows"] if row["settings"]}
    caption = (
        "Accuracy in %, ModelNet40 test clouds drawn in proportion to the classes (seed 0). Standard errors "
        "and the success of each attack are in `results/robustness.json`. Settings: "
        + "; ".join(f"`{one}`" for one in settings)
        + "."
    )
    return f"{markdown(*markdown_rows(result), words=2)}\n\n{caption}"


TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "accuracy": ("accuracy.json", accuracy),
    "accuracy-perturb": ("accuracy_perturb.json", accuracy),
    "robustness": ("robustness.json", robustness),
    "speed": ("purify_speed.json", speed),
}
"""Result file and renderer of each table."""

CATALOGUE = {"threat-models": "threat_models", "defaults": "defaults", "networks": "networks"}
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
