"""Attacked clouds with known surfaces, for training the local network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import attacks
from attacks import Attack
from benchmarks.foreign import Victim, victim_of
from benchmarks.studies.common import several
from benchmarks.suite import slow
from ifdefense.checkpoints import shipped
from ifdefense.console import device_option
from ifdefense.data.formats import replacing
from ifdefense.devices import device_of_weights
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.provenance import code_digest, digest, versions
from ifdefense.training.commands import mix_of
from ifdefense.training.data.attacked_clouds import AttackedClouds, Floats
from ifdefense.training.data.surfaces import SOURCES, DenseSurfaces, collect
from ifdefense.training.examples.thickened_surfaces import random_rotation

CHUNK = 16
"""Clouds of one attack on one classifier."""

POINTS = 1024
DROPPED = 200
HELD = 0.1
"""Share of the clouds whose surfaces are held out for validation."""

MAX_SCALE = 1.35
"""Largest factor of an axis of a surface, and the inverse of the smallest."""

_SHORT = {"searches": 1, "rate": 3e-2, "polish": 10}

ATTACKS: dict[str, tuple[int, type[Attack], dict[str, Any]]] = {
    "pgd-linf": (3, attacks.PGD, {"norm": "linf", "delta": 0.05, "iterations": 10, "step": 0.2}),
    "pgd": (2, attacks.PGD, {"iterations": 10, "step": 0.15}),
    "pgd-point": (2, attacks.PGD, {"norm": "point-l2", "delta": 0.05, "iterations": 10, "step": 0.2}),
    "apgd-linf": (3, attacks.APGD, {"norm": "linf", "delta": 0.05, "iterations": 14, "early_stop": False}),
    "apgd": (1, attacks.APGD, {"iterations": 14, "early_stop": False}),
    "perturb": (1, attacks.Perturb, {"first_weight": 0.01, "iterations": 40, **_SHORT}),
    "drop": (2, attacks.SaliencyDrop, {"num": DROPPED, "per_round": 20}),
    "add-cd": (1, attacks.AddCD, {"first_weight": 0.5, "iterations": 30, **_SHORT}),
    "add-hd": (1, attacks.AddHD, {"first_weight": 0.02, "iterations": 30, **_SHORT}),
    "add-cluster": (1, attacks.AddCluster, {"iterations": 30, **_SHORT, "first_weight": 1}),
    "add-object": (1, attacks.AddObject, {"iterations": 30, **_SHORT, "first_weight": 1}),
    "aof": (1, attacks.AOF, {"restarts": 1, "iterations": 15}),
}
"""Frequency, class and settings of each attack; few steps, because there are many clouds.

