"""``ifdefense-bench ablation``: what each part of the purifier is worth, on validation clouds.

Every variant differs from the shipped purifier in a setting or two. Clouds are given clean and as attackers
leave them: with holes, with noise, with clusters. Two figures each: the Chamfer distance of the result to the
clean cloud (sum of both mean distances, classifier's frame), and the hybrid-trained PointNet's accuracy.
"""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

import classifiers
from benchmarks import record
from ifdefense import Purifier, SurfaceOptions
from ifdefense.data.corruption import CorruptionOptions, corrupt
from ifdefense.data.modelnet import load_modelnet40
from ifdefense.frame import to_unit_sphere
from ifdefense.points import chamfer_distance

SHIPPED = SurfaceOptions()
VARIANTS = {
    "as shipped": SHIPPED,
    "no mesh repair": dataclasses.replace(SHIPPED, repair=None),
    "mesh alone, no input points": dataclasses.replace(SHIPPED, tolerance=None),
    "mesh alone, no mesh repair": dataclasses.replace(SHIPPED, tolerance=None, repair=None),
    "one view of the cloud": dataclasses.replace(SHIPPED, views=1),
}

NOTHING = CorruptionOptions(
    clean=0, noise=0, displace=0, outliers=0, clusters=0, holes=0, salient=0, cut=0, uneven=0
)
INPUTS = {
    "clean": NOTHING,
    "holes": dataclasses.replace(NOTHING, holes=1, hole_share=0.4, hole_count=2),
    "noise": dataclasses.replace(NOTHING, noise=1, noise_sigma=0.05),
    "clusters": dataclasses.replace(NOTHING, clusters=1, cluster_share=0.2),
}


def inputs(clean: Tensor, seed: int) -> dict[str, Tensor]:
    """Clouds ``(S, N, 3)`` in the classifier's frame, as each kind of attacker leaves them."""
    return {
        name: corrupt(clean / 2, generator=torch.Generator().manual_seed(seed), options=options) * 2
        for name, options in INPUTS.items()
    }


@click.command("ablation")
@click.option("--clouds", default=100, show_default=True, help="Validation clouds, a random subset.")
@click.option("--seed", default=0, show_default=True)
@click.option("--variant", "names", multiple=True, type=click.Choice(tuple(VARIANTS)), help="All by default.")
@click.option("--out", type=click.Path(path_type=Path), default=record.FOLDER / "ablation.json")
@torch.no_grad()
def ablation(clouds: int, seed: int, names: tuple[str, ...], out: Path) -> None:
    """Chamfer distance and accuracy of variants on validation clouds (needs IFDEFENSE_DATA)."""
    data = load_modelnet40(split="validation")
    chosen = np.random.default_rng(seed).permutation(len(data.points))[:clouds]
    clean = to_unit_sphere(torch.from_numpy(data.points[chosen]))
    labels = torch.from_numpy(data.labels[chosen])
    victim = classifiers.load("pointnet-modelnet40-hybrid").eval()

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

    given = inputs(clean, seed)
    rows: dict[str, Any] = {"not purified": {name: figures(points) for name, points in given.items()}}
    network = Purifier.from_pretrained("onet-mesh").network
    for variant in names or VARIANTS:
        purifier = Purifier(network, options=VARIANTS[variant])
        rows[variant] = {name: figures(purifier(points, seed=seed)) for name, points in given.items()}
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
