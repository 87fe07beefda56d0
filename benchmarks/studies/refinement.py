"""Meshes before and after simplification and refinement, on held-out shapes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import result_files
from benchmarks.studies.reconstruction import POINTS, unit
from benchmarks.text_tables import markdown, text_table
from ifdefense.console import device_option
from ifdefense.data.packed import load_packed_meshes
from ifdefense.geometry.frame import Frame
from ifdefense.geometry.mesh import Mesh
from ifdefense.geometry.points import gather, knn
from ifdefense.geometry.sampling import sample_surface
from ifdefense.implicit.base import Calibration, Field, load_network
from ifdefense.reconstruction.refinement import Refinement
from ifdefense.reconstruction.simplification import Simplification
from ifdefense.stages.extraction import Extraction
from ifdefense.stages.resampling import resample
from ifdefense.training.data.surfaces import held_out

NETWORKS = {"local": Extraction(40, 10), "onet": Extraction()}
"""Networks, with the extraction of their methods."""

STEPS = ("extracted", "refined", "simplified", "simplified, refined")

Oriented = tuple[Tensor, Tensor]
"""Points and normals, both ``(M, 3)``."""


def compare(found: Oriented, truth: Oriented) -> tuple[float, float]:
    """Chamfer-L1, mean of both directions, and normal consistency.

    Normal consistency is the mean absolute cosine of the angle between the normals of a point and of the
    nearest point on the other side, over both sides (Mescheder et al., https://arxiv.org/abs/1812.03828).
    """
    distances, cosines = [], []
    for (points, normals), (others, their_normals) in ((found, truth), (truth, found)):
        squared, index = knn(points[None].double(), others[None].double(), 1)
        distances.append(float(squared.sqrt().mean()))
        nearest = gather(their_normals[None], index[..., 0])[0]
        cosines.append(float((normals * nearest).sum(1).abs().mean()))
    return sum(distances) / 2, sum(cosines) / 2


def versions(
    field: Field, cloud: Tensor, calibration: Calibration, extract: Extraction, faces: int, refine: Refinement
) -> dict[str, tuple[Mesh, float]]:
    """Meshes of one cloud in the unit cube, and the total seconds of each."""
    index = torch.zeros((), dtype=torch.int64, device=cloud.device)

    def timed(call: Callable[[], Mesh], before: float = 0.0) -> tuple[Mesh, float]:
        start = time.perf_counter()
        mesh = call()
        return mesh, before + time.perf_counter() - start

    mesh, seconds = timed(lambda: extract(field, [cloud], calibration)[0])
    small, small_seconds = timed(lambda: Simplification(faces)(mesh), seconds)
    return {
        "extracted": (mesh, seconds),
        "refined": timed(lambda: refine(mesh, field, index, calibration), seconds),
        "simplified": (small, small_seconds),
        "simplified, refined": timed(lambda: refine(small, field, index, calibration), small_seconds),
    }


def figures(
    meshes: list[Mesh],
    name: str,
    samples: int,
    faces: int,
    refine: Refinement,
    seed: int,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Means over the meshes by step: faces, Chamfer-L1 in tenths, normal consistency, seconds.

    Args:
        meshes: shapes in the unit cube.
        name: one of `NETWORKS`.
        samples: points on each side.
        faces: of the simplified meshes.
        refine: the refinement.
        seed: seed of all clouds.
        device: of the network.
    """
    network: Any = load_network(name)
    network.to(device)
    rows: dict[str, list[tuple[float, ...]]] = {step: [] for step in STEPS}
    for number, mesh in enumerate(tqdm(meshes, name, mininterval=5)):
        rng = np.random.default_rng([seed, number])
        points, face = sample_surface(mesh, samples, generator=rng)
        truth = torch.from_numpy(points), torch.from_numpy(mesh.face_normals()[face]).float()
        cloud = torch.from_numpy(sample_surface(mesh, POINTS, generator=rng)[0])
        frame = Frame.of(cloud)
        given = frame.to_cube(cloud).to(device)
        with torch.no_grad():
            field = network.field(network.encode([given], seed))
        found = versions(field, given, network.calibration, NETWORKS[name], faces, refine)
        if found["extracted"][0].is_empty:
            continue
        for step, (result, seconds) in found.items():
            drawn = resample([result], samples, seed=seed, method="uniform", inset=network.calibration.offset)
            oriented = frame.from_cube(drawn.points[0]), drawn.normals[0]
            distance, cosine = compare(oriented, truth)
            rows[step].append((len(result.faces), 10 * distance, cosine, seconds))
    names = ("faces", "chamfer", "normals", "seconds")
    return {
        step: dict(zip(names, np.mean(values, 0).round(5).tolist(), strict=True)) | {"shapes": len(values)}
        for step, values in rows.items()
    }


@click.command()
@click.option("--meshes", "count", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--samples", type=click.IntRange(min=16), default=8192, show_default=True, help="Per side.")
@click.option(
    "--faces", type=click.IntRange(min=4), default=2000, show_default=True, help="Of simplified meshes."
)
@click.option("--steps", type=click.IntRange(min=1), default=Refinement.steps, show_default=True)
@click.option(
    "--network", "networks", multiple=True, type=click.Choice(list(NETWORKS)), default=tuple(NETWORKS)
)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=result_files.FOLDER / "refinement.json",
    show_default=True,
)
@device_option
def refinement(
    count: int,
    samples: int,
    faces: int,
    steps: int,
    networks: tuple[str, ...],
    seed: int,
    device: torch.device,
    out: Path,
) -> None:
    """Faces, Chamfer-L1 and normals of simplified and refined meshes (needs IFDEFENSE_DATA).

    The shapes are held-out labelled meshes, their clouds 1,024 clean samples.
    """
    data = load_packed_meshes()
    chosen = np.random.default_rng(seed).permutation(np.flatnonzero(held_out(data.labels)))[:count]
    meshes = [unit(data.meshes[index]) for index in chosen]
    refine = Refinement(steps=steps)
    rows = {name: figures(meshes, name, samples, faces, refine, seed, device) for name in networks}
    names = [str(data.names[index]) for index in chosen]
    result_files.write(
        out, "refinement", samples=samples, faces=faces, steps=steps, seed=seed, names=names, rows=rows
    )
    click.echo(text_table(*_cells(rows)))


def _cells(rows: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    lines = [
        [
            network,
            step,
            f"{row['faces']:,.0f}",
            f"{row['chamfer']:.4f}",
            f"{row['normals']:.4f}",
            f"{row['seconds']:.2f}",
        ]
        for network, steps in rows.items()
        for step, row in steps.items()
    ]
    return ["network", "mesh", "faces", "Chamfer-L1", "normal consistency", "seconds"], lines


def table(result: dict[str, Any]) -> str:
    """Meshes by network and step."""
    return (
        f"{markdown(*_cells(result['rows']))}\n\nChamfer-L1 in tenths of the longest side, "
        f"{len(result['names'])} meshes that no network was trained on, {result['samples']:,} samples on "
        f"each side, {POINTS:,} input points, {result['steps']} steps of refinement, {result['date']}; "
        "*seconds* are those of the extraction and all that follows it."
    )
