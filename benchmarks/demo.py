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
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

import attacks
import classifiers
import ifdefense
from benchmarks import result_files
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
from ifdefense.report import Case, Numbers, Reading, Table, render_html, render_png
from ifdefense.shapes.procedural import make_dataset

CLASSIFIER = "pointnet-procedural"
SEED = 3_000_000
"""Seed of shapes not used in training."""

BATCH = 16
NO_DEFENCE = "none"
DEFENCES = ("srs", "sor", "sor-smooth", "onet-mesh", "onet-fill", DEFAULT)
"""Columns of the tables, baselines first; all methods would take several times longer."""

TARGETED = ("PGD", "Add-Cluster")
"""Attacks that aim at a class; the others only avoid the right one."""

FILES = ("report.html", "demo.png", "demo.json")


@dataclasses.dataclass(frozen=True)
class Effort:
    """Size of the demo.

    Attributes:
        per_class: clouds of each class.
        iterations: iterations of PGD.
        per_round: points dropped per saliency map.
        shown: clouds shown for each attack.
        minutes: how long it takes on two cores, in words.
    """

    per_class: int = 2
    iterations: int = 50
    per_round: int = 10
    shown: int = 2
    minutes: str = "about four minutes"

    def attacks(self) -> dict[str, attacks.Attack]:
        """The attacks by name; those of `TARGETED` aim at a random other class."""
        return {
            "PGD": attacks.PGD(iterations=self.iterations),
            "PGD, L∞ 0.05": attacks.PGD("linf", delta=0.05, iterations=self.iterations),
            "Add-Cluster": attacks.AddCluster(
                searches=1, iterations=2 * self.iterations, rate=0.03, first_weight=0.5, polish=10
            ),
            "Drop-400": attacks.SaliencyDrop(400, per_round=self.per_round),
        }


QUICK = Effort(per_class=1, iterations=15, per_round=50, shown=1, minutes="about a minute")


@dataclasses.dataclass(frozen=True, eq=False)
class Round:
    """One attack against all defences.

    Attributes:
        name: name of the attack.
        added: number of points that the attack has added to each cloud; they come last.
        predicted: ``(S,)`` predicted classes by defence.
        seconds: time of the attack (``"none"``) and of each defence, for all clouds.
        traces: traces of the default method.
    """

    name: str
    added: int
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
    plan = effort.attacks()
    click.echo(
        f"Attacks {CLASSIFIER} on {len(clouds)} clouds of {len(clouds.classes)} classes by "
        f"{', '.join(plan)}, and purifies them by {len(DEFENCES)} methods: {effort.minutes} on two cores.\n"
    )
    labels = torch.from_numpy(clouds.labels)
    rounds = []
    for one in play(victim, clean, clouds, effort):
        rounds.append(one)
        right = {
            name: 100 * (predicted == labels).float().mean() for name, predicted in one.predicted.items()
        }
        tqdm.write(
            f"  [{len(rounds)}/{len(plan) + 1}] {one.name}: {right[NO_DEFENCE]:.0f}% right, "
            f"{right[DEFAULT]:.0f}% behind {DEFAULT}; {sum(one.seconds.values()):.0f} s"
        )
    ranked = [chosen for one in rounds[1:] for chosen in choose(one, clean, clouds, effort.shown)]
    cases = [case for _, case in sorted(ranked, key=lambda chosen: -chosen[0])]
    tables = [accuracies(rounds, labels), times(rounds, len(clouds))]
    for table in tables:
        rows = [list(row) for row in table.rows]
        click.echo(f"\n{table.title}\n\n{text_table(list(table.header), rows)}")
    write(output, cases, tables, clouds, device)
    click.echo(f"\n{summary(cases[0])}\n\n{NEXT.format(report=output / FILES[0], picture=output / FILES[1])}")


NEXT = """\
Look at it in {report} (all clouds, in 3D) and {picture}. What to try next:
  ifdefense purify FOLDER -o clean/ --mesh --report clean/report.html    your own clouds
  ifdefense info                                                         methods and shipped networks
  ifdefense-bench --help                                                 attacks and defences, measured"""


def summary(case: Case) -> str:
    """What the first cloud of the report shows, in a sentence."""
    assert case.before is not None and case.after is not None
    numbers = Numbers.of(case.trace)
    parts = [f"read as {case.before.label}", f"read as {case.after.label} when purified by {DEFAULT}"]
    if numbers.anomalies:
        parts.insert(1, f"{100 * numbers.anomalous_area:.0f}% of its surface is marked and cut out")
    return f"The first cloud, {case.title}: {', '.join(parts)}."


