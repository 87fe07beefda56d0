"""Time of each point operation on clouds as the classifiers see them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Tensor

from benchmarks import record
from benchmarks.clock import median_seconds, timing_options
from benchmarks.text_tables import text_table
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
    record.write(out, "point-operations", **about, seconds=seconds)
    rows = [[name, f"{1000 * value:.1f}"] for name, value in seconds.items()]
    click.echo(text_table([f"{clouds} clouds of {points}", "ms"], rows))
