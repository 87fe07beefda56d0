"""Time and memory of ``purify`` on 16 clouds of 1,024 points: stages apart, and how the time grows."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import record
from ifdefense.implicit.occupancy import OccupancyNetwork
from ifdefense.purifiers.base import Purifier
from ifdefense.shapes.procedural import CLASSES, make_dataset

CLOUDS = 16
GROWTH = (4, 16, 64)
QUERIES = 8192
SEED = 2_000_000
"""Of shapes that no network here was trained on."""

Clouds = NDArray[np.float32]


def make_clouds(count: int) -> Clouds:
    """``(count, 1024, 3)`` clouds, as many different classes as possible."""
    per_class = -(-count // len(CLASSES))
    points = make_dataset(per_class, seed=SEED).points
    by_class = points.reshape(len(CLASSES), per_class, *points.shape[1:]).swapaxes(0, 1)
    return by_class.reshape(points.shape)[:count]


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call, after one that warms up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def stage_seconds(purifier: Purifier, clouds: Clouds, repeats: int) -> dict[str, float]:
    """Median time of each stage for all clouds together."""
    runs: list[dict[str, float]] = []
    for _ in range(repeats):
        traces = purifier.trace(clouds)
        runs.append({stage: sum(trace.seconds[stage] for trace in traces) for stage in traces[0].seconds})
    return {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]}


def decoder_seconds(network: OccupancyNetwork, clouds: Clouds, repeats: int) -> dict[str, float]:
    """Median time of the training decoder and of the folded one on the same queries."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.rand(len(clouds), QUERIES, 3, generator=generator) - 0.5
    owner = torch.arange(len(clouds)).repeat_interleave(QUERIES)
    with torch.no_grad():
        code = network.encoder(torch.from_numpy(clouds[:, :300]))
        field = network.field(code)
        return {
            "unfolded": median_seconds(lambda: network.decoder(queries, code), repeats),
            "folded": median_seconds(lambda: field(queries.flatten(0, 1), owner), repeats),
        }


def peak_memory() -> float | None:
    """Largest memory this process has had so far, in GB, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@click.command()
@click.option("--method", default="onet-mesh", show_default=True)
@click.option(
    "--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Runs for each median."
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of torch; its own choice by default.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=record.FOLDER / "purify_speed.json",
    show_default=True,
)
def purify_speed(method: str, repeats: int, threads: int | None, output: Path) -> None:
    """Measures how long purify takes, stages apart, how it grows with the clouds, and its peak memory.

    The time is the median of several runs after one that warms up. The memory is that of the whole process
    after the runs on 16 clouds, Python and torch included.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    purifier = Purifier.from_pretrained(method)
    clouds = make_clouds(max(GROWTH))
    total = median_seconds(lambda: purifier(clouds[:CLOUDS]), repeats)
    stages = stage_seconds(purifier, clouds[:CLOUDS], repeats)
    result: dict[str, Any] = {
        "method": method,
        "clouds": CLOUDS,
        "points": int(clouds.shape[1]),
        "repeats": repeats,
        "seconds_per_cloud": total / CLOUDS,
        "stages_per_cloud": {stage: seconds / CLOUDS for stage, seconds in stages.items()},
        "peak_memory_gb": peak_memory(),
        "growth": growth(purifier, clouds, repeats),
        "machine": record.machine(),
    }
    networks = [part for part in purifier.modules() if isinstance(part, OccupancyNetwork)]
    if networks:
        result["decoder"] = decoder_seconds(networks[0], clouds[:CLOUDS], repeats)
    record.write(output, result)
    show(result)
    click.echo(f"written to {output}")


def growth(purifier: Purifier, clouds: Clouds, repeats: int) -> dict[str, float]:
    """Seconds a cloud for each number of clouds."""
    seconds = {}
    for count in GROWTH:
        part = clouds[:count]
        seconds[str(count)] = median_seconds(lambda part=part: purifier(part), repeats) / count  # type: ignore[misc]
    return seconds


def show(result: dict[str, Any]) -> None:
    """Prints a result as tables."""

    def milliseconds(seconds: float) -> str:
        return f"{1000 * seconds:.1f}"

    rows = [[stage, milliseconds(seconds)] for stage, seconds in result["stages_per_cloud"].items()]
    rows.append(["all of purify", milliseconds(result["seconds_per_cloud"])])
    click.echo(record.text_table(["stage", "ms a cloud"], rows) + "\n")
    rows = [[count, milliseconds(seconds)] for count, seconds in result["growth"].items()]
    click.echo(record.text_table(["clouds", "ms a cloud"], rows) + "\n")
    if "decoder" in result:
        slow, fast = result["decoder"]["unfolded"], result["decoder"]["folded"]
        click.echo(f"folded decoder: {slow / fast:.2f} times as fast as the training one")
    if result["peak_memory_gb"] is not None:
        click.echo(f"peak memory: {result['peak_memory_gb']:.2f} GB")
