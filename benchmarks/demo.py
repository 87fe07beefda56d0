"""The main job from end to end on clouds that it makes itself: attack, purify, classify again, show it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import attacks
import classifiers
from benchmarks import record
from ifdefense.data.cloudset import CloudSet
from ifdefense.data.formats import replacing
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.purifiers.base import Purifier, Trace
from ifdefense.purifiers.registry import DEFAULT, METHODS
from ifdefense.report import Case, Reading, Table, render_html, render_png
from ifdefense.shapes.procedural import make_dataset

CLASSIFIER = "pointnet-procedural"
SEED = 3_000_000
"""Of shapes that neither the classifier nor the Occupancy Network was trained on."""

BATCH = 16
"""Clouds that are classified together."""

NO_DEFENCE = "none"
SHOWN = DEFAULT
DEFENCES = (*METHODS,)[::-1]
"""Columns of the tables, the baselines first."""

FILES = ("report.html", "demo.png", "demo.json")


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much the demo does.

    Attributes:
        per_class: clouds of each class.
        pgd: iterations of PGD.
        searches: binary searches of CW Perturb.
        iterations: iterations of each search.
        per_round: points that are dropped before the saliency is computed anew.
        shown: clouds shown for each attack.
    """

    per_class: int = 2
    pgd: int = 50
    searches: int = 2
    iterations: int = 40
    per_round: int = 10
    shown: int = 2


