"""Clouds, targets, victims, defences, cache and options of every measurement on ModelNet40.

The protocol is that of IF-Defense, `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_: clouds are
mean-centred with largest norm 1, targets are fixed random labels, attacked clouds are not normalised again.
Purified clouds are normalised if the purifier declares it.

Attacked and purified clouds are cached batch by batch. A key is a digest of descriptions, settings, weights,
versions, and code without comments and docstrings.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import click
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import classifiers
import ifdefense
from attacks import EOT, Attack, adaptive, attack_in_batches, random_targets
from benchmarks import record
from ifdefense import Defended, Purifier
from ifdefense.console import device_option
from ifdefense.data.cloudset import CloudSet
from ifdefense.data.formats import replacing
from ifdefense.data.modelnet import Split, load_modelnet40
from ifdefense.data.selection import stratified
from ifdefense.geometry.axes import AXES
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.logits import classify
from ifdefense.provenance import code_digest, digest, digest_of_weights, versions
from ifdefense.purifiers.registry import METHODS

CPU = torch.device("cpu")
NO_DEFENCE = "none"
DEFENCES = (NO_DEFENCE, *reversed(METHODS))
"""No defence, the baselines, then the methods with a network."""

VICTIMS = (
    "pointnet-modelnet40",
    "pointnet-modelnet40-hybrid",
    "dgcnn-modelnet40",
    "dgcnn-modelnet40-hybrid",
)

Command = Callable[..., None]
Option = Callable[[Command], Command]


@dataclasses.dataclass(frozen=True, eq=False)
class Victim:
    """A classifier.

    Attributes:
        title: its name in tables.
        model: the classifier, folded, on a device.
        weights: digest of its weights.
    """

    title: str
    model: nn.Module
    weights: str

    @classmethod
    def load(cls, name: str, device: torch.device = CPU) -> Self:
        """A shipped classifier by its name, or another one as ``NETWORK:FILE`` or ``NETWORK:FILE@AXIS``.

        ``AXIS`` is the up axis of its training clouds, such as y for ModelNet40 as HDF5.
        """
        network, colon, path = name.partition(":")
        file, _, up = path.rpartition("@")
        path, axis = (file, up) if up in AXES else (path, None)
        model = classifiers.load(network, path, up=axis) if colon else classifiers.load(name)
        title = f"{network}-{Path(path).stem}" if colon else name
        folded = classifiers.upright(classifiers.fold(model)).to(device)
        return cls(title, folded, digest_of_weights(model))


@functools.cache
def purifier_of(defence: str, device: torch.device = CPU) -> Purifier:
    """The purifier of a method."""
    return ifdefense.load(defence, device=device)


@functools.cache
def _whole(split: Split) -> CloudSet:
    return load_modelnet40(split=split)


@dataclasses.dataclass(eq=False)
class Bench:
    """Clouds of a split, and a cache of attacked and purified clouds.

    Attributes:
        split: part of ModelNet40; settings are chosen on validation.
        clouds: number of clouds, drawn in proportion to the classes.
        seed: seed of the draw, the targets, the attacks and the defences.
        cache: folder of the cache.
        batch: clouds per batch; results do not depend on it.
        device: device of the clouds and the victims. Rounding depends on it, so the cache does too.
        points: ``(S, N, 3)`` clean clouds in the unit sphere.
        labels: ``(S,)`` classes.
        targets: ``(S,)`` classes for targeted attacks; independent of ``clouds``.
    """

    split: Split
    clouds: int
    seed: int
    cache: Path
    batch: int = 25
    device: torch.device = CPU
    points: Tensor = dataclasses.field(init=False)
    labels: Tensor = dataclasses.field(init=False)
    targets: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        whole = _whole(self.split)
        chosen = torch.from_numpy(stratified(whole.labels, self.clouds, self.seed))
        labels = torch.from_numpy(whole.labels)
        self.points = to_unit_sphere(torch.from_numpy(whole.points)[chosen]).to(self.device)
        self.labels = labels[chosen].to(self.device)
        self.targets = random_targets(labels, len(whole.classes), self.seed)[chosen].to(self.device)

    @property
    def kind(self) -> list[str]:
        """Device in the keys of the cache; empty for a CPU."""
        return [] if self.device.type == "cpu" else [self.device.type]

    def attacked(
        self, victim: Victim, name: str, attack: Attack, targeted: bool, defence: str = NO_DEFENCE
    ) -> Tensor:
        """``(S, M, 3)`` clouds after an attack.

        Args:
            victim: the classifier.
            name: name of the attack in the cache.
            attack: the attack.
            targeted: whether it aims at the targets.
            defence: defence known to the attacker, including its seed, which is stronger than an average over
                seeds.
        """
        model = victim.model
        if defence != NO_DEFENCE:
            purifier = purifier_of(defence, self.device)
            attack, model = adaptive(
                attack,
                model,
                purifier,
                # Through samples of a surface, straight-through gradients find more (benchmarks/README.md).
                gradient="nearest" if METHODS[defence].network else "exact",
                eot=EOT(samples=1, first=self.seed, fresh=False),
                num_points=self.points.shape[1],
                seed=self.seed,
            )
        key = digest(attack, model, code_of(model), versions(), self.kind)
        result = attack_in_batches(
            attack,
            model,
            self.points,
            self.labels,
            self.targets if targeted else None,
            batch_size=self.batch,
            folder=self.cache / "attacked" / f"{name}-{key}",
            seed=self.seed,
            progress=True,
        )
        return result.points

    def purified(self, points: Tensor, defence: str) -> Tensor:
        """``(S, N, 3)`` purified clouds, see `ifdefense.Defended.purified`."""
        if defence == NO_DEFENCE:
            return points
        purifier, size = purifier_of(defence, self.device), self.points.shape[1]
        key = digest(purifier, versions(), points, size, self.seed, self.kind)
        folder = self.cache / "purified" / f"{defence}-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        parts = []
        for number, given in enumerate(tqdm(points.split(self.batch), defence, unit="batch", mininterval=5)):
            path = folder / f"{self.batch}-{number:05d}.npy"
            if not path.is_file():
                made = purifier(given, size, self.seed)
                with replacing(path, force=True) as partial, partial.open("wb") as file:
                    np.save(file, made.cpu().numpy())
            parts.append(torch.from_numpy(np.load(path)))
        return torch.cat(parts).to(self.device)

    @torch.no_grad()
    def predictions(self, victim: Victim, points: Tensor, defence: str | Purifier = NO_DEFENCE) -> Tensor:
        """``(S,)`` predicted classes of purified clouds."""
        model: Callable[[Tensor], Any] = victim.model
        if defence != NO_DEFENCE:
            purifier = purifier_of(defence, self.device) if isinstance(defence, str) else defence
            model = Defended(model, purifier).classified
        return torch.cat([classify(model, part).argmax(1) for part in points.split(self.batch)])

    def about(self) -> dict[str, Any]:
        """Description of the clouds, for the results."""
        about = {"split": self.split, "clouds": self.clouds, "seed": self.seed}
        return about if self.device.type == "cpu" else about | {"device": self.device.type}


def code_of(model: nn.Module) -> str:
    """Digest of the code of a model and its parts, except for torch."""
    modules = {type(part).__module__ for part in model.modules()}
    return code_digest(name for name in modules if name.partition(".")[0] != "torch")


def rate(hits: Tensor) -> dict[str, float]:
    """Accuracy and its standard error in %, of ``(S,)`` booleans."""
    share = int(hits.sum()) / len(hits)
    error = math.sqrt(share * (1 - share) / len(hits))
    return {"accuracy": round(100 * share, 2), "standard_error": round(100 * error, 2)}


def specs(defences: tuple[str, ...]) -> dict[str, Any]:
    """Descriptions of defences, for the results."""
    return {name: purifier_of(name).spec() for name in defences if name != NO_DEFENCE}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Options shared by the measurements.

    Attributes:
        split: as `Bench`, like the following.
        clouds: ``None`` for the default of the measurement.
        seed: ...
        batch: ...
        cache: ...
        device: ...
    """

    split: Split
    clouds: int | None
    seed: int
    batch: int
    cache: Path
    device: torch.device = CPU

    def bench(self, clouds: int = 400) -> Bench:
        """The clouds; ``clouds`` is the default number."""
        return Bench(self.split, self.clouds or clouds, self.seed, self.cache, self.batch, self.device)


