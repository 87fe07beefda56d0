"""Occupancy Networks by kind of input on held-out procedural solids, and shapes drawn from the prior."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import result_files
from benchmarks.studies.refinement import Oriented, compare
from benchmarks.text_tables import markdown, text_table
from ifdefense.console import device_option
from ifdefense.geometry.mesh import Mesh
from ifdefense.implicit.base import Calibration, Field, load_network
from ifdefense.reconstruction.conditions import voxelise
from ifdefense.reconstruction.generative import GenerativeOccupancyNetwork
from ifdefense.reconstruction.rendering import random_cameras, render
from ifdefense.shapes.procedural import CLASSES, Shape, make_shape
from ifdefense.stages.extraction import Extraction, ExtractionOptions, extract_meshes
from ifdefense.stages.resampling import resample

SEED = 3
"""Of the solids; training draws with seeds 1 and 2 (see ``ifdefense train``)."""
QUERIES = 32768
POINTS = 300
PAIRS = 512
SIZE = 64
EXTRACT = Extraction(resolution=64, coarse=32, seeded=False)
KINDS = ("points", "voxel", "image", "generative")
CPU = torch.device("cpu")


def given(kind: str, network: Any, shape: Shape, rng: np.random.Generator, device: torch.device) -> Any:
    """The field's code of a solid from one kind of input, by a network on a device."""
    if kind == "points":
        return network.encode([torch.from_numpy(shape.sample_surface(POINTS, rng)[0]).to(device)])
    if kind == "voxel":
        return network.encode([voxelise(shape.sdf).to(device)])
    if kind == "image":
        (camera,) = random_cameras(1, rng)
        return network.encode([torch.from_numpy(render(shape, camera, SIZE).image).to(device)])
    near = shape.sample_surface(PAIRS // 2, rng)[0] + rng.normal(scale=0.04, size=(PAIRS // 2, 3))
    uniform = (rng.random((PAIRS - PAIRS // 2, 3)) - 0.5) * network.calibration.box
    points = torch.from_numpy(np.concatenate([near, uniform]).astype(np.float32))
    occupied = shape.sdf(points) < network.calibration.offset
    return network.posterior(points[None].to(device), occupied[None].to(device))[0]


def overlap(
    field: Field, shape: Shape, calibration: Calibration, queries: Tensor, device: torch.device
) -> float:
    """IoU of a field on a device with the thickened solid at queries ``(Q, 3)``."""
    cloud = torch.zeros(len(queries), dtype=torch.int64, device=device)
    inside = (field(queries.to(device), cloud) > calibration.level).cpu()
    solid = shape.sdf(queries) < calibration.offset
    return float((inside & solid).sum() / (inside | solid).sum())


@torch.no_grad()
def figures(
    kind: str, network: Any, shapes: list[Shape], samples: int, seed: int, device: torch.device = CPU
) -> tuple[dict[str, float], dict[str, float]]:
    """Means over the solids: IoU, Chamfer-L1 in tenths, normal consistency; IoU by class.

    Args:
        kind: of the input, one of `KINDS`.
        network: the network.
        shapes: the solids.
        samples: points on each side of the distance.
        seed: of inputs, queries and samples.
        device: of the network.
    """
    calibration = network.calibration
    found: dict[str, list[float]] = {"iou": [], "chamfer": [], "normals": []}
    by_class: dict[str, list[float]] = {}
    for number, shape in enumerate(tqdm(shapes, kind, mininterval=5)):
        rng = np.random.default_rng([seed, number])
        code = given(kind, network, shape, rng, device)
        field = network.decode(code) if kind == "generative" else network.field(code)
        queries = torch.from_numpy((rng.random((QUERIES, 3), dtype=np.float32) - 0.5) * calibration.box)
        found["iou"].append(overlap(field, shape, calibration, queries.float(), device))
        by_class.setdefault(CLASSES[shape.label], []).append(found["iou"][-1])
        (mesh,) = EXTRACT(field, [torch.zeros(1, 3, device=device)], calibration)
        if mesh.is_empty:
            continue
        drawn = resample([mesh], samples, seed=seed, method="uniform", inset=calibration.offset)
        truth: Oriented = tuple(torch.from_numpy(part) for part in shape.sample_surface(samples, rng))  # type: ignore[assignment]
        distance, cosine = compare((drawn.points[0], drawn.normals[0].float()), truth)
        found["chamfer"].append(10 * distance)
        found["normals"].append(cosine)
    means = {name: round(float(np.mean(values or np.nan)), 4) for name, values in found.items()}
    missing = 1 - len(found["chamfer"]) / len(shapes)
    return means | {"missing": missing}, {name: round(float(np.mean(v)), 3) for name, v in by_class.items()}


def parts(mesh: Mesh) -> int:
    """Connected components of the surface."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if mesh.is_empty:
        return 0
    start, end = mesh.edges().T
    graph = coo_array((np.ones(len(start), bool), (start, end)), shape=(len(mesh.vertices),) * 2)
    _, label = connected_components(graph, directed=False)
    return len(np.unique(label[np.unique(mesh.faces)]))


def meshes_of(
    draw: Callable[[slice], Field], count: int, options: ExtractionOptions, name: str, device: torch.device
) -> list[Mesh]:
    """Meshes of ``count`` fields, a few at a time."""
    found: list[Mesh] = []
    for start in tqdm(range(0, count, 20), name, mininterval=5):
        size = min(20, count - start)
        found += extract_meshes(draw(slice(start, start + size)), size, options, device=device)
    return found


@torch.no_grad()
def prior(
    network: GenerativeOccupancyNetwork,
    count: int,
    paths: int,
    steps: int,
    seed: int,
    device: torch.device = CPU,
) -> dict[str, Any]:
    """Statistics of shapes from the prior.

    Args:
        network: without condition.
        count: samples.
        paths: interpolations between two samples each.
        steps: meshes of each interpolation.
        seed: of all latents.
        device: of the network.

    Returns:
        ``"closed"``, the share of samples that are one closed component; ``"parts"``, samples by the number
        of components; ``"empty"``, interpolated meshes without a surface, and ``"interpolated"``, all.
    """
    calibration = network.calibration
    options = ExtractionOptions(64, 32, calibration.threshold, calibration.box)
    latents = network.latents(count + 2 * paths, seed)
    meshes = meshes_of(lambda part: network.decode(latents[:count][part]), count, options, "samples", device)
    numbers = [parts(mesh) for mesh in meshes]
    closed = sum(number == 1 and mesh.is_watertight for number, mesh in zip(numbers, meshes, strict=True))
    ends = latents[count:].view(paths, 2, -1)
    way = torch.cat([torch.lerp(a, b, torch.linspace(0, 1, steps, device=device)[:, None]) for a, b in ends])
    between = meshes_of(lambda part: network.decode(way[part]), len(way), options, "interpolations", device)
    return {
        "samples": count,
        "closed": closed / count,
        "parts": {str(number): numbers.count(number) for number in sorted(set(numbers))},
        "interpolated": len(between),
        "empty": sum(mesh.is_empty for mesh in between),
    }


@click.command()
@click.option("--points", default="onet", show_default=True, help="Weights, name or file.")
@click.option("--voxel", default="voxel", show_default=True, help="Weights, name or file.")
@click.option("--image", default="image", show_default=True, help="Weights, name or file.")
@click.option("--generative", default="generative", show_default=True, help="Weights, name or file.")
@click.option(
    "--only", multiple=True, type=click.Choice(KINDS), default=KINDS, show_default=True, help="Repeatable."
)
@click.option(
    "--per-class", type=click.IntRange(min=1), default=4, show_default=True, help="Solids per class."
)
@click.option("--samples", type=click.IntRange(min=16), default=4096, show_default=True, help="Per side.")
@click.option("--prior-samples", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--paths", type=click.IntRange(min=1), default=10, show_default=True, help="Interpolations.")
@click.option(
    "--steps", type=click.IntRange(min=2), default=9, show_default=True, help="Meshes of an interpolation."
)
@click.option("--seed", default=SEED, show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=result_files.FOLDER / "conditions.json",
    show_default=True,
)
@device_option
def conditions(
    only: tuple[str, ...],
    per_class: int,
    samples: int,
    prior_samples: int,
    paths: int,
    steps: int,
    seed: int,
    device: torch.device,
    out: Path,
    **weights: str,
) -> None:
    """IoU, Chamfer-L1 and normals by kind of input, and shapes from the prior, on procedural solids.

    No network was trained on these solids; the network of points was mainly trained on ModelNet40's clouds.
    """
    shapes = [
        make_shape(name, np.random.default_rng([seed, label, index]))
        for label, name in enumerate(CLASSES)
        for index in range(per_class)
    ]
    rows: dict[str, Any] = {}
    drawn: dict[str, Any] = {}
    for kind in only:
        network: Any = load_network(weights[kind])
        network.to(device)
        means, by_class = figures(kind, network, shapes, samples, seed, device)
        size = sum(parameter.numel() for parameter in network.parameters())
        rows[kind] = means | {"parameters": size, "weights": weights[kind], "classes": by_class}
        if kind == "generative":
            drawn = prior(network, prior_samples, paths, steps, seed, device)
    result_files.write(
        out, "conditions", solids=len(shapes), samples=samples, seed=seed, rows=rows, prior=drawn
    )
    click.echo(text_table(*_cells(rows)))
    if drawn:
        click.echo(_drawn(drawn))


INPUTS = {
    "points": f"{POINTS} points",
    "voxel": "32³ voxels",
    "image": f"one {SIZE} × {SIZE} image",
    "generative": f"{PAIRS} labelled points, as a latent",
}


def _cells(rows: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    lines = [
        [
            INPUTS[kind],
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['iou']:.3f}",
            f"{row['chamfer']:.3f}",
            f"{row['normals']:.3f}",
        ]
        for kind, row in rows.items()
    ]
    return ["input", "million parameters", "IoU", "Chamfer-L1", "normal consistency"], lines


def _drawn(found: dict[str, Any]) -> str:
    return (
        f"{found['closed']:.1%} of {found['samples']} samples of the prior are one closed component; "
        f"{found['empty']} of {found['interpolated']} interpolated meshes are empty."
    )


def table(result: dict[str, Any]) -> str:
    """Figures by kind of input, and those of the prior."""
    text = (
        f"{markdown(*_cells(result['rows']))}\n\nMeans over {result['solids']} procedural solids that no "
        f"network was trained on. IoU with the solid thickened as in training; Chamfer-L1 in tenths of the "
        f"longest side and normal consistency from {result['samples']:,} samples on each side, thickening "
        f"undone. {result['date']}."
    )
    return f"{text} {_drawn(result['prior'])}" if result["prior"] else text