SI-Adv, kNN and the other attacks of the suite are left out, for evaluation.
"""

SLOW = ("pgd-linf", "pgd", "pgd-point", "apgd-linf", "perturb", "drop")
"""Attacks on networks with slow gradients, with at most `FEW` steps."""

FEW = 6


@click.command("attacked-set")
@click.option(
    "--mix",
    multiple=True,
    callback=mix_of(SOURCES, {"meshes": 0.6, "furniture": 0.25, "procedural": 0.15}),
    help="NAME=WEIGHT of a source of surfaces: meshes, furniture, procedural or modelnet40.",
)
@click.option("--data", "root", type=click.Path(), help="Data folder; IFDEFENSE_DATA by default.")
@click.option(
    "--surfaces",
    type=click.Path(path_type=Path),
    default=Path("cache/surfaces"),
    show_default=True,
    help="Cache of the surfaces, that of ifdefense train local.",
)
@click.option("--per-class", default=60, show_default=True, help="Procedural shapes per class.")
@click.option(
    "--teacher-clouds", default=1179, show_default=True, help="Clouds of modelnet40 that the network labels."
)
@several("victim", ("pointnet-modelnet40", "dgcnn-modelnet40"), help="Attacked classifiers; repeatable.")
@click.option(
    "--slow-share", default=0.25, show_default=True, help="Share of the clouds for each slow classifier."
)
@click.option("--clouds", default=4000, show_default=True, help="Clouds to attack.")
@click.option("--seed", default=0, show_default=True)
@device_option
@click.option("--out", type=click.Path(path_type=Path), required=True, help="npz to write.")
def attacked_set(
    mix: dict[str, float],
    root: str | None,
    surfaces: Path,
    per_class: int,
    teacher_clouds: int,
    victims: tuple[str, ...],
    slow_share: float,
    clouds: int,
    seed: int,
    device: torch.device,
    out: Path,
) -> None:
    """Attacks clouds of known surfaces, away from the class that the classifier predicts.

    An interrupted run resumes; a run with more --clouds continues one with fewer.
    """
    teacher = shipped("ifdefense", "local") if "modelnet40" in mix else None
    sources = {
        name: collect(name, root, surfaces, per_class, teacher, teacher_clouds, device) for name in mix
    }
    models = [victim_of(name, device=device) for name in victims]
    key = digest(
        [
            {name: data.digest() for name, data in sources.items()},
            mix,
            [victim.weights for victim in models],
            slow_share,
            seed,
            versions(),
            code_digest([__name__, *{attack.__module__ for _, attack, _ in ATTACKS.values()}]),
            *([] if device.type == "cpu" else [device.type]),  # same rounding
        ]
    )
    folder = out.with_suffix(f".{key}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for number in tqdm(range(-(-clouds // CHUNK)), desc="attack", unit="chunk", mininterval=10):
        path = folder / f"{number:05d}.npz"
        if not path.is_file():
            part = _chunk(sources, mix, models, slow_share, seed, number)
            with replacing(path, force=True) as unfinished, unfinished.open("wb") as file:
                np.savez(file, **_arrays(part))
        parts.append(AttackedClouds.load(path))
    with replacing(out, force=True) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, **_arrays(_joined(parts)))
    click.echo(f"{sum(map(len, parts))} attacked clouds in {out}")


def _chunk(
    sources: Mapping[str, DenseSurfaces],
    mix: Mapping[str, float],
    victims: list[Victim],
    slow_share: float,
    seed: int,
    number: int,
) -> AttackedClouds:
    """Attacked clouds that depend on the seed and the number of the chunk only."""
    rng = np.random.default_rng([seed, number])
    share = np.array([slow_share if slow(victim.model) else 0.0 for victim in victims])
    fast = share == 0
    share[fast] = (1 - share.sum()) / max(int(fast.sum()), 1)
    victim = victims[rng.choice(len(victims), p=share / share.sum())]
    name, attack = _attack(victim.model, rng)
    count = POINTS + (DROPPED if name == "drop" else 0)
    names = list(sources)
    rows = [_surface(sources, mix, rng) for _ in range(CHUNK)]
    given = torch.stack([torch.from_numpy(cloud[:count]) for *_, cloud in rows])
    attacked = _attacked(victim.model, attack, given, seed * 1_000_003 + number)
    return AttackedClouds(
        points=attacked.flatten(0, 1).numpy().astype(np.float16),
        sizes=np.full(CHUNK, attacked.shape[1], np.int64),
        sources=np.array(names),
        digests=np.array([sources[source].digest() for source in names]),
        source=np.array([names.index(row[0]) for row in rows], np.int64),
        index=np.array([row[1] for row in rows], np.int64),
        scale=np.stack([row[2] for row in rows]),
        rotation=np.stack([row[3] for row in rows]),
        attacks=np.array([f"{name}, {victim.title}"]),
        attack=np.zeros(CHUNK, np.int64),
    )


def _attack(model: nn.Module, rng: np.random.Generator) -> tuple[str, Attack]:
    """An attack by its frequency, of full or of smaller strength where it has a budget."""
    few = slow(model)
    names = SLOW if few else tuple(ATTACKS)
    often = np.array([ATTACKS[name][0] for name in names], float)
    name = str(rng.choice(names, p=often / often.sum()))
    _, attack, settings = ATTACKS[name]
    settings = dict(settings)
    if few and "iterations" in settings:
        settings["iterations"] = min(settings["iterations"], 3 * FEW if name == "perturb" else FEW)
    if few and "step" in settings:
        settings["step"] = 2 / FEW
    if few and name == "drop":
        settings["per_round"] = -(-DROPPED // FEW)
    if "delta" in {field.name for field in dataclasses.fields(attack)}:  # type: ignore[arg-type]
        settings["delta"] = settings.get("delta", 0.08) * float(
            rng.choice([0.4, 0.7, 1.0], p=[0.2, 0.2, 0.6])
        )
    return name, attack(**settings)


def _surface(
    sources: Mapping[str, DenseSurfaces], mix: Mapping[str, float], rng: np.random.Generator
) -> tuple[str, int, Floats, Floats, Floats]:
    """Source, index, scale and rotation of a surface, and its samples in random order."""
    held = rng.random() < HELD
    able = [name for name, data in sources.items() if (data.held == held).any()]
    weight = np.array([mix[name] for name in able])
    name = str(rng.choice(able, p=weight / weight.sum()))
    index = int(rng.choice(np.flatnonzero(sources[name].held == held)))
    limit = np.log(MAX_SCALE) * (rng.random() < 0.5)
    scale = np.exp(rng.uniform(-limit, limit, 3)).astype(np.float32)
    rotation = random_rotation(rng).astype(np.float32)
    points, _ = sources[name].surface(index, scale, rotation)
    return name, index, scale, rotation, rng.permutation(points)


def _attacked(model: nn.Module, attack: Attack, given: Tensor, seed: int) -> Tensor:
    """Clouds ``(B, N, 3)`` attacked in the unit sphere, away from the predicted class, in their own frame."""
    given = given.to(device_of_weights(model))
    with torch.no_grad():
        predicted = model(to_unit_sphere(given)).argmax(1)
    generator = torch.Generator().manual_seed(seed)
    points = attack(model, to_unit_sphere(given), predicted, generator=generator).points
    middle = given.mean(1, keepdim=True)
    radius = (given - middle).norm(dim=2).amax(1)[:, None, None]
    back: Tensor = points * radius + middle
    return back.cpu()


def _arrays(clouds: AttackedClouds) -> dict[str, Any]:
    return {field.name: getattr(clouds, field.name) for field in dataclasses.fields(clouds)}


def _joined(parts: list[AttackedClouds]) -> AttackedClouds:
    """The clouds of all parts, which have the same sources."""
    names = sorted({str(part.attacks[0]) for part in parts})
    arrays = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("points", "sizes", "source", "index", "scale", "rotation")
    }
    attack = np.concatenate([np.full(len(part), names.index(str(part.attacks[0]))) for part in parts])
    return AttackedClouds(
        sources=parts[0].sources, digests=parts[0].digests, attacks=np.array(names), attack=attack, **arrays
    )
