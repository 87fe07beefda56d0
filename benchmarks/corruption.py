"""The 15 corruptions of ModelNet40-C against every defence; see `benchmarks.protocol`.

Corrupted clouds stay in the frame of the clean ones, like attacked clouds. The published files rescale some
of them to the unit cube, a change of scale for classifiers trained on unit spheres.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks import record
from benchmarks.protocol import Protocol, Victim, protocol_options, rate, several, specs
from benchmarks.text_tables import markdown
from ifdefense.corruptions.natural import CORRUPTIONS, corrupt


def corrupted(points: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """``(S, M, 3)`` corrupted copies of ``(S, N, 3)`` clouds, in their frame."""
    generator = torch.Generator().manual_seed(seed)
    return corrupt(points, name, severity, generator, normalise=False)


@click.command()
@protocol_options("corruptions.json", victims=("pointnet-modelnet40", "pointnet-modelnet40-hybrid"))
@several("corruption", CORRUPTIONS, type=click.Choice(list(CORRUPTIONS)), help="Repeatable; all by default.")
@click.option(
    "--severity",
    "severities",
    multiple=True,
    type=click.IntRange(1, 5),
    default=(1, 2, 3, 4, 5),
    show_default=True,
)
def corruptions(
    protocol: Protocol,
    victims: tuple[str, ...],
    defences: tuple[str, ...],
    corruptions: tuple[str, ...],
    severities: tuple[int, ...],
    out: Path,
) -> None:
    """Accuracy on corrupted ModelNet40 clouds (needs IFDEFENSE_DATA).

    Resumes after an interruption; the JSON is written after every corruption.
    """
    bench = protocol.bench()
    models = [Victim.load(name, protocol.device) for name in victims]
    about = {
        "severities": severities,
        "weights": {one.title: one.weights for one in models},
        "specs": specs(defences),
    }
    rows: list[dict[str, Any]] = []
    for name in corruptions:
        for severity in severities:
            points = corrupted(bench.points, name, severity, bench.seed)
            for defence in defences:
                seen = bench.purified(points, defence)
                place = {"corruption": name, "severity": severity, "defence": defence}
                for victim in models:
                    accuracy = rate(bench.predictions(victim, seen, defence) == bench.labels)["accuracy"]
                    rows.append({"victim": victim.title, **place, "accuracy": accuracy})
        record.write(out, "corruptions", **bench.about(), **about, rows=rows)
        click.echo(f"{name}: " + ", ".join(f"{key} {mean:.1f}" for key, mean in means(rows, name).items()))


def means(rows: list[dict[str, Any]], corruption: str | None = None) -> dict[str, float]:
    """Mean accuracy over severities by ``"victim:defence"``, of one corruption or of all."""
    parts: dict[str, list[float]] = {}
    for row in rows:
        if corruption in (None, row["corruption"]):
            parts.setdefault(f"{row['victim']}:{row['defence']}", []).append(row["accuracy"])
    return {key: sum(part) / len(part) for key, part in parts.items()}


def markdown_rows(result: dict[str, Any], victim: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of a victim: one line per corruption, one column per defence."""
    rows = [row for row in result["rows"] if row["victim"] == victim]
    defences = list(dict.fromkeys(row["defence"] for row in rows))
    names = sorted({row["corruption"] for row in rows}, key=list(CORRUPTIONS).index)

    def cells(mean: dict[str, float], mark: str = "") -> list[str]:
        return [f"{mark}{mean[f'{victim}:{defence}']:.1f}{mark}" for defence in defences]

    lines = [[CORRUPTIONS[name].family, name, *cells(means(rows, name))] for name in names]
    lines.append(["**all**", "**mean**", *cells(means(rows), "**")])
    return ["family", "corruption", *defences], lines


def table(result: dict[str, Any]) -> str:
    """A table per victim: every corruption, its mean over the severities."""
    numbers = ", ".join(map(str, result["severities"]))
    severities = f"mean over severities {numbers}" if len(result["severities"]) > 1 else f"severity {numbers}"
    victims = dict.fromkeys(row["victim"] for row in result["rows"])
    tables = [f"**{one}**\n\n{markdown(*markdown_rows(result, one), words=2)}" for one in victims]
    return "\n\n".join(tables) + (
        f"\n\nAccuracy in %, {severities}; {result['clouds']} {result['split']} clouds of ModelNet40 drawn "
        f"in proportion to the classes (seed {result['seed']}), {result['date']}."
    )
