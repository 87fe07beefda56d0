"""Estimated solids of clouds compared with the true ones, on shapes not used in training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks import result_files
from benchmarks.studies.reconstruction import unit
from benchmarks.text_tables import markdown, text_table
from ifdefense.data.packed import load_packed_meshes
from ifdefense.geometry.sampling import sample_surface
from ifdefense.implicit.base import load_network
from ifdefense.shapes.procedural import CLASSES, make_shape
from ifdefense.training.data.network_labels import grids_from_network
from ifdefense.training.data.solid_sources import DENSE, POINTS
from ifdefense.training.data.solids import OccupancyGrid, grid_from_cloud, grid_from_mesh, grid_from_shape
from ifdefense.training.data.surfaces import held_out

SOURCES = ("procedural", "meshes")

Known = tuple[NDArray[np.floating], OccupancyGrid]
"""A cloud in the unit cube and its solid."""


def procedural(count: int, seed: int) -> Iterator[Known]:
    """New procedural solids, equally many of each class."""
    for number in range(count):
        rng = np.random.default_rng([seed, 99, number])
        shape = make_shape(CLASSES[number % len(CLASSES)], rng)
        yield shape.sample_surface(POINTS, rng)[0], grid_from_shape(shape)


def meshes(count: int, seed: int) -> Iterator[Known]:
    """Held-out meshes with a consistent inside."""
    data = load_packed_meshes()
    chosen = np.random.default_rng(seed).permutation(np.flatnonzero(held_out(data.labels)))
    found = 0
    for index in chosen:
        mesh = unit(data.meshes[index])
        points, _ = sample_surface(mesh, DENSE, generator=np.random.default_rng([seed, int(index)]))
        grid = grid_from_mesh(mesh, points)
        if grid is None:
            continue
        yield points[:POINTS], grid
        found += 1
        if found == count:
            return


def overlap(one: OccupancyGrid, other: OccupancyGrid) -> float:
    """Intersection over union."""
    inside, known = one > 0, other > 0
    return float((inside & known).sum() / max((inside | known).sum(), 1))


@click.command()
@click.option(
    "--shapes", "count", type=click.IntRange(min=1), default=80, show_default=True, help="A source."
)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=result_files.FOLDER / "labels.json",
    show_default=True,
)
def labels(count: int, seed: int, out: Path) -> None:
    """IoU of estimated and true solids of clouds (needs IFDEFENSE_DATA)."""
    network = load_network("local")
    rows: dict[str, dict[str, float]] = {}
    for name, source in zip(SOURCES, (procedural, meshes), strict=True):
        pairs = list(tqdm(source(count, seed), name, count, mininterval=5))
        seen = [overlap(grids_from_network(network, [cloud])[0], grid) for cloud, grid in pairs]
        estimated = [overlap(grid_from_cloud(cloud), grid) for cloud, grid in pairs]
        rows[name] = {
            "shapes": len(pairs),
            "local": round(float(np.mean(seen)), 4),
            "estimated": round(float(np.mean(estimated)), 4),
        }
    result_files.write(out, "labels", seed=seed, points=POINTS, rows=rows)
    click.echo(text_table(*_cells(rows)))


def _cells(rows: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    lines = [
        [f"{row['shapes']} {name}", f"{row['local']:.2f}", f"{row['estimated']:.2f}"]
        for name, row in rows.items()
    ]
    return ["shapes", "local", "estimated"], lines


def table(result: dict[str, Any]) -> str:
    """Shapes by source."""
    return (
        f"{markdown(*_cells(result['rows']))}\n\nMean IoU with the true solid, {result['points']:,} points, "
        f"shapes that no network was trained on, {result['date']}."
    )
