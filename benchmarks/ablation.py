"""``ifdefense-bench ablation``: what each part of the purifier is worth, on validation clouds.

Every variant differs from the shipped purifier in a setting or two. Clouds are given clean, as attacks on the
classifier leave them, and with clusters added at random. Two figures each: the Chamfer distance of the result
to the clean cloud (sum of both mean distances, classifier's frame), and the accuracy of the hybrid-trained
PointNet.
"""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import classifiers
from benchmarks import record
from benchmarks.accuracy import TITLES, Bench, Settings
from ifdefense import Purifier, SurfaceOptions
from ifdefense.corruptions.simulated import SimulationOptions, simulate_attack
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.geometry.points import chamfer_distance

SHIPPED = SurfaceOptions()
VARIANTS = {
    "as shipped": SHIPPED,
    "no mesh repair": dataclasses.replace(SHIPPED, repair=None),
    "mesh alone, no input points": dataclasses.replace(SHIPPED, tolerance=None),
    "mesh alone, no mesh repair": dataclasses.replace(SHIPPED, tolerance=None, repair=None),
    "input points not smoothed": dataclasses.replace(SHIPPED, smoothing=1),
    "input points within 0.1": dataclasses.replace(SHIPPED, tolerance=0.1),
    "one view of the cloud": dataclasses.replace(SHIPPED, views=1),
}

ATTACKS = ("none", "pgd", "drop-200")
CLUSTERS = SimulationOptions(
    clean=0,
    noise=0,
    displace=0,
    outliers=0,
    clusters=1,
    cluster_share=0.2,
    holes=0,
    salient=0,
    cut=0,
    uneven=0,
)


def inputs(bench: Bench, victim: nn.Module) -> dict[str, Tensor]:
    """Clouds ``(S, M, 3)`` in the classifier's frame, as each attacker leaves them."""
    given = {TITLES[name]: bench.attacked(victim, name)["points"] for name in ATTACKS}
    generator = torch.Generator().manual_seed(bench.settings.seed)
    return given | {"clusters": simulate_attack(bench.points / 2, generator=generator, options=CLUSTERS) * 2}


@click.command("ablation")
@click.option("--clouds", default=100, show_default=True, help="Validation clouds, in proportion.")
@click.option("--seed", default=0, show_default=True)
@click.option("--variant", "names", multiple=True, type=click.Choice(tuple(VARIANTS)), help="All by default.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path("cache/accuracy"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=record.FOLDER / "ablation.json")
@torch.no_grad()
def ablation(clouds: int, seed: int, names: tuple[str, ...], cache: Path, out: Path) -> None:
    """Chamfer distance and accuracy of variants on validation clouds (needs IFDEFENSE_DATA)."""
    victim = classifiers.load("pointnet-modelnet40-hybrid").eval()
    bench = Bench(Settings("validation", clouds, seed), cache)
    clean, labels = bench.points, bench.labels

    def figures(points: Tensor) -> dict[str, float]:
        seen = to_unit_sphere(points)
        right = torch.cat([victim(part).argmax(1) for part in seen.split(32)]) == labels
        distance = torch.cat(
            [
                chamfer_distance(a, b, squared=False)
                for a, b in zip(points.split(8), clean.split(8), strict=True)
            ]
        )
        return {"accuracy": 100 * right.double().mean().item(), "chamfer": distance.mean().item()}

    given = inputs(bench, victim)
    num_points = clean.shape[1]
    rows: dict[str, Any] = {"not purified": {name: figures(points) for name, points in given.items()}}
    network = Purifier.from_pretrained("onet-mesh").network
    for variant in names or VARIANTS:
        purifier = Purifier(network, options=VARIANTS[variant])
        rows[variant] = {name: figures(purifier(points, num_points, seed)) for name, points in given.items()}
        click.echo(f"{variant}: {rows[variant]}")
        result = {
            "command": "ifdefense-bench ablation",
            "clouds": clouds,
            "seed": seed,
            "split": "validation",
            "date": datetime.now(UTC).date().isoformat(),
            "machine": record.machine(),
            "rows": rows,
        }
        record.write(out, result)
    header = ["variant", *(f"{name}: accuracy, Chamfer" for name in given)]
    cells = [
        [name, *(f"{one['accuracy']:.1f}, {one['chamfer']:.4f}" for one in row.values())]
        for name, row in rows.items()
    ]
    click.echo(record.text_table(header, cells))
