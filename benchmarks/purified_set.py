"""Purified copies of ModelNet40, for hybrid training."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import ifdefense
from ifdefense.console import device_option
from ifdefense.corruptions.simulated import SimulationOptions, simulate_attack
from ifdefense.data.formats import replacing
from ifdefense.data.modelnet import load_modelnet40
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.provenance import code_digest, digest, versions
from ifdefense.purifiers.registry import DEFAULT, METHODS

CHUNK = 64
CORRUPTION = SimulationOptions(clean=0.0)


@click.command("purified-set")
@click.option("--split", type=click.Choice(["train", "validation"]), default="train", show_default=True)
@click.option("--method", type=click.Choice(list(METHODS)), default=DEFAULT, show_default=True)
@click.option("--data", "root", type=click.Path(), help="Data folder; IFDEFENSE_DATA by default.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="npz to write.")
@click.option("--limit", type=int, help="Clouds to purify, a random subset; all by default.")
@click.option(
    "--part", nargs=2, type=int, default=(0, 1), show_default=True, help="Share K of M, to run side by side."
)
@click.option(
    "--corrupted",
    default=0.0,
    show_default=True,
    help="Share of clouds corrupted at random (noise, outliers, holes) before purification.",
)
@click.option("--seed", default=0, show_default=True)
@device_option
def purified_set(
    split: str,
    method: str,
    root: str | None,
    out: Path,
    limit: int | None,
    part: tuple[int, int],
    corrupted: float,
    seed: int,
    device: torch.device,
) -> None:
    """Purifies clouds of a split; resumes after an interruption.

    The corruptions are random and do not depend on a classifier.
    """
    clouds = load_modelnet40(root, split)  # type: ignore[arg-type]
    order = np.random.default_rng(seed).permutation(len(clouds.points))[:limit][part[0] :: part[1]]
    purifier = ifdefense.load(method, device=device)
    code = code_digest([simulate_attack.__module__])
    kind = [] if device.type == "cpu" else [device.type]  # same rounding
    key = digest(purifier, code, versions(), split, limit, part, corrupted, seed, kind)
    partial = out.with_suffix(f".{key}.partial.npy")
    out.parent.mkdir(parents=True, exist_ok=True)
    done = np.load(partial) if partial.exists() else np.zeros((0, *clouds.points.shape[1:]), np.float16)
    with tqdm(total=len(order), initial=len(done), desc=f"purify {split}", mininterval=10) as bar:
        while len(done) < len(order):
            index = order[len(done) : len(done) + CHUNK]
            given = list(to_unit_sphere(torch.from_numpy(clouds.points[index])))
            for place, number in enumerate(index):
                given[place] = _spoilt(given[place], corrupted, int(number), seed)
            purified = purifier(given, clouds.points.shape[1], seed)
            done = np.concatenate([done, torch.stack(purified).numpy().astype(np.float16)])
            with replacing(partial, force=True) as unfinished, unfinished.open("wb") as file:
                np.save(file, done)
            bar.update(len(index))
    np.savez_compressed(out, points=done, label=clouds.labels[order], index=order)
    partial.unlink(missing_ok=True)
    click.echo(f"{len(done)} purified clouds in {out}")


def _spoilt(cloud: Tensor, share: float, index: int, seed: int) -> Tensor:
    """A cloud of the unit sphere, corrupted with probability ``share``; depends on index and seed only."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    if float(torch.rand((), generator=generator)) >= share:
        return cloud
    left = len(cloud) * 3 // 4  # about the number left by the largest holes
    return simulate_attack(cloud[None] / 2, left, generator, CORRUPTION)[0] * 2
