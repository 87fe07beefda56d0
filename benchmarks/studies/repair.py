"""Anomalies found by the mesh repair, and area marked on clean shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor
from tqdm import tqdm

from benchmarks import result_files
from benchmarks.studies.common import Bench, bench_options, several
from benchmarks.studies.reconstruction import chamfer_l1, unit
from benchmarks.suite import SUITE
from benchmarks.text_tables import markdown, text_table
from ifdefense import Purifier
from ifdefense.corruptions.planted import KINDS, plant
from ifdefense.data.packed import load_packed_meshes
from ifdefense.geometry.mesh import Mesh
from ifdefense.geometry.mesh_graph import MeshGraph
from ifdefense.geometry.sampling import sample_surface
from ifdefense.implicit.base import ImplicitNetwork, load_network
from ifdefense.purifiers.base import Trace
from ifdefense.purifiers.compose import Compose
from ifdefense.purifiers.filters import StatisticalOutlierRemoval
from ifdefense.purifiers.pretrained import LOCAL_MESH, anomaly_repair
from ifdefense.purifiers.surface import SurfacePurifier
from ifdefense.restorers.mesh import RepairMesh
from ifdefense.shapes.procedural import CLASSES, make_shapes
from ifdefense.stages.repair import BulgeRepair
from ifdefense.training.data.surfaces import SAMPLES, held_out

VICTIM = "pointnet-modelnet40"
ATTACKS = ("add-cluster", "add-object", "hit-adv", "pgd")
POINTS = 1024
SHAPES_SEED = 4_000_000
"""Seed of procedural shapes not used in training."""

SIZES = (0.05, 0.2)
SHARES = (0.05, 0.15)
OFF = 0.03
"""A vertex farther than this from the true surface does not belong to it: twice the thickening."""

FEWEST = 10
"""Smallest number of vertices of an anomaly; with fewer, the network did not reconstruct it."""

COMPARED = 4096
"""Samples on each side of a Chamfer distance."""

Cloud = NDArray[np.float32]

RULES: dict[str, Callable[[ImplicitNetwork], RepairMesh]] = {
    "bulge": lambda _: BulgeRepair(),
    "anomaly": anomaly_repair,
}
"""Repair rules by name, for a local network."""


def purifier_of(rule: str) -> Purifier:
    """``local-mesh`` with a rule of repair."""
    network = load_network("local")
    restorer = LOCAL_MESH.with_stages(repair=RULES[rule](network))
    return Compose([StatisticalOutlierRemoval(), SurfacePurifier(network, restorer)], rule)


def shapes(source: str, count: int, seed: int) -> Iterator[Cloud]:
    """Dense samples ``(D, 3)`` of shapes in the unit cube; held-out ones first.

    Args:
        source: ``"procedural"``, ``"furniture"`` or ``"meshes"``.
        count: number of shapes.
        seed: of their order and samples.
    """
    if source == "procedural":
        per_class = -(-count // len(CLASSES))
        solids = make_shapes(per_class, SHAPES_SEED)
        for index in np.random.default_rng(seed).permutation(len(solids))[:count]:
            rng = np.random.default_rng([seed, index])
            yield solids[index].sample_surface(SAMPLES, rng)[0]
        return
    data = load_packed_meshes(name=source)
    labels = np.zeros_like(data.labels) if source == "furniture" else data.labels
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(~held_out(labels)[order], kind="stable")]
    for index in order[:count]:
        rng = np.random.default_rng([seed, index])
        yield sample_surface(unit(data.meshes[index]), SAMPLES, generator=rng)[0]


def _trace(purifier: Purifier, cloud: Cloud, seed: int) -> Trace:
    (trace,) = purifier.trace(cloud, POINTS, seed)
    return trace


def clean_figures(purifier: Purifier, source: str, count: int, seed: int) -> dict[str, Any]:
    """Marked shares of the area of clean shapes."""
    marked = []
    for index, dense in enumerate(tqdm(shapes(source, count, seed), source, count, mininterval=5)):
        rng = np.random.default_rng([seed, 1, index])
        trace = _trace(purifier, rng.permutation(dense)[:POINTS], seed)
        if trace.mesh is not None and trace.mask is not None:
            areas = MeshGraph(trace.mesh).areas
            marked.append(float(areas[trace.mask].sum() / areas.sum()))
    shares = np.array(marked)
    return {
        "shapes": len(shares),
        "marked": round(100 * float(shares.mean()), 3),
        "at most 5%": round(100 * float((shares <= 0.05).mean()), 1),
        "untouched": round(100 * float((shares == 0).mean()), 1),
    }


def draw_planted(dense: Cloud, kind: str, rng: np.random.Generator) -> tuple[Cloud, Cloud, float] | None:
    """A cloud with an anomaly, the points of the anomaly, and its size; ``None`` if none was placed.

    5% to 15% of ``POINTS`` are added to as many samples of the surface.
    """
    size, count = rng.uniform(*SIZES), int(rng.uniform(*SHARES) * POINTS)
    planted = plant(dense, kind, size, count, rng)
    if planted is None:
        return None
    cloud = np.concatenate([rng.permutation(dense)[:POINTS], planted])
    return rng.permutation(cloud), planted, size


def planted_figures(purifier: Purifier, sources: tuple[str, ...], count: int, seed: int) -> dict[str, Any]:
    """Share of planted anomalies of each kind with at least half of their area marked.

    Only anomalies reconstructed by the network are counted.
    """
    found: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    areas_marked: list[float] = []
    placed = dict.fromkeys(KINDS, 0)
    for number, source in enumerate(sources):
        for index, dense in enumerate(tqdm(shapes(source, count, seed), source, count, mininterval=5)):
            kind = KINDS[index % len(KINDS)]
            drawn = draw_planted(dense, kind, np.random.default_rng([seed, 2 + number, index]))
            if drawn is None:
                continue
            placed[kind] += 1
            cloud, planted, _ = drawn
            trace = _trace(purifier, cloud, seed)
            if trace.mesh is None or trace.mask is None:
                continue
            target = _planted_part(trace.mesh, dense, planted)
            if target.sum() >= FEWEST:
                areas = MeshGraph(trace.mesh).areas
                share = float(areas[target & trace.mask].sum() / areas[target].sum())
                found[kind].append(share >= 0.5)
                areas_marked.append(share)
    everything = [hit for hits in found.values() for hit in hits]
    return {
        "placed": placed,
        "rebuilt": {kind: len(hits) for kind, hits in found.items()},
        "found": {kind: round(100 * float(np.mean(hits or np.nan)), 1) for kind, hits in found.items()},
        "all": round(100 * float(np.mean(everything or np.nan)), 1),
        "area": round(100 * float(np.mean(areas_marked or np.nan)), 1),
    }


def _planted_part(mesh: Mesh, dense: Cloud, planted: Cloud) -> NDArray[np.bool_]:
    """Mask ``(V,)`` of vertices off the true surface and beside planted points."""
    off = np.asarray(cKDTree(dense).query(mesh.vertices)[0])
    near = np.asarray(cKDTree(planted).query(mesh.vertices)[0])
    return (off > OFF) & (near < OFF + 0.01)


def attacked_figures(purifier: Purifier, clean: Tensor, attacked: Tensor, seed: int) -> dict[str, Any]:
    """Change of the distance to the surface of the clean cloud by the repair.

    ``nearer`` and ``gain`` are over the clouds where anything was marked, ``gain`` is that of their mean.
    """
    before, after, marked = [], [], 0
    for index in tqdm(range(len(clean)), mininterval=5):
        reference = _trace(purifier, clean[index].cpu().numpy(), seed).mesh
        trace = _trace(purifier, attacked[index].cpu().numpy(), seed)
        if reference is None or trace.mesh is None or trace.mask is None or trace.repaired is None:
            continue
        if not trace.mask.any():
            continue
        marked += 1
        truth = _samples(reference, seed + 1)
        before.append(chamfer_l1(_samples(trace.mesh, seed), truth))
        after.append(chamfer_l1(_samples(trace.repaired, seed), truth))
    first, second = np.array(before), np.array(after)
    return {
        "clouds": len(clean),
        "marked": marked,
        "nearer": round(100 * float(np.mean(second < first)), 1) if marked else None,
        "gain": round(100 * float(1 - second.sum() / first.sum()), 2) if marked else None,
    }


def _samples(mesh: Mesh, seed: int) -> Tensor:
    return torch.from_numpy(sample_surface(mesh, COMPARED, generator=np.random.default_rng(seed))[0])


def attacked_clouds(bench: Bench) -> dict[str, Tensor]:
    """Clouds ``(S, M, 3)`` by attack."""
    return {name: bench.attacked(VICTIM, name) for name in ATTACKS}


@click.command()
@bench_options("repair.json", 50)
@click.option("--shapes", "count", type=click.IntRange(min=1), default=200, show_default=True)
@several("rule", type=click.Choice(list(RULES)), help="Repeatable; all by default.")
@torch.no_grad()
def repair(bench: Callable[[], Bench], count: int, rules: tuple[str, ...], out: Path) -> None:
    """Marked area of clean shapes, planted anomalies found, gain under attack (needs IFDEFENSE_DATA).

    Clean shapes and planted anomalies: ``--shapes`` of each source, held-out ones if available.
    Attacks are on the clean-trained PointNet; the reference is the surface of the clean cloud.
    """
    made = bench()
    sources = ("procedural", "furniture", "meshes")
    clouds = attacked_clouds(made)
    rows: dict[str, Any] = {}
    for rule in rules or RULES:
        purifier = purifier_of(rule).to(made.device)
        rows[rule] = {
            "spec": purifier.spec(),
            "clean": {source: clean_figures(purifier, source, count, made.seed) for source in sources},
            "planted": planted_figures(purifier, sources, count, made.seed),
            "attacked": {
                name: attacked_figures(purifier, made.points, points, made.seed)
                for name, points in clouds.items()
            },
        }
        result_files.write(out, "repair", **made.about(), shapes=count, rows=rows)
    for title, header, cells in _tables(rows):
        click.echo(f"\n{title}\n\n{text_table(header, cells)}")


def _tables(rows: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and cells of each table."""
    sources = list(next(iter(rows.values()))["clean"])
    clean = [
        [rule, *(f"{row['clean'][s]['marked']:.2f}, {row['clean'][s]['at most 5%']:.1f}" for s in sources)]
        for rule, row in rows.items()
    ]
    planted = [
        [rule, *(f"{row['planted']['found'][kind]:.1f}" for kind in KINDS), f"{row['planted']['all']:.1f}"]
        for rule, row in rows.items()
    ]
    attacks = list(next(iter(rows.values()))["attacked"])
    attacked = [[rule, *(_gain(row["attacked"][name]) for name in attacks)] for rule, row in rows.items()]
    return [
        ("Clean shapes: marked area in %, share of shapes with at most 5% in %", ["rule", *sources], clean),
        ("Planted anomalies found in %", ["rule", *KINDS, "all"], planted),
        (
            "Under attack: clouds with a mark, of these nearer in %, gain in Chamfer-L1 in %",
            ["rule", *(SUITE[name].title for name in attacks)],
            attacked,
        ),
    ]


def _gain(row: dict[str, Any]) -> str:
    if not row["marked"]:
        return f"0 of {row['clouds']}"
    return f"{row['marked']} of {row['clouds']}, {row['nearer']:.0f}, {row['gain']:+.1f}"


def table(result: dict[str, Any]) -> str:
    """Marked area, found anomalies and gain under attack, by rule."""
    parts = [f"{title}:\n\n{markdown(header, cells)}" for title, header, cells in _tables(result["rows"])]
    return "\n\n".join(parts) + (
        f"\n\n`local-mesh` with each rule of repair; {result['shapes']} shapes per source; "
        f"{result['clouds']} {result['split']} clouds attacked on `{VICTIM}`; {result['date']}."
    )
