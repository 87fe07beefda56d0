"""Times: of purify, of attacks in bare passes of the model, of point operations; and how they are measured.

An attack is compared with the same number of passes of the model on clouds of the same size, including the
gradient of the points. Both are timed alternately, so that load on the machine affects both; the ratio is the
median over the pairs.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import attacks
import classifiers
import ifdefense
from attacks import PGD, Attack
from benchmarks import result_files
from benchmarks.text_tables import text_table
from ifdefense.console import device_option
from ifdefense.devices import device_of_weights, synchronise
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.geometry.points import (
    ball_query,
    chamfer_distance,
    farthest_point_sampling,
    gather,
    group,
    knn,
)
from ifdefense.implicit.occupancy import OccupancyNetwork
from ifdefense.purifiers.base import Purifier
from ifdefense.purifiers.registry import DEFAULT, METHODS
from ifdefense.shapes.procedural import CLASSES, make_dataset, make_shape

SEED = 2_000_000
"""Seed of shapes not used in training."""

CloudBatch = NDArray[np.float32]
Command = Callable[..., None]


def make_clouds(count: int) -> CloudBatch:
    """``(count, 1024, 3)`` clouds of as many classes as possible."""
    per_class = -(-count // len(CLASSES))
    points = make_dataset(per_class, seed=SEED).points
    by_class = points.reshape(len(CLASSES), per_class, *points.shape[1:]).swapaxes(0, 1)
    return by_class.reshape(points.shape)[:count]


def seconds(call: Callable[[], object]) -> float:
    """Time of a call, including work on an accelerator."""
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call, after one that warms up."""
    seconds(call)
    return statistics.median(seconds(call) for _ in range(repeats))


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Context with other processes that keep one core busy each."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(process.kill)
        yield


def beside_neighbours(call: Callable[[], object], repeats: int, count: int) -> dict[str, float]:
    """Ratios of CPU time and wall-clock time of a call with and without busy processes; medians."""
    call()
    alone, beside = [], []
    for _ in range(repeats):
        alone.append(_spent(call))
        with neighbours(count):
            beside.append(_spent(call))
    ratios = [
        statistics.median(b) / statistics.median(a)
        for a, b in zip(zip(*alone, strict=True), zip(*beside, strict=True), strict=True)
    ]
    return dict(zip(("cpu", "wall"), ratios, strict=True))


def _spent(call: Callable[[], object]) -> tuple[float, float]:
    """CPU time of all threads and wall-clock time of a call, in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def timing_options(out: str) -> Callable[[Command], Command]:
    """Adds ``--repeats``, ``--threads``, ``--device`` and ``--out``; sets the number of threads."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(*, threads: int | None, **options: Any) -> None:
            if threads is not None:
                torch.set_num_threads(threads)
            command(**options)
            click.echo(f"written to {options['out']}")

        positive = click.IntRange(min=1)
        path = click.Path(path_type=Path, dir_okay=False)
        for option in (
            click.option("--out", type=path, default=result_files.FOLDER / out, show_default=True),
            device_option,
            click.option("--threads", type=positive, help="Threads of torch; its own choice by default."),
            click.option("--repeats", type=positive, default=5, show_default=True, help="Runs per median."),
        ):
            run = option(run)
        return run

    return decorate


CLOUDS = 16
GROWTH = (4, 16, 64)
QUERIES = 8192
LARGE = 100_000
NEIGHBOURS = 4


def stage_seconds(purifier: Purifier, clouds: CloudBatch, repeats: int) -> dict[str, float]:
    """Median time of each stage for all clouds together."""
    runs: list[dict[str, float]] = []
    for _ in range(repeats):
        traces = purifier.trace(clouds)
        runs.append({stage: sum(trace.seconds[stage] for trace in traces) for stage in traces[0].seconds})
    return {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]}


def growth(
    purifier: Purifier, clouds: CloudBatch, repeats: int, counts: tuple[int, ...] = GROWTH
) -> dict[str, float]:
    """Seconds per cloud by the number of clouds."""
    return {
        str(count): median_seconds(lambda part=clouds[:count]: purifier(part), repeats) / count  # type: ignore[misc]
        for count in counts
    }


def large(purifier: Purifier, count: int) -> dict[str, float]:
    """Seconds of one cloud of ``count`` points, and the peak memory in GB afterwards."""
    rng = np.random.default_rng(SEED)
    cloud = make_shape("chair", rng).sample_surface(count, rng)[0]
    taken = seconds(lambda: purifier(cloud))
    return {"points": count, "seconds": taken, "peak_memory_gb": peak_memory() or math.nan}


