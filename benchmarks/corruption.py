"""``ifdefense-bench corruptions``: the 15 corruptions of ModelNet40-C, with and without defences.

The natural-shift half of the benchmark: what a sensor or a careless pipeline does to clouds, not an attacker.
Corrupted clouds stay in the frame of the clean ones, as attacked clouds do; the published files bring some of
them into the unit cube, which a classifier that has learnt from unit spheres sees as growth.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import click
import torch
from torch import Tensor

from benchmarks import record
from benchmarks.accuracy import DEFENCES, Bench, Settings, load_victim, predictions, victim_title
from classifiers import fold
from ifdefense.corruptions.natural import CORRUPTIONS, corrupt

SEED = 0


def corrupted(points: Tensor, name: str, severity: int) -> Tensor:
    """``(S, M, 3)`` corrupted copies of ``(S, N, 3)`` clouds, in their frame; from the seed of the bench."""
    generator = torch.Generator().manual_seed(SEED)
    return corrupt(points, name, severity, generator, normalise=False)


@click.command()
@click.option(
    "--victim",
    "victims",
    multiple=True,
    default=("pointnet-modelnet40", "pointnet-modelnet40-hybrid"),
    show_default=True,
    help="A shipped name or NETWORK:FILE; may be given several times.",
)
@click.option(
    "--corruption", "chosen", multiple=True, type=click.Choice(list(CORRUPTIONS)), default=CORRUPTIONS
)
@click.option(
    "--severity",
    "severities",
    multiple=True,
    type=click.IntRange(1, 5),
    default=(1, 2, 3, 4, 5),
    show_default=True,
)
@click.option("--defence", "defences", multiple=True, type=click.Choice(DEFENCES), default=DEFENCES)
@click.option("--split", type=click.Choice(["test", "validation"]), default="test", show_default=True)
@click.option("--clouds", default=400, show_default=True, help="Drawn in proportion to the classes.")
@click.option("--batch", default=25, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=Path("cache/accuracy"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=record.FOLDER / "corruptions.json")
def corruptions(
    victims: tuple[str, ...],
    chosen: tuple[str, ...],
    severities: tuple[int, ...],
    defences: tuple[str, ...],
    split: Literal["test", "validation"],
    clouds: int,
    batch: int,
    cache: Path,
    out: Path,
) -> None:
    """Accuracy on corrupted ModelNet40 clouds (needs IFDEFENSE_DATA).

    Goes on where an interrupted run was; the JSON is written anew after every corruption.
    """
    bench = Bench(Settings(split, clouds, SEED), cache, batch)
    models = {name: fold(load_victim(name)) for name in victims}
    rows: list[dict[str, Any]] = []
    for name in chosen:
        for severity in severities:
            points = corrupted(bench.points, name, severity)
            for defence in defences:
                seen = bench.defended(points, defence, f"{name} {severity} → {defence}")["points"]
                for victim, model in models.items():
                    right = (predictions(model, seen, batch) == bench.labels).double().mean()
                    rows.append(
                        {
                            "victim": victim_title(victim),
                            "corruption": name,
                            "severity": severity,
                            "defence": defence,
                            "accuracy": round(100 * float(right), 2),
                        }
                    )
        result = {
            "command": "ifdefense-bench corruptions",
            "date": datetime.now(UTC).date().isoformat(),
            "split": split,
            "clouds": clouds,
            "severities": severities,
            "seed": SEED,
            "machine": record.machine(),
            "rows": rows,
        }
        record.write(out, json.loads(json.dumps(result)))
        click.echo(f"{name}: " + ", ".join(f"{key} {mean:.1f}" for key, mean in means(rows, name).items()))


def means(rows: list[dict[str, Any]], corruption: str | None = None) -> dict[str, float]:
    """Mean accuracy over severities by ``"victim:defence"``, of one corruption or of all."""
    parts: dict[str, list[float]] = {}
    for row in rows:
        if corruption in (None, row["corruption"]):
            parts.setdefault(f"{row['victim']}:{row['defence']}", []).append(row["accuracy"])
    return {key: sum(part) / len(part) for key, part in parts.items()}


def markdown_rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: one line a corruption, one column a victim and defence."""
    rows = result["rows"]
    victims, defences = (dict.fromkeys(row[part] for row in rows) for part in ("victim", "defence"))
    keys = [f"{victim}:{defence}" for victim in victims for defence in defences]
    names = [name for name in CORRUPTIONS if any(row["corruption"] == name for row in rows)]
    lines = []
    for family in dict.fromkeys(CORRUPTIONS[name].family for name in names):
        for name in (name for name in names if CORRUPTIONS[name].family == family):
            mean = means(rows, name)
            lines.append([family, name, *(f"{mean[key]:.1f}" for key in keys)])
    mean = means(rows)
    lines.append(["**all**", "**mean**", *(f"**{mean[key]:.1f}**" for key in keys)])
    return ["family", "corruption", *(key.replace(":", ", ") for key in keys)], lines
