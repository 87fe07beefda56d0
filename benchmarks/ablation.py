"""What each part of the purifier contributes, on validation clouds.

Every variant differs from ``onet-fill`` in a stage or two. Inputs are clean clouds, clouds attacked on the
classifier, and clouds with random clusters of outliers. Figures are the Chamfer distance of the result to the
clean cloud (sum of both mean distances, classifier's frame) and the accuracy of the hybrid-trained PointNet.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks import record
from benchmarks.layout import text_table
from benchmarks.protocol import Bench, Protocol, Victim, protocol_options, rate, several
from benchmarks.suite import SUITE
from ifdefense.corruptions.simulated import SimulationOptions, simulate_attack
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.geometry.points import chamfer_distance
from ifdefense.implicit.base import load_network
from ifdefense.implicit.occupancy import OccupancyNetwork
from ifdefense.purifiers.base import Purifier
from ifdefense.purifiers.compose import Compose
from ifdefense.purifiers.filters import StatisticalOutlierRemoval
from ifdefense.purifiers.surface import SurfacePurifier
from ifdefense.restorers.mesh import MeshRestorer
from ifdefense.stages.resampling import FillSampling

VICTIM = "pointnet-modelnet40-hybrid"
ATTACKS = ("pgd", "drop-200")
CLUSTERS = SimulationOptions(
    **dict.fromkeys(("clean", "noise", "displace", "outliers", "holes", "salient", "cut", "uneven"), 0),
    clusters=1,
    cluster_share=0.2,
)


def _variant(views: int = 3, **stages: Any) -> Callable[[], Purifier]:
    """Builds the shipped purifier with other stages."""

    def build() -> Purifier:
        network = load_network("onet")
        assert isinstance(network, OccupancyNetwork)
        network.views = views
        restorer = MeshRestorer(**{"resample": FillSampling(), **stages})
        return Compose([StatisticalOutlierRemoval(), SurfacePurifier(network, restorer)])

    return build


SAMPLES = MeshRestorer().resample
VARIANTS = {
    "onet-fill": _variant(),
    "no mesh repair": _variant(repair=None),
    "samples of the mesh alone": _variant(resample=SAMPLES),
    "samples of the mesh alone, no mesh repair": _variant(resample=SAMPLES, repair=None),
    "input points not smoothed": _variant(resample=FillSampling(smoothing=1)),
    "input points within 0.1": _variant(resample=FillSampling(tolerance=0.1)),
    "one view of the cloud": _variant(views=1),
}


def inputs(bench: Bench, victim: Victim) -> dict[str, Tensor]:
    """Clouds ``(S, M, 3)`` in the classifier's frame by what was done to them."""
    given = {"clean": bench.points}
    for name in ATTACKS:
        entry = SUITE[name]
        given[entry.title] = bench.attacked(victim, name, entry.attack(), entry.targeted)
    generator = torch.Generator().manual_seed(bench.seed)
    clusters = simulate_attack(bench.points / 2, generator=generator, options=CLUSTERS) * 2
    return given | {"clusters": clusters}


@click.command()
@protocol_options("ablation.json", victims=None, split="validation", clouds="100")
@several("variant", type=click.Choice(list(VARIANTS)), help="Repeatable; all by default.")
@torch.no_grad()
def ablation(protocol: Protocol, variants: tuple[str, ...], out: Path) -> None:
    """Chamfer distance and accuracy of variants of the purifier (needs IFDEFENSE_DATA)."""
    victim, bench = Victim.load(VICTIM), protocol.bench(100)

    def figures(points: Tensor) -> dict[str, float]:
        pairs = zip(points.split(8), bench.points.split(8), strict=True)
        distance = torch.cat([chamfer_distance(a, b, squared=False) for a, b in pairs])
        right = bench.predictions(victim, to_unit_sphere(points)) == bench.labels
        return {**rate(right), "chamfer": distance.mean().item()}

    given = inputs(bench, victim)
    rows = {"not purified": {name: figures(points) for name, points in given.items()}}
    for variant in variants or VARIANTS:
        purifier = VARIANTS[variant]()
        size = bench.points.shape[1]
        rows[variant] = {name: figures(purifier(points, size, bench.seed)) for name, points in given.items()}
        record.write(out, "ablation", **bench.about(), weights=victim.weights, rows=rows)
    cells = [
        [name, *(f"{one['accuracy']:.1f}, {one['chamfer']:.4f}" for one in row.values())]
        for name, row in rows.items()
    ]
    click.echo(text_table(["variant", *(f"{name}: accuracy, Chamfer" for name in given)], cells))