@torch.no_grad()
def decoder_seconds(network: OccupancyNetwork, clouds: CloudBatch, repeats: int) -> dict[str, float]:
    """Median time of the training decoder and of the folded one on the same queries."""
    generator = torch.Generator().manual_seed(0)
    device = device_of_weights(network)
    queries = (torch.rand(len(clouds), QUERIES, 3, generator=generator) - 0.5).to(device)
    owner = torch.arange(len(clouds), device=device).repeat_interleave(QUERIES)
    code = network.codes(torch.from_numpy(clouds[:, :300]).to(device))
    field = network.field(code)
    return {
        "unfolded": median_seconds(lambda: network.decoder(queries, code), repeats),
        "folded": median_seconds(lambda: field(queries.flatten(0, 1), owner), repeats),
    }


def peak_memory() -> float | None:
    """Peak memory of this process in GB, ``None`` if the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def crowded(purifier: Purifier, clouds: CloudBatch, repeats: int) -> dict[str, dict[str, float]]:
    """Ratios of CPU and wall-clock time beside `NEIGHBOURS` busy processes: of purify, and of an attack."""
    attack, model = PGD(iterations=10), classifiers.load("pointnet-modelnet40")
    points, labels = torch.from_numpy(clouds), torch.zeros(len(clouds), dtype=torch.long)
    return {
        "purify": beside_neighbours(lambda: purifier(clouds), repeats, NEIGHBOURS),
        "attack": beside_neighbours(lambda: attack(model, points, labels), repeats, NEIGHBOURS),
    }


@click.command()
@click.option("--method", type=click.Choice(list(METHODS)), default=DEFAULT, show_default=True)
@timing_options("purify_speed.json")
def purify_speed(method: str, repeats: int, device: torch.device, out: Path) -> None:
    """Measures the time of purify, by stage, number of clouds and beside busy processes, and its memory.

    The memory is that of the whole process after the runs on 16 clouds, Python and torch included.
    """
    purifier = ifdefense.load(method, device=device)
    clouds = make_clouds(max(GROWTH))
    total = median_seconds(lambda: purifier(clouds[:CLOUDS]), repeats)
    stages = stage_seconds(purifier, clouds[:CLOUDS], repeats)
    result: dict[str, Any] = {
        "method": method,
        "spec": purifier.spec(),
        "clouds": CLOUDS,
        "points": int(clouds.shape[1]),
        "repeats": repeats,
        "device": str(device),
        "seconds_per_cloud": total / CLOUDS,
        "stages_per_cloud": {stage: seconds / CLOUDS for stage, seconds in stages.items()},
        "peak_memory_gb": peak_memory(),
        "growth": growth(purifier, clouds, repeats),
        "large": large(purifier, LARGE),
        "neighbours": {"processes": NEIGHBOURS, **crowded(purifier, clouds[:CLOUDS], repeats)},
    }
    for network in (part for part in purifier.modules() if isinstance(part, OccupancyNetwork)):
        result["decoder"] = decoder_seconds(network, clouds[:CLOUDS], repeats)
    result_files.write(out, "purify-speed", **result)
    rows = {**result["stages_per_cloud"], "all of purify": result["seconds_per_cloud"]}
    click.echo(
        "one cloud of {points:,} points: {seconds:.1f} s, {peak_memory_gb:.2f} GB".format(**result["large"])
    )
    for name in ("purify", "attack"):
        click.echo(
            f"{name} beside {NEIGHBOURS} busy processes: "
            "{cpu:.2f} times the CPU time, {wall:.2f} times the wall-clock time".format(
                **result["neighbours"][name]
            )
        )
    rows |= {f"{count} clouds": spent for count, spent in result["growth"].items()}
    click.echo(text_table([method, "ms per cloud"], [[name, f"{1000 * s:.1f}"] for name, s in rows.items()]))


MODELNET_CLASSES = 40
TIMED: dict[str, tuple[Attack, int]] = {
    "PGD": (attacks.PGD(), 50),
    "PGD, L∞": (attacks.PGD("linf", delta=0.05), 50),
    "I-FGM": (attacks.IFGM(), 50),
    "APGD-CE": (attacks.APGD(early_stop=False), 100),
    "SI-Adv": (attacks.SIAdv(), 50),
    "Perturb": (attacks.Perturb(searches=2, iterations=25), 50),
    "Add-CD": (attacks.AddCD(searches=2, iterations=25), 50),
    "Add-HD": (attacks.AddHD(searches=2, iterations=25), 50),
    "Add-Cluster": (attacks.AddCluster(searches=2, iterations=25), 50),
    "kNN": (attacks.KNN(iterations=50), 50),
    "GeoA3": (attacks.GeoA3(searches=2, iterations=25), 50),
}
"""Attacks and their passes. The optimised ones use fewer steps than usual, because their cost is linear."""


def bare_passes(model: nn.Module, points: Tensor, labels: Tensor, count: int) -> None:
    """Forward and backward passes to the gradient of the points."""
    for _ in range(count):
        leaf = points.detach().requires_grad_()
        torch.autograd.grad(F.cross_entropy(model(leaf), labels, reduction="sum"), leaf)


def ratios(
    attack: Attack, passes: int, model: nn.Module, points: Tensor, labels: Tensor, repeats: int
) -> tuple[float, float]:
    """Seconds of the attack, and its time in bare passes on clouds of the attacked size; medians.

    Args:
        attack: the attack.
        passes: gradients that it takes.
        model: ``(B, N, 3)`` points to logits, without trainable parameters.
        points: ``(B, N, 3)`` clouds.
        labels: ``(B,)`` classes; the targets are the classes after them.
        repeats: pairs of runs, after one that warms up.
    """
    targets = (labels + 1) % MODELNET_CLASSES if attack.threat.goal != "untargeted" else None
    larger = points.repeat(1, 2, 1)[:, : points.shape[1] + attack.threat.count]
    taken, parts = [], []
    for _ in range(repeats + 1):
        taken.append(seconds(lambda: attack(model, points, labels, targets)))
        parts.append(taken[-1] / seconds(lambda: bare_passes(model, larger, labels, passes)))
    return statistics.median(taken[1:]), statistics.median(parts[1:])


@click.command()
@click.option(
    "--attack",
    "chosen",
    multiple=True,
    type=click.Choice(list(TIMED)),
    default=TIMED,
    help="Repeatable; all by default.",
)
@click.option("--clouds", type=click.IntRange(min=1), default=16, show_default=True)
@timing_options("attack_speed.json")
def attack_speed(chosen: tuple[str, ...], clouds: int, repeats: int, device: torch.device, out: Path) -> None:
    """Times attacks on the shipped PointNet against bare forward and backward passes.

    The JSON is written after every attack.
    """
    model = classifiers.fold(classifiers.load("pointnet-modelnet40")).to(device)
    points = to_unit_sphere(torch.from_numpy(make_clouds(clouds)).to(device))
    labels = torch.arange(clouds, device=device) % MODELNET_CLASSES
    figures: dict[str, dict[str, float]] = {}
    for name in chosen:
        attack, passes = TIMED[name]
        taken, ratio = ratios(attack, passes, model, points, labels, repeats)
        figures[name] = {"passes": passes, "seconds": round(taken, 3), "ratio": round(ratio, 3)}
        click.echo(f"{name}: {passes} passes in {taken:.2f} s, {ratio:.2f} times the bare passes")
        about = {"clouds": clouds, "points": points.shape[1], "repeats": repeats, "device": str(device)}
        result_files.write(out, "attack-speed", **about, attacks=figures)


CENTRES = 512
RADIUS, MEMBERS = 0.2, 32
"""The first level of PointNet++."""


def operations(points: Tensor) -> dict[str, Callable[[], object]]:
    """Calls by name, on ``(B, N, 3)`` points."""
    count = min(CENTRES, points.shape[1])
    centre = gather(points, farthest_point_sampling(points, count))
    index = ball_query(centre, points, RADIUS, MEMBERS)
    return {
        f"farthest_point_sampling, {count}": lambda: farthest_point_sampling(points, count),
        f"ball_query, {count} balls of {MEMBERS}": lambda: ball_query(centre, points, RADIUS, MEMBERS),
        "knn, 20 of each point": lambda: knn(points, points, min(20, points.shape[1])),
        f"group, {count} of {MEMBERS}": lambda: group(points, None, centre, index),
        "chamfer_distance": lambda: chamfer_distance(points, points.flip(1)),
    }


@click.command()
@click.option("--clouds", type=click.IntRange(min=1), default=16, show_default=True)
@click.option(
    "--points", type=click.IntRange(min=1), default=1024, show_default=True, help="Points per cloud."
)
@timing_options("point_operations.json")
@torch.no_grad()
def point_operations(clouds: int, points: int, device: torch.device, repeats: int, out: Path) -> None:
    """Measures farthest-point sampling, ball query, nearest neighbours, grouping and Chamfer distance.

    Measures pytorch3d's kernels if it is installed.
    """
    sphere = torch.randn(clouds, points, 3, generator=torch.Generator().manual_seed(0))
    calls = operations(torch.nn.functional.normalize(sphere, dim=2).to(device))
    seconds = {name: median_seconds(call, repeats) for name, call in calls.items()}
    about = {"clouds": clouds, "points": points, "device": str(device), "repeats": repeats}
    result_files.write(out, "point-operations", **about, seconds=seconds)
    rows = [[name, f"{1000 * value:.1f}"] for name, value in seconds.items()]
    click.echo(text_table([f"{clouds} clouds of {points}", "ms"], rows))