QUICK = Effort(per_class=1, pgd=15, searches=1, iterations=15, per_round=50, shown=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Attacked:
    """Clouds after an attack.

    Attributes:
        name: of the attack.
        points: ``(S, N, 3)`` in the classifier's frame.
        seconds: time of the attack for all clouds.
    """

    name: str
    points: Tensor
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """What one defence made of one attack.

    Attributes:
        read: ``(S,)`` classes that are read after the defence.
        seconds: time of the defence for all clouds.
        traces: what it did to each cloud.
    """

    read: Tensor
    seconds: float
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
@click.option("--force", is_flag=True, help="Write over the results of an earlier demo.")
def demo(quick: bool, output: Path, force: bool) -> None:
    """Attacks a classifier, purifies, classifies again; prints a table and writes a report and a picture.

    Needs no data: the clouds are procedural shapes that no network here was trained on, and the weights come
    with the package.
    """
    for name in FILES:
        if (output / name).exists() and not force:
            raise click.ClickException(f"{output / name} exists already; --force replaces it")
    effort = QUICK if quick else Effort()
    clouds = make_dataset(effort.per_class, seed=SEED)
    victim = classifiers.load(CLASSIFIER).eval()
    labels = torch.from_numpy(clouds.labels)
    clean = to_unit_sphere(torch.from_numpy(clouds.points))
    click.echo(f"{len(clouds)} clouds of {len(clouds.classes)} classes, classifier {CLASSIFIER}")
    rounds = list(attack(victim, clean, labels, len(clouds.classes), effort))
    outcomes = {each.name: defend(victim, each) for each in tqdm(rounds, desc="defend", disable=None)}
    cases = [
        case for each in rounds[1:] for case in choose(each, clean, clouds, outcomes[each.name], effort.shown)
    ]
    tables = [accuracies(rounds, outcomes, labels), times(rounds, outcomes)]
    for table in tables:
        rows = [list(row) for row in table.rows]
        click.echo(f"\n{table.title}\n\n{record.text_table(list(table.header), rows)}")
    write(output, cases, tables, clouds)
    click.echo(f"\nlook at {output / FILES[0]} and {output / FILES[1]}")


def attack(
    victim: nn.Module, clean: Tensor, labels: Tensor, num_classes: int, effort: Effort
) -> Iterator[Attacked]:
    """The clouds untouched, then after each attack."""
    plan: dict[str, attacks.Attack] = {
        "PGD": attacks.PGD(iterations=effort.pgd),
        "CW Perturb": attacks.Perturb(searches=effort.searches, iterations=effort.iterations),
        "Drop-400": attacks.SaliencyDrop(400, per_round=effort.per_round),
    }
    yield Attacked("clean", clean, 0.0)
    targets = attacks.random_targets(labels, num_classes)
    for name, method in tqdm(plan.items(), desc="attack", disable=None):
        start = time.perf_counter()
        aims = method.threat.goal != "untargeted"
        result = method(victim, clean, labels, targets if aims else None)
        yield Attacked(name, result.points, time.perf_counter() - start)


def defend(victim: nn.Module, attacked: Attacked) -> dict[str, Outcome]:
    """What the victim reads without a defence and behind each one."""
    outcomes = {NO_DEFENCE: Outcome(read(victim, attacked.points), 0.0, [])}
    for method in METHODS:
        purifier = Purifier.from_pretrained(method)
        start = time.perf_counter()
        traces = purifier.trace(attacked.points)
        seconds = time.perf_counter() - start
        purified = torch.from_numpy(np.stack([trace.purified for trace in traces]))
        # A new surface has a new mean; the victim has learnt from clouds whose mean is 0.
        seen = to_unit_sphere(purified) if purifier.normalise else purified
        outcomes[method] = Outcome(read(victim, seen), seconds, traces)
    return outcomes


@torch.no_grad()
def read(victim: nn.Module, points: Tensor) -> Tensor:
    """Classes ``(S,)`` that the victim reads."""
    return torch.cat([victim(part).argmax(1) for part in torch.chunk(points, -(-len(points) // BATCH))])


def choose(
    attacked: Attacked, clean: Tensor, clouds: CloudSet, outcomes: dict[str, Outcome], count: int
) -> list[Case]:
    """Clouds to show, first of all those that went wrong and that the defence puts right."""
    labels = torch.from_numpy(clouds.labels)
    before, outcome = outcomes[NO_DEFENCE].read, outcomes[SHOWN]
    worth = (before != labels).int() + ((before != labels) & (outcome.read == labels)).int()
    order = worth.argsort(descending=True, stable=True)[:count].tolist()

    def reading(found: Tensor, index: int) -> Reading:
        label = int(found[index])
        return Reading(clouds.classes[label], label == int(labels[index]))

    return [
        Case(
            f"{clouds.classes[clouds.labels[index]]}, {attacked.name}",
            outcome.traces[index],
            clean[index].numpy(),
            reading(before, index),
            reading(outcome.read, index),
        )
        for index in order
    ]


def accuracies(rounds: Sequence[Attacked], outcomes: dict[str, dict[str, Outcome]], labels: Tensor) -> Table:
    """Share of clouds that are read rightly, a row an attack and a column a defence."""

    def cell(outcome: Outcome) -> str:
        return f"{100 * (outcome.read == labels).float().mean().item():.1f}"

    return _table("Accuracy, %", rounds, outcomes, (NO_DEFENCE, *DEFENCES), cell)


def times(rounds: Sequence[Attacked], outcomes: dict[str, dict[str, Outcome]]) -> Table:
    """Milliseconds a cloud, of each attack and of each defence after it."""
    count = len(rounds[0].points)
    table = _table(
        "Time, ms a cloud", rounds, outcomes, DEFENCES, lambda one: f"{1000 * one.seconds / count:.1f}"
    )
    attack_times = [f"{1000 * each.seconds / count:.1f}" for each in rounds]
    rows = [[row[0], spent, *row[1:]] for row, spent in zip(table.rows, attack_times, strict=True)]
    return Table(table.title, [table.header[0], "the attack", *table.header[1:]], rows)


def _table(
    title: str,
    rounds: Sequence[Attacked],
    outcomes: dict[str, dict[str, Outcome]],
    columns: Sequence[str],
    cell: Callable[[Outcome], str],
) -> Table:
    rows = [[each.name, *(cell(outcomes[each.name][column]) for column in columns)] for each in rounds]
    return Table(title, ["attack", *columns], rows)


def write(output: Path, cases: Sequence[Case], tables: Sequence[Table], clouds: CloudSet) -> None:
    """Writes the page, the picture and the figures."""
    output.mkdir(parents=True, exist_ok=True)
    facts = {
        "classifier": CLASSIFIER,
        "defence shown": SHOWN,
        "clouds": f"{len(clouds)} of {len(clouds.classes)} classes",
        "seed": str(SEED),
        "threads": str(torch.get_num_threads()),
    }
    page = render_html(cases, title="A classifier attacked and defended", facts=facts, tables=tables)
    with replacing(output / "report.html", force=True) as partial:
        partial.write_text(page, encoding="utf-8")
    with replacing(output / "demo.png", force=True) as partial:
        partial.write_bytes(render_png(cases))
    figures = {
        table.title: [dict(zip(table.header, row, strict=True)) for row in table.rows] for table in tables
    }
    record.write(output / "demo.json", {**facts, **figures, "machine": record.machine()})
