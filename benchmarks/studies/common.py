"""Clouds, attacked clouds and options that the studies of purifiers share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks import result_files, statistics
from benchmarks.cells import BLOCK, NO_DEFENCE, Cell
from benchmarks.clouds import LabelledClouds, Split, load_clouds
from benchmarks.foreign import Victim
from benchmarks.shards import Store, Task, attacked_points
from ifdefense import Defended, Purifier
from ifdefense.console import device_option
from ifdefense.logits import classify

Command = Callable[..., None]
Option = Callable[[Command], Command]


@dataclasses.dataclass(frozen=True, eq=False)
class Bench:
    """Clean clouds of ModelNet40, and a store of attacked ones.

    Attributes:
        clouds: the clean clouds.
        split: the part that they are from.
        seed: seed of their choice, the attacks and the purifiers.
        store: finished shards.
        device: device to compute on.
    """

    clouds: LabelledClouds
    split: Split
    seed: int
    store: Store
    device: torch.device

    @property
    def points(self) -> Tensor:
        """``(S, N, 3)`` clean clouds."""
        return self.clouds.points.to(self.device)

    def attacked(self, victim: str, source: str) -> Tensor:
        """``(S, M, 3)`` clouds after an attack of the suite on a bare classifier."""
        cell = Cell(victim, source, NO_DEFENCE, "static")
        parts = []
        for block in range(-(-len(self.clouds) // BLOCK)):
            given = self.clouds.block(block, BLOCK)
            task = Task("scored", cell, block, given, victim, seed=self.seed, device=str(self.device))
            parts.append(attacked_points(task, self.store))
        return torch.cat(parts)

    @torch.no_grad()
    def accuracy(self, victim: Victim, points: Tensor, purifier: Purifier | None = None) -> dict[str, float]:
        """Accuracy and its standard error in % on clouds that are purified already."""
        model: Callable[[Tensor], Any] = victim.model
        if purifier is not None:
            model = Defended(model, purifier).classified
        predicted = torch.cat([classify(model, part).argmax(1).cpu() for part in points.split(BLOCK)])
        found = statistics.accuracy(predicted == self.clouds.labels, self.clouds.labels)
        return {"accuracy": round(found["accuracy"], 2), "standard_error": round(found["error"], 2)}

    def about(self) -> dict[str, Any]:
        """Description of the clouds, for the results."""
        return {"split": self.split, "clouds": len(self.clouds), "seed": self.seed}


def bench_options(out: str, clouds: int) -> Option:
    """Adds the shared options; the command gets a function that makes the `Bench`, and ``out``.

    Args:
        out: file name of the results.
        clouds: default number of clouds.
    """
    path = click.Path(path_type=Path)
    options: list[Option] = [
        click.option(
            "--split", type=click.Choice(["test", "validation"]), default="validation", show_default=True
        ),
        click.option("--clouds", type=click.IntRange(min=1), default=clouds, show_default=True),
        click.option("--store", type=path, default=Path("cache/bench"), show_default=True),
        click.option("--seed", type=int, default=0, show_default=True),
        device_option,
        click.option("--out", type=path, default=result_files.FOLDER / out, show_default=True),
    ]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(
            *, split: Split, clouds: int, store: Path, seed: int, device: torch.device, **given: Any
        ) -> None:
            def make() -> Bench:
                labelled = load_clouds("modelnet40", clouds=clouds, seed=seed, split=split)
                return Bench(labelled, split, seed, Store(store), device)

            command(bench=make, **given)

        made: Command = run
        for option in reversed(options):
            made = option(made)
        return made

    return decorate


def several(name: str, default: Any = None, **options: Any) -> Option:
    """A repeatable option ``--name``, passed on as ``names``."""
    return click.option(f"--{name}", f"{name}s", multiple=True, default=default, **options)
