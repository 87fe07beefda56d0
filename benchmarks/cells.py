"""Cells of a grid of measurements: a victim behind a defence, and what attacks them with which knowledge.

A cell is measured in blocks of `BLOCK` clouds. Clouds are in a nested order, so more clouds are more blocks.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from attacks import EOT
from attacks.defence_aware.model import Gradient
from benchmarks.foreign import Victim
from benchmarks.suite import SUITE, Suite, slow

BLOCK = 20
"""Clouds per block; divides all numbers of clouds of the suites."""

NO_DEFENCE = "none"
BASELINES = (NO_DEFENCE, "sor", "sor-smooth")
"""Defences of every run, to compare with."""

TRANSFER = "transfer:"
SURROGATE = "surrogate:"
GUIDE = "sor-smooth"
"""The surrogate of other defences: differentiable, cheap, and nearly the same in every draw."""
CORRUPTION = "corruption:"
FILE = "file:"


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
    """What is measured.

    Attributes:
        victim: title of the classifier.
        source: ``"clean"``, an attack of `benchmarks.suite.SUITE`, ``"corruption:NAME@SEVERITY"``, or
            ``"file:DIGEST"`` for clouds from a file.
        defence: name of the defence, or ``"none"``.
        knowledge: ``"none"`` for sources that know nothing; ``"static"`` for attacks on the bare classifier;
            attacks through the defence by a ``"straight-through"`` or ``"exact"`` gradient, or ``"eot"``, the
            mean over random draws; ``"transfer:OTHER"`` for attacks through another defence;
            ``"surrogate:OTHER"`` for attacks that start from the result of that transfer, with losses behind
            this defence and the mean of the gradients past it and through the other.
    """

    victim: str
    source: str
    defence: str
    knowledge: str = "none"

    @property
    def attacked(self) -> Cell:
        """The cell whose attacked clouds this one scores."""
        if self.knowledge == "static":
            return dataclasses.replace(self, defence=NO_DEFENCE)
        return self

    @property
    def family(self) -> str:
        """``"clean"``, ``"corruption"``, ``"file"``, or the family of the threat model of the attack."""
        if self.source in SUITE:
            return SUITE[self.source].family
        return self.source.partition(":")[0]

    @property
    def adaptive(self) -> bool:
        """Whether the attack knows the defence; without a defence, every attack does."""
        return self.source in SUITE and (self.knowledge != "static" or self.defence == NO_DEFENCE)

    def __str__(self) -> str:
        return f"{self.victim}, {self.source}, {self.defence}, {self.knowledge}"


@dataclasses.dataclass(frozen=True)
class Knowledge:
    """How an attacker goes through a defence.

    Attributes:
        gradient: see `attacks.BPDA`.
        eot: draws per gradient. An attacker sees fresh draws, never those that are scored.
    """

    gradient: Gradient
    eot: EOT


def knowledges(defence: Any, samples: int) -> dict[str, Knowledge]:
    """Ways through a defence, the strongest last; ``samples`` are the draws per gradient of a random one."""
    name, eot = ("straight-through", EOT(1)) if defence.deterministic else ("eot", EOT(samples))
    found = {name: Knowledge("nearest", eot)}
    if defence.differentiable:
        found["exact"] = Knowledge("exact", eot)
    return found


def grid(suite: Suite, victims: Mapping[str, Victim], defences: Mapping[str, Any]) -> dict[Cell, int]:
    """Cells of a run, and the number of clouds of each.

    Args:
        suite: attacks and numbers of clouds.
        victims: victims by title.
        defences: defences by name; ``"none"`` has the value ``None``.
    """
    return {
        cell: suite.count(cell.source, cell.knowledge, slow(victims[cell.victim].model))
        for victim in victims.values()
        for cell in [*_cells(suite, victim, defences), *_adaptive_cells(suite, victim, defences)]
    }


def _cells(suite: Suite, victim: Victim, defences: Mapping[str, Any]) -> Iterator[Cell]:
    title = victim.title
    for name, defence in defences.items():
        yield Cell(title, "clean", name)
        yield from (Cell(title, source, name) for source in suite.corruptions)
        # A victim with random numbers of its own is attacked over draws of them.
        bare = "static" if victim.deterministic or defence is not None else "eot"
        yield from (Cell(title, source, name, bare) for source in suite.attacks)


def _adaptive_cells(suite: Suite, victim: Victim, defences: Mapping[str, Any]) -> Iterator[Cell]:
    for (name, defence), source in itertools.product(defences.items(), suite.adaptive):
        if defence is None:
            continue
        found = [
            knowledge
            for knowledge in knowledges(defence, suite.samples)
            if knowledge != "exact" or source in suite.exact
        ]
        if source in suite.exact:
            others = (other for other, known in defences.items() if known is not None and other != name)
            found += [TRANSFER + other for other in others]
            if name != GUIDE and GUIDE in defences and SUITE[source].starts:
                found.append(SURROGATE + GUIDE)
        for knowledge in found:
            if knowledge.partition(":")[0] in suite.ways:
                yield Cell(victim.title, source, name, knowledge)