def play(victim: nn.Module, clean: Tensor, clouds: CloudSet, effort: Effort) -> Iterator[Round]:
    """Clean clouds, then each attack, against all defences."""
    labels = torch.from_numpy(clouds.labels)
    targets = attacks.random_targets(labels, len(clouds.classes))
    plan: dict[str, attacks.Attack | None] = {"clean": None, **effort.attacks()}
    # Nothing is drawn where no terminal is.
    with tqdm(total=len(plan) * (1 + len(DEFENCES)), disable=None, leave=False) as bar:
        for name, attack in plan.items():
            bar.set_description(name)
            start = time.perf_counter()
            points = clean
            if attack is not None:
                points = attack(victim, clean, labels, targets if name in TARGETED else None).points
                synchronise(points.device)
            seconds = {NO_DEFENCE: time.perf_counter() - start}
            predicted = {NO_DEFENCE: predict(victim, points)}
            bar.update()
            shown: list[Trace] = []
            for method in DEFENCES:
                bar.set_description(f"{name}, {method}")
                purifier = ifdefense.load(method, device=clean.device)
                start = time.perf_counter()
                traces = purifier.trace(points)
                seconds[method] = time.perf_counter() - start
                purified = torch.from_numpy(np.stack([trace.purified for trace in traces])).to(clean.device)
                predicted[method] = predict(Defended(victim, purifier).classified, purified)
                shown = traces if method == DEFAULT else shown
                bar.update()
            yield Round(name, max(0, points.shape[1] - clean.shape[1]), predicted, seconds, shown)


@torch.no_grad()
def predict(model: Callable[[Tensor], Any], points: Tensor) -> Tensor:
    """``(S,)`` predicted classes, on the CPU."""
    return torch.cat([classify(model, part).argmax(1).cpu() for part in points.split(BATCH)])


def choose(played: Round, clean: Tensor, clouds: CloudSet, count: int) -> list[tuple[float, Case]]:
    """Clouds to show, and how much each shows, best first.

    A cloud misclassified after the attack counts 1, one that is also correct after the defence 2; to this
    `overlap` is added.
    """
    labels = torch.from_numpy(clouds.labels)
    before, after = played.predicted[NO_DEFENCE], played.predicted[DEFAULT]
    worth = (before != labels).double() + ((before != labels) & (after == labels)).double()
    added = np.arange(clean.shape[1] + played.added) >= clean.shape[1] if played.added else None
    if added is not None:
        worth += torch.tensor([overlap(trace, added) for trace in played.traces]).double()

    def reading(predicted: Tensor, index: int) -> Reading:
        label = int(predicted[index])
        return Reading(clouds.classes[label], label == int(labels[index]))

    return [
        (
            float(worth[index]),
            Case(
                f"{clouds.classes[clouds.labels[index]]}, {played.name}",
                played.traces[index],
                clean[index].cpu().numpy(),
                reading(before, index),
                reading(after, index),
                added,
            ),
        )
        for index in worth.argsort(descending=True, stable=True)[:count].tolist()
    ]


def overlap(trace: Trace, added: NDArray[np.bool_]) -> float:
    """How well the marked part of the surface is that of the added points: 1 is exactly.

    The harmonic mean of two shares: of the marked area whose nearest point was added, and of the added
    points whose nearest vertex is marked. 0 if less than half of the marked area is on added points.

    Args:
        trace: of a cloud.
        added: ``(N,)`` which of its points were added.
    """
    if trace.mesh is None or trace.mask is None or not trace.mask.any():
        return 0.0
    from scipy.spatial import cKDTree

    corners = trace.mesh.vertices[trace.mesh.faces]
    area = trace.mesh.face_areas() * trace.mask[trace.mesh.faces].all(1)
    if not area.any():
        return 0.0
    on_added = area[added[cKDTree(trace.points).query(corners.mean(1))[1]]].sum() / area.sum()
    found = trace.mask[cKDTree(trace.mesh.vertices).query(trace.points[added])[1]].mean()
    return float(2 * on_added * found / (on_added + found)) if on_added >= 0.5 else 0.0


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
    result_files.write(output / "demo.json", "demo", **facts, **figures)
