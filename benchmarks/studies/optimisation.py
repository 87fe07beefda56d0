"""Points optimised onto a surface: Adam as published, with the field at every few steps, and Newton steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from benchmarks import result_files
from benchmarks.cells import BLOCK
from benchmarks.foreign import victim_of
from benchmarks.speed import make_clouds, median_seconds
from benchmarks.studies.common import Bench, bench_options, several
from benchmarks.suite import SUITE
from benchmarks.text_tables import markdown, text_table
from ifdefense.implicit.base import ImplicitNetwork, load_network
from ifdefense.implicit.occupancy import OccupancyConfig, OccupancyNetwork
from ifdefense.purifiers.compose import Compose
from ifdefense.purifiers.filters import StatisticalOutlierRemoval
from ifdefense.purifiers.surface import SurfacePurifier
from ifdefense.restorers.optimised import Adam, Newton, OptimisedRestorer, Solver

VICTIM = "pointnet-modelnet40"
ATTACKS = ("pgd-linf", "drop-200")
SOLVERS: dict[str, Adam | Newton] = {
    "Adam": Adam(),
    "Adam, field at every 2nd step": Adam(every=2),
    "Adam, field at every 4th step": Adam(every=4),
    "Newton": Newton(),
}
TOGETHER = 6
"""Clouds per timed batch."""
PEER = 13.6
"""Seconds per cloud of IF-Defense's own ONet-Opt: 201 steps, `TOGETHER` clouds, 2 cores of this kind."""


def purifier(network: ImplicitNetwork, solver: Solver) -> Compose:
    """SOR, then the optimisation."""
    return Compose([StatisticalOutlierRemoval(), SurfacePurifier(network, OptimisedRestorer(solver))])


def evaluations(solver: Adam | Newton) -> int:
    """Evaluations of the field per point, including the last one for the offset."""
    return 1 + -(-solver.steps // (solver.every if isinstance(solver, Adam) else 1))


class Accuracies:
    """Accuracy behind a purifier by kind of input.

    Args:
        bench: clean clouds, attacked here.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench, self.victim = bench, victim_of(VICTIM, device=bench.device)
        self.given = {"clean": bench.points}
        for name in ATTACKS:
            self.given[SUITE[name].title] = bench.attacked(VICTIM, name)

    def __call__(self, method: Compose) -> dict[str, Any]:
        """Figures by title."""
        bench, figures = self.bench, {}
        for name, points in self.given.items():
            parts = tqdm(points.split(BLOCK), name, mininterval=5)
            found = torch.cat([method(part, points.shape[1], bench.seed) for part in parts])
            figures[name] = bench.accuracy(self.victim, found, method)
        return figures


@click.command()
@bench_options("optimisation.json", 100)
@several("solver", type=click.Choice(list(SOLVERS)), help="Repeatable; all by default.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Runs per median.")
@click.option("--times-only", is_flag=True, help="Measure times again, keep the accuracies that OUT has.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of torch; its own choice by default.")
def optimisation(
    bench: Callable[[], Bench],
    solvers: tuple[str, ...],
    repeats: int,
    times_only: bool,
    threads: int | None,
    out: Path,
) -> None:
    """Time and accuracy of onet-opt by its solver (needs IFDEFENSE_DATA).

    Times are for the shipped network and for random weights of the published widths.
    """
    if times_only and not out.is_file():
        raise click.UsageError(f"--times-only keeps the accuracies in --out, but there is no {out}")
    if threads is not None:
        torch.set_num_threads(threads)
    old: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if times_only else {}
    shipped: Any = load_network("onet")
    made = bench()
    torch.manual_seed(made.seed)
    wide = OccupancyNetwork(OccupancyConfig()).eval()
    clouds = make_clouds(TOGETHER)
    for network in (shipped, wide):
        network.to(made.device)
    measure = None if times_only else Accuracies(made)
    about = old if measure is None else {**measure.bench.about(), "weights": measure.victim.weights}
    rows: dict[str, dict[str, Any]] = {}
    for name in solvers or SOLVERS:
        times = {
            key: median_seconds(partial(purifier(network, SOLVERS[name]), clouds), repeats)
            for key, network in (("shipped", shipped), ("published", wide))
        }
        rows[name] = {
            "evaluations": evaluations(SOLVERS[name]),
            "seconds": {key: taken / TOGETHER for key, taken in times.items()},
            "figures": measure(purifier(shipped, SOLVERS[name])) if measure else old["rows"][name]["figures"],
        }
        described = {key: about[key] for key in ("split", "clouds", "seed", "weights")}
        result_files.write(out, "optimisation", **described, peer=PEER, rows=rows)
    click.echo(text_table(*_cells(rows)))


def _cells(rows: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    titles = list(next(iter(rows.values()))["figures"])
    lines = [
        [
            name,
            str(row["evaluations"]),
            f"{1000 * row['seconds']['shipped']:.0f}",
            f"{1000 * row['seconds']['published']:.0f}",
            f"{PEER / row['seconds']['published']:.1f}",
            *(f"{row['figures'][title]['accuracy']:.1f}" for title in titles),
        ]
        for name, row in rows.items()
    ]
    widths = ["ms, shipped width", "ms, published width", "times as fast as IF-Defense's code"]
    return ["solver", "evaluations", *widths, *titles], lines


def table(result: dict[str, Any]) -> str:
    """Solvers by time and accuracy."""
    errors = [one["standard_error"] for row in result["rows"].values() for one in row["figures"].values()]
    machine = result["machine"]
    return (
        f"{markdown(*_cells(result['rows']))}\n\nTime per cloud, {TOGETHER} clouds of 1,024 points together, "
        f"{machine['threads']} threads of {machine['processor']}. IF-Defense's code takes {result['peer']} s "
        f"with the published widths. Accuracy in % of `{VICTIM}`, {result['clouds']} {result['split']} "
        f"clouds, standard error at most {max(errors):.1f}, {result['date']}."
    )
