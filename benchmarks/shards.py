"""Shards: the smallest pieces of a grid that are computed and stored.

A shard is one block of clouds of a cell, in a file that is written by an atomic rename and keyed by all that
made it: specs, weights, versions, code and clouds. A shard that exists is done.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import logging
import re
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attacks import EOT, PGD, Attack, DefenceAware, SurrogateGradient, WarmStart
from attacks.gradient.pgd import Bounded
from benchmarks.cells import CORRUPTION, NO_DEFENCE, SURROGATE, TRANSFER, Cell, Knowledge, knowledges
from benchmarks.clouds import LabelledClouds
from benchmarks.foreign import RandomModel, Victim, defence_of, tried, victim_of
from benchmarks.probing import RANDOM, probe
from benchmarks.suite import SUITE, Effort
from ifdefense import Defended
from ifdefense.corruptions.natural import corrupt
from ifdefense.data.formats import DataError
from ifdefense.data.formats.files import write_bytes
from ifdefense.devices import synchronise
from ifdefense.logits import classify
from ifdefense.provenance import code_digest, digest, versions

FORMAT = 1
"""Version of what is in a shard; part of all keys."""

FRESH = 1_000_000
"""First seed of the defences' draws; not used by attackers."""

SHARE = 0.5
"""Share of the surrogate in the gradient."""

SHOWN = 2
"""Purified clouds kept of every block, as examples."""

Arrays = dict[str, NDArray[Any]]
_LOG = logging.getLogger(__name__)


class StoreError(RuntimeError):
    """A shard cannot be written, as on a full disk."""


