"""Demo on procedural clouds: attack, purify, classify again, and a report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import attacks
import classifiers
import ifdefense
from benchmarks import record
from benchmarks.text_tables import text_table
from ifdefense import Defended
from ifdefense.console import device_option
from ifdefense.data.cloudset import CloudSet
from ifdefense.data.formats import replacing
from ifdefense.devices import synchronise
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.logits import classify
from ifdefense.purifiers.base import Trace
from ifdefense.purifiers.registry import DEFAULT
from ifdefense.report import Case, Reading, Table, render_html, render_png
from ifdefense.shapes.procedural import make_dataset

CLASSIFIER = "pointnet-procedural"
SEED = 3_000_000
"""Seed of shapes not used in training."""

BATCH = 16
NO_DEFENCE = "none"
DEFENCES = ("srs", "sor", "sor-smooth", "onet-mesh", "onet-fill", DEFAULT)
"""Columns of the tables, baselines first; all methods would take several times longer."""

FILES = ("report.html", "demo.png", "demo.json")


@dataclasses.dataclass(frozen=True)
class Effort:
    """Size of the demo.

    Attributes:
        per_class: clouds of each class.
        iterations: iterations of PGD.
        per_round: points dropped per saliency map.
        shown: clouds shown for each attack.
    """

    per_class: int = 2
    iterations: int = 50
    per_round: int = 10
    shown: int = 2

    def attacks(self) -> dict[str, attacks.Attack]:
        """The attacks by name."""
        return {
            "PGD": attacks.PGD(iterations=self.iterations),
            "PGD, L∞ 0.05": attacks.PGD("linf", delta=0.05, iterations=self.iterations),
            "Drop-400": attacks.SaliencyDrop(400, per_round=self.per_round),
        }


QUICK = Effort(per_class=1, iterations=15, per_round=50, shown=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Round:
    """One attack against all defences.

    Attributes:
        name: name of the attack.
        predicted: ``(S,)`` predicted classes by defence.
        seconds: time of the attack (``"none"``) and of each defence, for all clouds.
        traces: traces of the default method.
    """

    name: str
    predicted: dict[str, Tensor]
    seconds: dict[str, float]
    traces: list[Trace]


@click.command()
@click.option("--quick", is_flag=True, help="Fewer clouds and weaker attacks.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo"),
    show_default=True,
)
@click.option("--force", is_flag=True, help="Replace the results of an earlier demo.")
@device_option
def demo(quick: bool, output: Path, force: bool, device: torch.device) -> None:
    """Attacks a classifier, purifies, classifies again; prints tables, writes a report and a picture.

    Works offline: the clouds are procedural shapes not used in training.
    """
    for name in FILES:
        if (output / name).exists() and not force:
            raise click.ClickException(f"{output / name} exists already; --force replaces it")
    effort = QUICK if quick else Effort()
    clouds = make_dataset(effort.per_class, seed=SEED)
    victim = classifiers.fold(classifiers.load(CLASSIFIER)).to(device)
    clean = to_unit_sphere(torch.from_numpy(clouds.points).to(device))
    click.echo(f"{len(clouds)} clouds of {len(clouds.classes)} classes, classifier {CLASSIFIER}")
    rounds = list(play(victim, clean, clouds, effort))
    cases = [case for each in rounds[1:] for case in choose(each, clean, clouds, effort.shown)]
    tables = [accuracies(rounds, torch.from_numpy(clouds.labels)), times(rounds, len(clouds))]
    for table in tables:
        rows = [list(row) for row in table.rows]
        click.echo(f"\n{table.title}\n\n{text_table(list(table.header), rows)}")
    write(output, cases, tables, clouds, device)
    click.echo(f"\nsee {output / FILES[0]} and {output / FILES[1]}")


def play(victim: nn.Module, clean: Tensor, clouds: CloudSet, effort: Effort) -> Iterator[Round]:
    """Clean clouds, then each attack, against all defences."""
    labels = torch.from_numpy(clouds.labels)
    targets = attacks.random_targets(labels, len(clouds.classes))
    plan: dict[str, attacks.Attack | None] = {"clean": None, **effort.attacks()}
    for name, attack in tqdm(plan.items(), disable=None):
        start = time.perf_counter()
        points = clean
        if attack is not None:
            aims = targets if name == "PGD" else None
            points = attack(victim, clean, labels, aims).points
            synchronise(points.device)
        seconds = {NO_DEFENCE: time.perf_counter() - start}
        predicted = {NO_DEFENCE: predict(victim, points)}
        shown: list[Trace] = []
        for method in DEFENCES:
            purifier = ifdefense.load(method, device=clean.device)
            start = time.perf_counter()
            traces = purifier.trace(points)
            seconds[method] = time.perf_counter() - start
            purified = torch.from_numpy(np.stack([trace.purified for trace in traces])).to(clean.device)
            predicted[method] = predict(Defended(victim, purifier).classified, purified)
            shown = traces if method == DEFAULT else shown
        yield Round(name, predicted, seconds, shown)


@torch.no_grad()
def predict(model: Callable[[Tensor], Any], points: Tensor) -> Tensor:
    """``(S,)`` predicted classes, on the CPU."""
    return torch.cat([classify(model, part).argmax(1).cpu() for part in points.split(BATCH)])


def choose(played: Round, clean: Tensor, clouds: CloudSet, count: int) -> list[Case]:
    """Clouds to show: first those misclassified after the attack and correct after the defence."""
    labels = torch.from_numpy(clouds.labels)
    before, after = played.predicted[NO_DEFENCE], played.predicted[DEFAULT]
    worth = (before != labels).int() + ((before != labels) & (after == labels)).int()

    def reading(predicted: Tensor, index: int) -> Reading:
        label = int(predicted[index])
        return Reading(clouds.classes[label], label == int(labels[index]))

    return [
        Case(
            f"{clouds.classes[clouds.labels[index]]}, {played.name}",
            played.traces[index],
            clean[index].cpu().numpy(),
            reading(before, index),
            reading(after, index),
        )
        for index in worth.argsort(descending=True, stable=True)[:count].tolist()
    ]


def accuracies(rounds: Sequence[Round], labels: Tensor) -> Table:
    """Accuracy in %: one row per attack, one column per defence."""
    columns = (NO_DEFENCE, *DEFENCES)
    rows = [
        [one.name, *(f"{100 * (one.predicted[name] == labels).float().mean():.1f}" for name in columns)]
        for one in rounds
    ]
    return Table("Accuracy, %", ["attack", *columns], rows)


def times(rounds: Sequence[Round], count: int) -> Table:
    """Milliseconds per cloud, of each attack and of each defence after it."""
    rows = [[one.name, *(f"{1000 * value / count:.1f}" for value in one.seconds.values())] for one in rounds]
    return Table("Time, ms per cloud", ["attack", "the attack", *DEFENCES], rows)


def write(
    output: Path,
    cases: Sequence[Case],
    tables: Sequence[Table],
    clouds: CloudSet,
    device: torch.device,
) -> None:
    """Writes the page with all cases, the picture of the first one, and the figures."""
    output.mkdir(parents=True, exist_ok=True)
    facts = {
        "classifier": CLASSIFIER,
        "defence shown": DEFAULT,
        "clouds": f"{len(clouds)} of {len(clouds.classes)} classes",
        "seed": str(SEED),
        "threads": str(torch.get_num_threads()),
        "device": str(device),
    }
    page = render_html(cases, title="A classifier attacked and defended", facts=facts, tables=tables)
    with replacing(output / "report.html", force=True) as partial:
        partial.write_text(page, encoding="utf-8")
    with replacing(output / "demo.png", force=True) as partial:
        partial.write_bytes(render_png(cases[:1]))
    figures = {
        table.title: [dict(zip(table.header, row, strict=True)) for row in table.rows] for table in tables
    }
    record.write(output / "demo.json", "demo", **facts, **figures)
