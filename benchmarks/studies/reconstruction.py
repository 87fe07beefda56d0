"""Distance of purified clouds from the true surface, on held-out meshes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

import ifdefense
from benchmarks import result_files
from benchmarks.text_tables import markdown, text_table
from ifdefense import Purifier
from ifdefense.console import device_option
from ifdefense.corruptions.combined import CombinedOptions, draw_corrupted
from ifdefense.data.packed import load_packed_meshes
from ifdefense.geometry.frame import Frame
from ifdefense.geometry.mesh import Mesh
from ifdefense.geometry.points import chamfer_distance
from ifdefense.geometry.sampling import sample_surface
from ifdefense.purifiers.registry import METHODS
from ifdefense.training.data.surfaces import held_out

POINTS = 1024
INPUTS = ("clean", "corrupted")
Cloud = NDArray[np.float32]


def chamfer_l1(a: Tensor, b: Tensor) -> float:
    """Mean of both directed mean distances between ``(N, 3)`` and ``(M, 3)`` points."""
    return float(chamfer_distance(a[None].double(), b[None].double(), squared=False)) / 2


def unit(mesh: Mesh) -> Mesh:
    """The mesh with its bounding box centred on 0 and a longest side of 1."""
    frame = Frame.of(torch.from_numpy(mesh.vertices[np.unique(mesh.faces)]))
    return mesh.transformed(1 / float(frame.extent), (-frame.centre / frame.extent).numpy())


def inputs(mesh: Mesh, rng: np.random.Generator) -> dict[str, Cloud]:
    """Clouds of a mesh by kind of input."""
    dense = sample_surface(mesh, 16 * POINTS, generator=rng)[0]
    return {
        "clean": dense[:POINTS],
        "corrupted": draw_corrupted(dense, POINTS, CombinedOptions(clean=0), rng),
    }


def figures(
    meshes: list[Mesh], samples: int, purify: Callable[[Cloud], Tensor | None], seed: int
) -> dict[str, float]:
    """Mean Chamfer-L1 in tenths of the longest side for each kind of input, and the floor of the measure.

    Args:
        meshes: held-out meshes in the unit cube.
        samples: points on each side.
        purify: input cloud to ``samples`` points.
        seed: seed of all clouds.
    """
    found: dict[str, list[float]] = {name: [] for name in ("floor", *INPUTS)}
    for index, mesh in enumerate(tqdm(meshes, mininterval=5)):
        rng = np.random.default_rng([seed, index])
        truth, again = (torch.from_numpy(sample_surface(mesh, samples, generator=rng)[0]) for _ in range(2))
        found["floor"].append(chamfer_l1(truth, again))
        for name, cloud in inputs(mesh, rng).items():
            result = purify(cloud)
            if result is not None:
                found[name].append(chamfer_l1(result, truth))
    rates = {name: round(10 * float(np.mean(values or np.nan)), 4) for name, values in found.items()}
    return {**rates, "missing": 1 - sum(len(found[name]) for name in INPUTS) / (2 * len(meshes))}


@click.command()
@click.option("--meshes", "count", type=click.IntRange(min=1), default=40, show_default=True)
@click.option("--samples", type=click.IntRange(min=16), default=4096, show_default=True, help="Per side.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice([name for name, method in METHODS.items() if method.network]),
    default=("local-mesh", "local-random", "convonet-mesh", "onet-mesh"),
    show_default=True,
    help="Repeatable.",
)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=result_files.FOLDER / "reconstruction.json",
    show_default=True,
)
@device_option
def reconstruction(
    count: int, samples: int, methods: tuple[str, ...], seed: int, device: torch.device, out: Path
) -> None:
    """Chamfer-L1 of purified clouds on held-out meshes, clean and corrupted input (needs IFDEFENSE_DATA).

    The meshes are every tenth of each class of the labelled meshes. Corruptions are those of the training;
    every cloud is corrupted.
    """
    data = load_packed_meshes()
    held = np.flatnonzero(held_out(data.labels))
    chosen = np.random.default_rng(seed).permutation(held)[:count]
    meshes = [unit(data.meshes[index]) for index in chosen]
    rows: dict[str, Any] = {}
    for name in methods:
        purifier = ifdefense.load(name, device=device)

        def purify(cloud: Cloud, purifier: Purifier = purifier) -> Tensor | None:
            (trace,) = purifier.trace(cloud, samples, seed)
            return None if trace.fallback else torch.from_numpy(trace.purified)

        rows[name] = figures(meshes, samples, purify, seed) | {"spec": purifier.spec()}
    names = [str(data.names[index]) for index in chosen]
    result_files.write(out, "reconstruction", samples=samples, seed=seed, names=names, rows=rows)
    click.echo(text_table(*_cells(rows)))


def _cells(rows: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    columns = ("floor", *INPUTS)
    lines = [[name, *(f"{row[column]:.3f}" for column in columns)] for name, row in rows.items()]
    return ["method", *columns], lines


def table(result: dict[str, Any]) -> str:
    """Chamfer-L1 by method and input."""
    return (
        f"{markdown(*_cells(result['rows']))}\n\nChamfer-L1 in tenths of the longest side, "
        f"{len(result['names'])} meshes that no network was trained on, {result['samples']:,} samples on "
        f"each side, {POINTS:,} input points, {result['date']}; *floor*: two samples of the same surface."
    )