@dataclasses.dataclass(frozen=True)
class Store:
    """A folder of shards, which several runs may use at the same time.

    Attributes:
        folder: created with the first shard.
    """

    folder: Path

    def read(self, path: Path, *names: str) -> Arrays | None:
        """Arrays of a shard, all by default; ``None`` if it is missing or damaged."""
        try:
            with np.load(self.folder / path, allow_pickle=False) as file:
                return {name: file[name] for name in names or file.files}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
            _LOG.warning("%s: cannot be read (%s), computed again", self.folder / path, error)
            return None

    def write(self, path: Path, arrays: Arrays) -> None:
        """Writes a shard atomically.

        Raises:
            StoreError: if it cannot be written.
        """
        data = io.BytesIO()
        np.savez(data, **arrays)  # type: ignore[arg-type]
        try:
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self.folder / path, data.getvalue(), force=True)
        except (OSError, DataError) as error:
            raise StoreError(str(error)) from error


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A shard to compute, with all that it needs.

    Attributes:
        kind: attacked clouds, predictions, or evidence for flags.
        cell: the cell.
        block: number of the block.
        clouds: clouds of the block.
        victim: see `benchmarks.foreign.victim_of`; like the defences, a name or a live object.
        defence: see `benchmarks.foreign.defence_of`.
        known: the other defence of a transfer, or the surrogate of the defence.
        effort: settings of the attacks.
        seed: seed of the attacks and corruptions.
        samples: draws per gradient of a random defence, for attackers.
        draws: draws of a random defence that are scored.
        device: device to compute on.
    """

    kind: Literal["attacked", "scored", "probe"]
    cell: Cell
    block: int
    clouds: LabelledClouds
    victim: Any
    defence: Any = NO_DEFENCE
    known: Any = None
    effort: Effort = "affordable"
    seed: int = 0
    samples: int = 8
    draws: int = 5
    device: str = "cpu"

    @functools.cached_property
    def attacked(self) -> Task | None:
        """The task that makes the attacked clouds of a scored one, if it is an attack."""
        if self.cell.source not in SUITE:
            return None
        if self.cell.knowledge.startswith(TRANSFER):
            return self.through_known
        if self.cell.knowledge.startswith(SURROGATE):
            return dataclasses.replace(self, kind="attacked")
        defence = NO_DEFENCE if self.cell.knowledge == "static" else self.defence
        return dataclasses.replace(
            self, kind="attacked", cell=self.cell.attacked, defence=defence, known=None
        )

    @property
    def through_known(self) -> Task:
        """The task that attacks through the other defence, as strongly as it can."""
        other, defence = self.cell.knowledge.partition(":")[2], self.known
        strongest = list(knowledges(_defence(defence, self.device), self.samples))[-1]
        cell = dataclasses.replace(self.cell, defence=other, knowledge=strongest)
        return dataclasses.replace(self, kind="attacked", cell=cell, defence=defence, known=None)

    @functools.cached_property
    def path(self) -> Path:
        """File of the shard in a store; its name ends with the key."""
        names = (self.kind, self.cell.victim, self.cell.source, f"{self.cell.defence}-{self.cell.knowledge}")
        folder = Path(*(re.sub(r"[^\w.@+-]+", "-", name)[:80] for name in names))
        return folder / f"{self.block:04d}-{self.key}.npz"

    @functools.cached_property
    def key(self) -> str:
        """Digest of all that determines the shard."""
        common = FORMAT, self.kind, _environment(self.device), self.seed, _digest_of_clouds(self.clouds)
        own = _digest_of_victim(self.victim, self.device), _digest_of_defence(self.defence, self.device)
        if self.kind == "attacked":
            known: tuple[Any, ...] = ()
            if self.defence != NO_DEFENCE:
                known = self.cell.knowledge, _samples(self)
            if self.cell.knowledge.startswith(SURROGATE):
                code = _code(WarmStart.__module__), _code(SurrogateGradient.__module__)
                known = *known, self.through_known.key, *code
            return digest(*common, _digest_of_attack(self.cell.source, self.effort), *known, *own)
        if self.kind == "probe":
            return digest(*common, _code(probe.__module__, PGD.__module__), *own)
        source: list[Any] = [self.cell.source]
        if self.attacked is not None:
            source = [self.attacked.key]
        elif self.cell.source.startswith(CORRUPTION):
            source += [_code(corrupt.__module__), self.block]
        return digest(*common, source, *own, self.draws, FRESH)


def run_shard(task: Task, store: Store) -> Arrays:
    """The arrays of a shard; it is computed and written, unless it exists already.

    Raises:
        StoreError: if it cannot be written.
        Exception: what the attack, the defence or the classifier raises.
    """
    if (arrays := store.read(task.path)) is None:
        store.write(task.path, arrays := _MAKERS[task.kind](task, store))
    return arrays


def _attack(task: Task, store: Store) -> Arrays:
    """Attacked clouds of a block."""
    entry, clouds = SUITE[task.cell.source], task.clouds
    attack, model = _attacker(task, store)
    place = torch.device(task.device)
    start = time.perf_counter()
    result = attack(
        model,
        clouds.points.to(place),
        clouds.labels.to(place),
        clouds.targets.to(place) if entry.targeted else None,
        generator=torch.Generator().manual_seed(task.seed),
    )
    synchronise()
    return {
        "points": result.points.cpu().numpy(),
        "success": result.success.cpu().numpy(),
        "queries": result.queries.cpu().numpy(),
        "seconds": np.array(time.perf_counter() - start),
    }


def attacked_points(task: Task, store: Store) -> Tensor:
    """``(S, M, 3)`` clouds that a scored task scores; attacks are computed where they are missing."""
    cell, points = task.cell, task.clouds.points
    if task.attacked is not None:
        points = torch.from_numpy(run_shard(task.attacked, store)["points"])
    elif cell.source.startswith(CORRUPTION):
        name, _, severity = cell.source.removeprefix(CORRUPTION).partition("@")
        generator = torch.Generator().manual_seed(task.seed * 1_000_003 + task.block)
        points = corrupt(points, name, int(severity), generator, normalise=False)
    return points.to(task.device)


def _score(task: Task, store: Store) -> Arrays:
    """``(D, S)`` predicted classes of each draw, seconds per cloud, and some of the purified clouds."""
    points = attacked_points(task, store)
    victim, defence = _victim(task.victim, task.device), _defence(task.defence, task.device)
    size = task.clouds.points.shape[1]
    random = not victim.deterministic or (defence is not None and not defence.deterministic)
    draws = task.draws if random else 1
    predicted, shown = [], points[:SHOWN]
    synchronise()
    start = time.perf_counter()
    with torch.no_grad():
        for seed in range(FRESH, FRESH + draws):
            model = victim.model.with_seed(seed) if isinstance(victim.model, RandomModel) else victim.model
            if defence is None:
                logits = classify(model, points)
            else:
                defended = Defended(model, defence, num_points=size)
                purified = defended.purified(points, seed)
                logits = defended.classified(purified)
                shown = purified[:SHOWN] if seed == FRESH else shown
            predicted.append(logits.argmax(1).cpu())
    seconds = (time.perf_counter() - start) / draws
    shown = torch.stack(list(shown)) if len({len(one) for one in shown}) == 1 else points[:0]
    return {
        "predicted": torch.stack(predicted).to(torch.int16).numpy(),
        "seconds": np.array(seconds),
        "shown": shown.detach().cpu().numpy().astype(np.float16),
    }


def _probe(task: Task, store: Store) -> Arrays:
    """Evidence for the flags, as JSON."""
    victim, defence = _victim(task.victim, task.device), _defence(task.defence, task.device)
    start = time.perf_counter()
    found = probe(victim, defence, task.clouds, task.seed)
    return {"evidence": np.array(json.dumps(found)), "seconds": np.array(time.perf_counter() - start)}


_MAKERS: dict[str, Callable[[Task, Store], Arrays]] = {
    "attacked": _attack,
    "scored": _score,
    "probe": _probe,
}


@functools.lru_cache(maxsize=16)
def _victim(what: Any, device: str) -> Victim:
    return victim_of(what, device=torch.device(device))


@functools.lru_cache(maxsize=16)
def _defence(what: Any, device: str) -> Any:
    """The purifier, or ``None`` for no defence."""
    return defence_of(what, device=torch.device(device))


def _attacker(task: Task, store: Store) -> tuple[Attack, Callable[[Tensor], Any]]:
    """An attack, and what it attacks."""
    attack = SUITE[task.cell.source].attack(task.effort)
    victim, purifier = _victim(task.victim, task.device).model, _defence(task.defence, task.device)
    if purifier is None:
        return attack, victim

    def through(purifier: Any, known: Knowledge) -> DefenceAware:
        size = task.clouds.points.shape[1]
        return DefenceAware(victim, purifier, gradient=known.gradient, eot=known.eot, num_points=size)

    known = knowledges(purifier, _samples(task))
    if not task.cell.knowledge.startswith(SURROGATE):
        return attack, through(purifier, known[task.cell.knowledge])
    other = _defence(task.known, task.device)
    # One draw, as they hardly differ.
    surrogate = through(other, Knowledge("exact" if other.differentiable else "nearest", EOT(1)))
    model = SurrogateGradient(through(purifier, next(iter(known.values()))), surrogate, share=SHARE)
    assert isinstance(attack, Bounded), "the surrogate serves attacks by gradients"
    start = torch.from_numpy(run_shard(task.through_known, store)["points"]).to(task.device)
    return WarmStart(attack, start), model


def _samples(task: Task) -> int:
    """Draws per gradient for an attacker: one if the logits do not depend on the draw.

    Where points are added, the draw may choose those that are kept.
    """
    adds = SUITE[task.cell.source].attack(task.effort).threat.changes == "add"
    if task.samples == 1 or adds or _defence(task.defence, task.device).deterministic:
        return task.samples
    return task.samples if _varies(task.victim, task.defence, task.device) else 1


@functools.lru_cache(maxsize=16)
def _varies(what: Any, defence: Any, device: str) -> bool:
    """Whether the logits behind a random defence depend on its draw, on the clouds on which it was tried.

    They need not: SOR draws which of its points it repeats, which a maximum over points ignores.
    """
    model, purifier = _victim(what, device).model, _defence(defence, device)
    with torch.no_grad():
        one, other = (Defended(model, purifier, seed=seed)(tried().points.to(device)) for seed in (1, 2))
    return bool((one - other).abs().max() > RANDOM * one.abs().max())


@functools.lru_cache(maxsize=16)
def _digest_of_victim(what: Any, device: str) -> str:
    victim = _victim(what, device)
    return digest(victim.weights, code_of(victim.model))


@functools.lru_cache(maxsize=16)
def _digest_of_defence(what: Any, device: str) -> str:
    return digest(_defence(what, device))


@functools.lru_cache(maxsize=64)
def _digest_of_attack(source: str, effort: Effort) -> str:
    return digest(SUITE[source].attack(effort), _code(DefenceAware.__module__))


@functools.lru_cache(maxsize=512)
def _digest_of_clouds(clouds: LabelledClouds) -> str:
    return clouds.digest()


@functools.lru_cache(maxsize=16)
def _code(*modules: str) -> str:
    return code_digest(modules)


@functools.lru_cache(maxsize=4)
def _environment(device: str) -> str:
    """Versions, and the kind of device, on which rounding depends."""
    return digest(versions(), torch.device(device).type)


def forget() -> None:
    """Forgets defences, victims and digests, which may have changed since the last run of this process."""
    for kept in (
        _victim,
        _defence,
        _varies,
        _digest_of_victim,
        _digest_of_defence,
        _digest_of_attack,
        _digest_of_clouds,
        _code,
        _environment,
    ):
        kept.cache_clear()


def code_of(model: Any) -> str:
    """Digest of the code of a model and its parts, except for torch."""
    parts = model.modules() if isinstance(model, nn.Module) else [model]
    names = {type(part).__module__ for part in parts}
    return code_digest(name for name in names if name.partition(".")[0] != "torch")
