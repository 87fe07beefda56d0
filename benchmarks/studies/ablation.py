"""Ablation of the purifier, on validation clouds.

Every variant differs from ``local-mesh`` or ``onet-fill`` in a stage or two. Inputs are clean clouds, clouds
attacked on the classifier, and clouds with random clusters of outliers. Figures are the Chamfer distance of
the result to the clean cloud (sum of both mean distances, classifier's frame) and the accuracy of the
hybrid-trained PointNet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks import result_files
from benchmarks.foreign import Victim, victim_of
from benchmarks.studies.common import Bench, bench_options, several
from benchmarks.suite import SUITE
from benchmarks.text_tables import markdown, text_table
from ifdefense.corruptions.simulated import SimulationOptions, simulate_attack
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.geometry.points import chamfer_distance
from ifdefense.implicit.base import load_network
from ifdefense.implicit.occupancy import OccupancyNetwork
from ifdefense.purifiers.base import Purifier
from ifdefense.purifiers.compose import Compose
from ifdefense.purifiers.filters import LocalSmoothing, RandomisedInput, StatisticalOutlierRemoval
from ifdefense.purifiers.pretrained import LOCAL_MESH, anomaly_repair
from ifdefense.purifiers.surface import SurfacePurifier
from ifdefense.restorers.base import Restorer
from ifdefense.restorers.mesh import MeshRestorer
from ifdefense.restorers.ridge import RidgeRestorer
from ifdefense.stages.extraction import Extraction, Tracking
from ifdefense.stages.resampling import FillSampling, SurfaceSampling

Change = Callable[[RidgeRestorer], Restorer]
"""The restorer of ``local-mesh`` → another one."""

VICTIM = "pointnet-modelnet40-hybrid"
ATTACKS = ("pgd", "drop-200")
CLUSTERS = SimulationOptions(
    **dict.fromkeys(("clean", "noise", "displace", "outliers", "holes", "salient", "cut", "uneven"), 0),
    clusters=1,
    cluster_share=0.2,
)


def _local(*filters: Purifier, change: Change = lambda restorer: restorer) -> Callable[[], Purifier]:
    """Builds ``local-mesh`` with a changed restorer, and other filters before it."""

    def build() -> Purifier:
        network = load_network("local")
        restorer = change(LOCAL_MESH.with_stages(repair=anomaly_repair(network)))
        return Compose([*filters, SurfacePurifier(network, restorer)])

    return build


def _onet(views: int = 3, **stages: Any) -> Callable[[], Purifier]:
    """Builds ``onet-fill`` with other stages."""

    def build() -> Purifier:
        network = load_network("onet")
        assert isinstance(network, OccupancyNetwork)
        network.views = views
        restorer = MeshRestorer(**{"resample": FillSampling(), **stages})
        return Compose([FILTER, SurfacePurifier(network, restorer)])

    return build


FILTER = StatisticalOutlierRemoval()
SAMPLES = MeshRestorer().resample
VARIANTS = {
    "local-mesh": _local(FILTER),
    "local-mesh, no outlier removal": _local(),
    "local-mesh, mean of 3 neighbours first": _local(FILTER, LocalSmoothing(3)),
    "local-mesh, a random half of the points": _local(FILTER, RandomisedInput()),
    "local-mesh, 64 cells": _local(FILTER, change=lambda r: r.with_stages(extract=Tracking(64, 8))),
    "local-mesh, grid by subdivision": _local(
        FILTER, change=lambda r: r.with_stages(extract=Extraction(40, 10))
    ),
    "local-mesh, no margin": _local(FILTER, change=lambda r: dataclasses.replace(r, margin=0.0)),
    "local-mesh, both sides of the shell": _local(
        FILTER, change=lambda r: dataclasses.replace(r.mesh, resample=SurfaceSampling("uniform"))
    ),
    "local-mesh, no mesh repair": _local(FILTER, change=lambda r: r.with_stages(repair=None)),
    "onet-fill": _onet(),
    "onet-fill, no mesh repair": _onet(repair=None),
    "onet-fill, samples of the mesh alone": _onet(resample=SAMPLES),
    "onet-fill, samples of the mesh alone, no mesh repair": _onet(resample=SAMPLES, repair=None),
    "onet-fill, input points not smoothed": _onet(resample=FillSampling(smoothing=1)),
    "onet-fill, input points within 0.1": _onet(resample=FillSampling(tolerance=0.1)),
    "onet-fill, one view of the cloud": _onet(views=1),
}


def inputs(bench: Bench) -> dict[str, Tensor]:
    """Clouds ``(S, M, 3)`` in the classifier's frame, by kind of input."""
    given = {"clean": bench.points}
    for name in ATTACKS:
        given[SUITE[name].title] = bench.attacked(VICTIM, name)
    generator = torch.Generator().manual_seed(bench.seed)
    clusters = simulate_attack(bench.points / 2, generator=generator, options=CLUSTERS) * 2
    return given | {"clusters": clusters}


@click.command()
@bench_options("ablation.json", 100)
@several("variant", type=click.Choice(list(VARIANTS)), help="Repeatable; all by default.")
@torch.no_grad()
def ablation(bench: Callable[[], Bench], variants: tuple[str, ...], out: Path) -> None:
    """Chamfer distance and accuracy of variants of the purifier (needs IFDEFENSE_DATA)."""
    made = bench()
    victim: Victim = victim_of(VICTIM, device=made.device)

    def figures(points: Tensor, purifier: Purifier | None = None) -> dict[str, float]:
        pairs = zip(points.split(8), made.points.split(8), strict=True)
        distance = torch.cat([chamfer_distance(a, b, squared=False) for a, b in pairs])
        return {**made.accuracy(victim, points, purifier), "chamfer": distance.mean().item()}

    given = inputs(made)
    rows = {"not purified": {name: figures(to_unit_sphere(points)) for name, points in given.items()}}
    for variant in variants or VARIANTS:
        purifier = VARIANTS[variant]().to(made.device)
        size = made.points.shape[1]
        rows[variant] = {
            name: figures(purifier(points, size, made.seed), purifier) for name, points in given.items()
        }
        result_files.write(out, "ablation", **made.about(), weights=victim.weights, rows=rows)
    click.echo(text_table(*_cells(rows)))


def _cells(rows: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    lines = [
        [name, *(f"{one['accuracy']:.1f}, {one['chamfer']:.3f}" for one in row.values())]
        for name, row in rows.items()
    ]
    return ["variant", *next(iter(rows.values()))], lines


def table(result: dict[str, Any]) -> str:
    """Variants by kind of input."""
    errors = [one["standard_error"] for row in result["rows"].values() for one in row.values()]
    return (
        f"{markdown(*_cells(result['rows']))}\n\nAccuracy of `{VICTIM}` in %, and Chamfer distance to "
        f"the clean cloud in the unit sphere; {result['clouds']} {result['split']} clouds, "
        f"standard error at most {max(errors):.1f}, {result['date']}."
    )