def protocol_options(
    out: str, *, victims: tuple[str, ...] | None = VICTIMS, split: Split = "test", clouds: str = "400"
) -> Option:
    """Adds the shared options; the command gets a `Protocol`, the victims, the defences and ``out``.

    Args:
        out: file name of the results.
        victims: default victims; ``None`` for a measurement with one victim and without a choice of defences.
        split: default split.
        clouds: default number of clouds, for the help.
    """
    number = click.IntRange(min=1)
    path = click.Path(path_type=Path)
    options: list[Option] = [
        click.option("--split", type=click.Choice(["test", "validation"]), default=split, show_default=True),
        click.option(
            "--clouds", type=number, help=f"Drawn in proportion to the classes.  [default: {clouds}]"
        ),
        click.option(
            "--batch", type=number, default=Bench.batch, show_default=True, help="Clouds per batch."
        ),
        click.option("--cache", type=path, default=Path("cache/bench"), show_default=True),
        click.option("--seed", type=int, default=0, show_default=True),
        device_option,
        click.option("--out", type=path, default=record.FOLDER / out, show_default=True),
    ]
    if victims is not None:
        options += [
            several("victim", victims, help="A shipped name or NETWORK:FILE[@AXIS]; repeatable."),
            several("defence", DEFENCES, type=click.Choice(DEFENCES), help="Repeatable; all by default."),
        ]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            shared = {field.name: given.pop(field.name) for field in dataclasses.fields(Protocol)}
            command(Protocol(**shared), **given)

        made: Command = run
        for option in reversed(options):
            made = option(made)
        return made

    return decorate


def several(name: str, default: Any = None, **options: Any) -> Option:
    """A repeatable option ``--name``, passed on as ``names``."""
    return click.option(f"--{name}", f"{name}s", multiple=True, default=default, **options)
