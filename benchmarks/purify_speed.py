"""Time and memory of ``purify`` on 16 clouds of 1,024 points: by stage, by clouds, beside busy processes."""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import classifiers
import ifdefense
from attacks import PGD
from benchmarks import record
from benchmarks.clock import (
    SEED,
    CloudBatch,
    beside_neighbours,
    make_clouds,
    median_seconds,
    seconds,
    timing_options,
)
from benchmarks.text_tables import text_table
from ifdefense.devices import device_of_weights
from ifdefense.implicit.occupancy import OccupancyNetwork
from ifdefense.purifiers.base import Purifier
from ifdefense.purifiers.registry import DEFAULT, METHODS
from ifdefense.shapes.procedural import make_shape

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
    record.write(out, "purify-speed", **result)
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
