"""Time of each point operation on clouds as the classifiers see them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks import record
from ifdefense.geometry.points import (
    ball_query,
    chamfer_distance,
    farthest_point_sampling,
    gather,
    group,
    knn,
)

CENTRES = 512
RADIUS, MEMBERS = 0.2, 32
"""The first level of PointNet++."""


def operations(points: Tensor) -> dict[str, Callable[[], object]]:
    """Calls by name, on ``(B, N, 3)`` points."""
    centre = gather(points, farthest_point_sampling(points, min(CENTRES, points.shape[1])))
    index = ball_query(centre, points, RADIUS, MEMBERS)
    return {
        f"farthest_point_sampling, {centre.shape[1]}": lambda: farthest_point_sampling(
            points, centre.shape[1]
        ),
        f"ball_query, {centre.shape[1]} balls of {MEMBERS}": lambda: ball_query(
            centre, points, RADIUS, MEMBERS
        ),
        "knn, 20 of each point": lambda: knn(points, points, min(20, points.shape[1])),
        f"group, {centre.shape[1]} of {MEMBERS}": lambda: group(points, None, centre, index),
        "chamfer_distance": lambda: chamfer_distance(points, points.flip(1)),
    }


def sphere(clouds: int, points: int, device: str) -> Tensor:
    """``(clouds, points, 3)`` random points of the unit sphere."""
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(clouds, points, 3, generator=generator), dim=2).to(
        device
    )


@torch.no_grad()
def median_seconds(call: Callable[[], object], repeats: int, device: str) -> float:
    """Median time of a call, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


@click.command()
@click.option("--clouds", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--points", type=click.IntRange(min=1), default=1024, show_default=True, help="Points a cloud.")
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Runs for each median."
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of torch; its own choice by default.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=record.FOLDER / "point_operations.json",
    show_default=True,
)
def point_operations(
    clouds: int, points: int, device: str, repeats: int, threads: int | None, output: Path
) -> None:
    """Measures farthest-point sampling, ball query, nearest neighbours, grouping and Chamfer distance.

    pytorch3d's kernels are measured where it is installed.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    calls = operations(sphere(clouds, points, device))
    seconds = {name: median_seconds(call, repeats, device) for name, call in calls.items()}
    result: dict[str, Any] = {
        "clouds": clouds,
        "points": points,
        "device": device,
        "repeats": repeats,
        "seconds": seconds,
        "machine": record.machine(),
    }
    record.write(output, result)
    rows = [[name, f"{1000 * value:.1f}"] for name, value in seconds.items()]
    click.echo(record.text_table([f"{clouds} clouds of {points}", "ms"], rows))
    click.echo(f"written to {output}")


if __name__ == "__main__":
    point_operations()
