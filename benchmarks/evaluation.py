"""An honest number for a defence: the grid of a suite, computed and summarised.

A run has the rows of the undefended victim and of two simple filters beside those of the defence, on the
same clouds. ``static`` is the mean over attacks that know the classifier alone, ``adaptive`` the worst per
cloud over attacks that know the defence, ``worst`` the worst per cloud over all of them and the clean cloud.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import result_files, statistics
from benchmarks.attacked_clouds import AttackedFile, read_attacked
from benchmarks.cells import BASELINES, BLOCK, CORRUPTION, FILE, NO_DEFENCE, Cell, grid
from benchmarks.certified import certified
from benchmarks.clouds import PROCEDURAL, LabelledClouds, load_clouds
from benchmarks.executors import EXECUTORS, Executor, Failure
from benchmarks.flags import WEAK, at_chance, flags
from benchmarks.foreign import Victim, defence_of, model_of, shipped_victims, victim_of
from benchmarks.shards import Arrays, Store, Task, forget
from benchmarks.suite import IF_DEFENSE, RECENT, SUITE, SUITES, Suite
from benchmarks.text_tables import text_table
from ifdefense.console import meant
from ifdefense.provenance import digest, versions

FORMAT = 1
"""Version of the JSON."""

MOST = 2468
"""Most clouds that a budget in minutes picks: the test part of ModelNet40."""

MODELNET40_VICTIMS = (
    "pointnet-modelnet40",
    "pointnet-modelnet40-hybrid",
    "dgcnn-modelnet40-hybrid",
    "dgcnn-modelnet40-adversarial",
)
CERTIFIED = 100
"""Most clouds of a certificate."""

ALL = "all"
CORRUPTED, FROM_FILE = CORRUPTION.removesuffix(":"), FILE.removesuffix(":")
PROBE = "probe"
_LOG = logging.getLogger(__name__)
Json = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What `evaluate` found.

    Attributes:
        data: all of it, as written to JSON.
        failures: shards that could not be computed; their cells have fewer clouds or are missing.
    """

    data: Json
    failures: Sequence[Failure] = ()

    @property
    def name(self) -> str:
        """The defence, or the model that contains it."""
        return str(self.data["name"])

    @property
    def cells(self) -> list[Json]:
        """Accuracy and settings of every cell."""
        return list(self.data["cells"])

    @property
    def figures(self) -> list[Json]:
        """Clean, static, adaptive and worst accuracy per victim, defence and family of threat models."""
        return list(self.data["figures"])

    @property
    def flags(self) -> list[str]:
        """Names of what makes the figures unreliable; empty is good."""
        raised = [flag["name"] for flag in self.data["flags"] if flag["defence"] == self.data["row"]]
        return list(dict.fromkeys(raised))

    @property
    def headline(self) -> Json:
        """The figures of the defence over all attacks, with the victim on which its worst is lowest.

        Without attacks, those on corrupted clouds or on the clouds of a file, which have no worst.
        """
        own = [one for one in self._shown if one["defence"] == self.data["row"]]
        if not own:
            reasons = "; ".join(map(str, self.failures)) or "no cells"
            raise ValueError(f"{self.name} has no figures: {reasons}")
        return min(own, key=lambda one: _value(one["worst"]))

    @property
    def _shown(self) -> list[Json]:
        """Figures over all attacks, or of the first family if there are none."""
        families = [one["family"] for one in self.figures]
        return [one for one in self.figures if one["family"] == (ALL if ALL in families else families[0])]

    @property
    def clean(self) -> float:
        """Accuracy on clean clouds in %."""
        return _value(self.headline["clean"])

    @property
    def static(self) -> float:
        """Mean accuracy under attacks that know the classifier alone, in %; NaN without a strong one."""
        return _value(self.headline["static"])

    @property
    def adaptive(self) -> float:
        """Accuracy under the worst attack per cloud of those that know the defence, in %."""
        return _value(self.headline["adaptive"])

    @property
    def worst(self) -> float:
        """Accuracy under the worst per cloud of all attacks and the clean cloud, in %."""
        return _value(self.headline["worst"])

    def in_words(self) -> str:
        """The headline as a sentence."""
        one = self.headline
        return (
            f"{self.name}: worst of {one['attacks']} attacks per cloud: {one['worst']['accuracy']:.1f} ± "
            f"{one['worst']['error']:.1f}% (not an average), {one['clouds']} clouds, {one['victim']}"
        )

    def text(self) -> str:
        """A short table of all victims and defences, and the headline."""
        lines = [
            [
                f"{one['victim']}, {one['defence']}",
                *(_shown(one[figure]) for figure in ("clean", "static", "adaptive", "worst")),
            ]
            for one in self._shown
        ]
        header = ["accuracy in %", "clean", "static, mean", "adaptive, worst", "worst of all"]
        raised = [
            f"flag {flag['name']}, {flag['victim']}: {flag['says']}"
            for flag in self.data["flags"]
            if flag["defence"] == self.data["row"]
        ]
        attacked = any(one["defence"] == self.data["row"] and one["worst"] is not None for one in self._shown)
        return "\n".join([text_table(header, lines), *raised, *([self.in_words()] if attacked else [])])

    def to_json(self, path: str | Path | None = None) -> str:
        """The result as JSON, also written to a file if there is a path."""
        if path is not None:
            result_files.write_json(Path(path), self.data)
        return json.dumps(self.data, indent=1, ensure_ascii=False)

    def to_html(self, path: str | Path) -> None:
        """Writes the result as one self-contained page."""
        from benchmarks import report

        report.write_page(self.data, Path(path))


def evaluate(
    *,
    defence: Any = None,
    victim: Any = None,
    model: Any = None,
    data: str | LabelledClouds | None = None,
    suite: str | Suite = "quick",
    clouds: int | None = None,
    minutes: float | None = None,
    attacked: str | Path | None = None,
    seed: int = 0,
    store: str | Path | None = None,
    executor: str | Executor = "serial",
    device: str | torch.device = "cpu",
    certificates: bool = False,
    progress: bool = False,
) -> Result:
    """Measures a defence, or a model that contains one.

    Args:
        defence: a purifier, a module, a function from ``(B, N, 3)`` to ``(B, M, 3)``, a class, the name of a
            method, or ``"module:name"`` or ``"file.py:name"``; see `benchmarks.foreign`. Without one, the
            victim alone is measured.
        victim: a classifier or a list of them: a module, or a name, as for defences also ``"NETWORK:FILE"``.
            By default the shipped ones for the data.
        model: a classifier that contains its defence, instead of a defence and a victim.
        data: name of a data set, a folder or a file, see `benchmarks.clouds`; procedural by default.
        suite: ``"quick"``, ``"standard"``, ``"full"``, or another choice of attacks.
        clouds: clouds of every cell, instead of the suite's numbers.
        minutes: time to spend, instead of a number of clouds, which is picked by the time of the first block.
        attacked: file of attacked clouds, see `benchmarks.attacked_clouds`, on which the defence is scored
            instead of attacking it. The victim is by default the one that was attacked.
        seed: seed of the choice of clouds, the targets and the attacks.
        store: folder of finished shards, from which a run resumes; by default a temporary one.
        executor: ``"serial"``, ``"processes"``, ``"ray"``, or a function as in `benchmarks.executors`.
        device: device to compute on.
        certificates: whether to add the certified accuracy of a vote around each victim, see
            `benchmarks.certified`; computed anew by every run.
        progress: whether to show a progress bar.

    Raises:
        ValueError: for an unknown name, or arguments that do not go together.
        StoreError: if a shard cannot be written.
    """
    if isinstance(suite, str):
        if suite not in SUITES:
            raise ValueError(f"unknown suite {suite!r}{meant(suite, SUITES)}; there are {', '.join(SUITES)}")
        suite = SUITES[suite]
    if model is not None and (defence is not None or victim is not None):
        raise ValueError("a model contains its defence: give it without a defence and a victim")
    if clouds is not None and minutes is not None:
        raise ValueError("give a number of clouds or minutes, not both")
    if clouds is not None and clouds < 1:
        raise ValueError(f"clouds must be at least 1, got {clouds}")
    made = None if attacked is None else read_attacked(attacked)
    if made is not None:
        if data is not None or minutes is not None:
            raise ValueError("a file of attacked clouds is the data: give it without other data and minutes")
        data = made.clouds
        title = made.about.get("victim", {}).get("title")
        victim = title if victim is None and model is None and title in shipped_victims() else victim
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if store is None else store
        run = _Run(
            suite=suite,
            data=data if data is not None else PROCEDURAL,
            seed=seed,
            store=Store(Path(folder)),
            executor=_executor(executor),
            device=str(device),
            certificates=certificates,
            progress=progress,
            whats=_victims(victim, model, data),
            model=model is not None,
            what=defence,
            attacked=made,
        )
        return run.result(clouds, minutes)


def _executor(executor: str | Executor) -> Executor:
    if callable(executor):
        return executor
    if executor not in EXECUTORS:
        raise ValueError(
            f"unknown executor {executor!r}{meant(executor, EXECUTORS)}; there are {', '.join(EXECUTORS)}"
        )
    return EXECUTORS[executor]


def _victims(victim: Any, model: Any, data: Any) -> list[Any]:
    if model is not None:
        return [model]
    if victim is not None:
        return list(victim) if isinstance(victim, list | tuple) else [victim]
    name = data.name if isinstance(data, LabelledClouds) else str(data or PROCEDURAL)
    if name.partition(":")[0] in ("modelnet40", "modelnet40-c"):
        return list(MODELNET40_VICTIMS)
    if name == PROCEDURAL:
        return [victim for victim in reversed(shipped_victims()) if victim.endswith("-procedural")]
    raise ValueError(f"no shipped classifier was trained on {name}: give a victim")


@dataclasses.dataclass(eq=False)
class _Run:
    """One run: its tasks, their execution, and the summary."""

    suite: Suite
    data: str | LabelledClouds
    seed: int
    store: Store
    executor: Executor
    device: str
    certificates: bool
    progress: bool
    whats: list[Any]
    model: bool
    what: Any
    attacked: AttackedFile | None = None

    def __post_init__(self) -> None:
        forget()
        find, device = model_of if self.model else victim_of, torch.device(self.device)
        found = [(find(what, device=device), what) for what in self.whats]
        self.victims: dict[str, Victim] = {victim.title: victim for victim, _ in found}
        self.victim_whats = {victim.title: what for victim, what in found}
        if len(self.victims) < len(found):
            raise ValueError("two victims have the same title")
        self.defence = defence_of(self.what, device=device)
        names = (NO_DEFENCE,) if self.model else BASELINES
        self.defence_whats: dict[str, Any] = {name: name for name in names}
        self.defences: dict[str, Any] = {name: defence_of(name, device=device) for name in names}
        self.row = NO_DEFENCE if self.defence is None else str(getattr(self.defence, "name", self.what))
        if self.row not in self.defences:
            self.defence_whats[self.row] = self.what
            self.defences[self.row] = self.defence
        self.kept: dict[Path, Arrays] = {}
        self.started = time.perf_counter()

    def result(self, clouds: int | None, minutes: float | None) -> Result:
        """Computes what is missing and summarises all."""
        counts = grid(self.suite, self.victims, self.defences)
        if self.attacked is not None:
            source = FILE + self.attacked.clouds.digest()
            each = itertools.product(self.victims, self.defences)
            counts = {Cell(title, source, name): len(self.attacked.clouds) for title, name in each}
        if minutes is not None:
            first = dict.fromkeys(counts, BLOCK)
            labelled = self._clouds(BLOCK)
            tasks = list(self._tasks(first, labelled))
            self._execute(tasks)
            clouds = self._affordable(tasks, minutes)
        if clouds is not None:
            counts = dict.fromkeys(counts, clouds)
        labelled = self._clouds(max(counts.values()))
        if minutes is None and clouds is not None and clouds > len(labelled):
            raise ValueError(f"{labelled.name}: {clouds} clouds are asked for, there are {len(labelled)}")
        counts = {cell: min(count, len(labelled)) for cell, count in counts.items()}
        tasks = list(self._tasks(counts, labelled))
        failures = self._execute(tasks)
        return Result(self._summary(tasks, labelled), failures)

    def _clouds(self, count: int | None) -> LabelledClouds:
        """The first clouds; all with ``None``, and where there are fewer."""
        if isinstance(self.data, LabelledClouds):
            found = self.data[:count]
        elif self.data == PROCEDURAL:
            found = load_clouds(self.data, clouds=count, seed=self.seed)
        else:
            found = load_clouds(self.data, seed=self.seed)[:count]
        for victim in self.victims.values():
            victim.check(found)
        return found

    def _tasks(self, counts: Mapping[Cell, int], labelled: LabelledClouds) -> Iterator[Task]:
        """The scored shards, and one probe of the defence per victim."""
        blocks: dict[tuple[int, int], LabelledClouds] = {}

        def task(kind: Any, cell: Cell, block: int, count: int) -> Task:
            size = min(BLOCK, count - block * BLOCK)
            if (block, size) not in blocks:
                blocks[block, size] = labelled.block(block, BLOCK)[:size]
            known = cell.knowledge.partition(":")[2]
            return Task(
                kind=kind,
                cell=cell,
                block=block,
                clouds=blocks[block, size],
                victim=self.victim_whats[cell.victim],
                defence=self.defence_whats[cell.defence],
                known=self.defence_whats[known] if known else None,
                effort=self.suite.effort,
                seed=self.seed,
                samples=self.suite.samples,
                draws=self.suite.draws,
                device=self.device,
            )

        for cell, count in counts.items():
            for block in range(math.ceil(count / BLOCK)):
                yield task("scored", cell, block, count)
        for title in self.victims if any(cell.source in SUITE for cell in counts) else ():
            yield task("probe", Cell(title, PROBE, self.row), 0, min(BLOCK, *counts.values()))

    def _read(self, task: Task) -> Arrays | None:
        """Arrays of a shard except for clouds, from its file once; ``None`` if it is missing."""
        if task.path not in self.kept:
            names = ("success", "queries", "seconds") if task.kind == "attacked" else ()
            if (arrays := self.store.read(task.path, *names)) is None:
                return None
            arrays.pop("shown", None)
            self.kept[task.path] = arrays
        return self.kept[task.path]

    def _execute(self, tasks: Sequence[Task]) -> list[Failure]:
        """Computes missing shards: first attacked clouds, then their predictions and probes."""
        missing = [task for task in tasks if self._read(task) is None]
        needed = {made.path: made for task in missing if (made := task.attacked) is not None}
        attacks = [task for task in needed.values() if self._read(task) is None]
        with tqdm(
            total=len(attacks) + len(missing), desc="shards", unit="", disable=not self.progress
        ) as bar:
            failures = self.executor(attacks, self.store, report=lambda task: bar.update())
            failed = {failure.task.path for failure in failures}
            possible = [
                task for task in missing if (made := task.attacked) is None or made.path not in failed
            ]
            bar.update(len(missing) - len(possible))
            failures += self.executor(possible, self.store, report=lambda task: bar.update())
        return failures

    def _affordable(self, tasks: Sequence[Task], minutes: float) -> int:
        """Number of clouds that takes the given time, by the seconds stored with the first block."""
        parts = {one.path: one for task in tasks for one in (task, task.attacked) if one is not None}
        found = [arrays for part in parts.values() if (arrays := self._read(part)) is not None]
        seconds = sum(float(one["seconds"]) * len(one.get("predicted", [0])) for one in found)  # of each draw
        blocks = max(1, int(60 * minutes / max(seconds, 1e-3)))
        clouds = min(blocks * BLOCK, MOST)
        _LOG.warning("%g minutes: %d clouds (%.1f minutes for each %d)", minutes, clouds, seconds / 60, BLOCK)
        return clouds

    def _summary(self, every: Sequence[Task], labelled: LabelledClouds) -> Json:
        """The JSON of the result."""
        tasks: dict[Cell, list[Task]] = {}
        for task in every:
            tasks.setdefault(task.cell, []).append(task)
        rights: dict[Cell, Tensor] = {}
        cells = []
        for cell in tasks:
            if cell.source == PROBE:
                continue
            if (measured := self._cell(cell, tasks[cell], labelled)) is not None:
                rights[cell] = measured[0]
                cells.append(measured[1])
        bare = [] if self.model else [one for one in cells if one["defence"] == NO_DEFENCE]
        success = {
            (one["victim"], one["source"]): one["success"] for one in bare if one["success"] is not None
        }
        figures = [
            made
            for victim in self.victims
            for defence in self.defences
            for family in (ALL, RECENT, IF_DEFENSE, CORRUPTED, FROM_FILE)
            if (made := _figures(rights, victim, defence, family, labelled.labels, success)) is not None
        ]
        raised = []
        for cell, (task, *_) in tasks.items():
            if cell.source == PROBE and (arrays := self._read(task)) is not None:
                raised += flags(json.loads(str(arrays["evidence"])), cells)
        if self.model:  # there is nothing without its defence to attack
            raised = [flag for flag in raised if flag["name"] != "weak-attack"]
        for title, victim in self.victims.items():
            raised += at_chance(title, victim.classes, cells)
        spec = getattr(self.defence, "spec", None)
        return {
            "format": FORMAT,
            "name": next(iter(self.victims)) if self.model else self.row,
            "row": self.row,
            "defence": {
                "spec": spec() if callable(spec) else str(self.what),
                "digest": digest(self.defence),
                **{
                    name: bool(getattr(self.defence, name, name == "deterministic"))
                    for name in ("deterministic", "differentiable", "optimises")
                },
            },
            "data": {
                "name": labelled.name,
                "clouds": len(labelled),
                "seed": self.seed,
                "digest": labelled.digest(),
            },
            "suite": self.suite.name,
            "samples": self.suite.samples,
            "date": result_files.today(),
            "machine": result_files.machine(),
            "versions": versions(),
            "minutes": round((time.perf_counter() - self.started) / 60, 2),
            "victims": {title: {"weights": victim.weights} for title, victim in self.victims.items()},
            "figures": figures,
            "differences": _differences(rights, self.row, self.victims, self.defences),
            "cells": cells,
            "flags": raised,
            "certified": self._certified(labelled),
            "examples": self._examples(tasks, labelled),
            "attacked": None if self.attacked is None else self.attacked.about,
        }

    def _certified(self, labelled: LabelledClouds) -> list[Json]:
        """Certificates of the vote around each victim, on the first clouds."""
        few = labelled[:CERTIFIED]
        if not self.certificates:
            return []
        return [certified(victim, few, seed=self.seed) for victim in self.victims.values()]

    def _examples(self, tasks: Mapping[Cell, list[Task]], labelled: LabelledClouds) -> list[Json]:
        """The first clouds of the first victim: clean, attacked as hard as it gets, and purified."""
        title = next(iter(self.victims))
        own = [
            cell
            for cell in tasks
            if (cell.victim, cell.defence) == (title, self.row) and cell.source in SUITE and cell.adaptive
        ]
        found = []
        for cell in own[:1]:
            task = tasks[cell][0]
            scored, clean = (self._read(each) for each in (task, tasks[Cell(title, "clean", self.row)][0]))
            purified = self.store.read(task.path, "shown")
            made = None if task.attacked is None else self.store.read(task.attacked.path, "points")
            if scored is None or clean is None or purified is None or made is None:
                continue
            for index, points in enumerate(purified["shown"]):
                names = [labelled.classes[each["predicted"][0, index]] for each in (clean, scored)]
                found.append(
                    {
                        "victim": title,
                        "title": SUITE[cell.source].title,
                        "label": labelled.classes[labelled.labels[index]],
                        "predicted": dict(zip(("clean", "purified"), names, strict=True)),
                        "clean": _rounded(labelled.points[index]),
                        "attacked": _rounded(made["points"][index]),
                        "purified": _rounded(points),
                    }
                )
        return found

    def _title(self, cell: Cell) -> str:
        if cell.source in SUITE:
            return SUITE[cell.source].title
        return cell.source if self.attacked is None else self.attacked.clouds.name

    def _cell(self, cell: Cell, tasks: list[Task], labelled: LabelledClouds) -> tuple[Tensor, Json] | None:
        """``(D, S)`` whether clouds are right, and the JSON of a cell; of blocks up to the first missing."""
        predicted, seconds = [], []
        success, queries, attack_seconds = [], [], []
        for task in tasks:
            if (scored := self._read(task)) is None:
                break
            predicted.append(torch.from_numpy(scored["predicted"]))
            seconds.append(float(scored["seconds"]))
            if task.attacked is not None and (made := self._read(task.attacked)) is not None:
                success.append(torch.from_numpy(made["success"]))
                queries.append(torch.from_numpy(made["queries"]))
                attack_seconds.append(float(made["seconds"]))
        if not predicted:
            return None
        together = torch.cat(predicted, 1)
        count = together.shape[1]
        labels = labelled.labels[:count]
        right = together == labels
        entry = SUITE.get(cell.source)
        effort = self.suite.effort
        threat = None if entry is None else entry.attack(effort).threat
        return right, {
            **dataclasses.asdict(cell),
            "title": self._title(cell),
            "family": cell.family,
            "draws": len(right),
            **_accuracy(right, labels),
            "success": round(100 * float(torch.cat(success).float().mean()), 2) if success else None,
            "budget": None
            if threat is None
            else {
                "changes": threat.changes,
                "norm": threat.norm,
                "epsilon": threat.epsilon,
                "count": threat.count,
            },
            "settings": None if entry is None else entry.settings(effort),
            "passes": round(float(torch.cat(queries).float().mean()), 1) if queries else 0,
            "milliseconds": round(1000 * sum(seconds) / count, 3),
            "attack_seconds": round(sum(attack_seconds), 3),
            "right": statistics.packed(right),
            "labels_digest": digest(labels),
        }


def _figures(
    rights: Mapping[Cell, Tensor],
    victim: str,
    defence: str,
    family: str,
    labels: Tensor,
    success: Mapping[tuple[str, str], float],
) -> Json | None:
    """The figures of a victim behind a defence, over the attacks of a family."""
    own = {cell: right for cell, right in rights.items() if (cell.victim, cell.defence) == (victim, defence)}
    clean = [right for cell, right in own.items() if cell.source == "clean"]
    attacked = {
        cell: right
        for cell, right in own.items()
        if family == cell.family or (family == ALL and cell.source in SUITE)
    }
    if not attacked or (not clean and family != FROM_FILE):
        return None
    about: Json = {"victim": victim, "defence": defence, "family": family, "attacks": len(attacked)}
    if family in (CORRUPTED, FROM_FILE):  # a mean, as nobody chooses the worst
        mean = _accuracy(torch.cat(_common(attacked.values())), labels)
        first = _accuracy(clean[0], labels) if clean else None
        own_mean = {"clean": first, "static": mean, "adaptive": None, "worst": None}
        return about | {"clouds": mean["clouds"]} | own_mean
    strong = [
        right
        for cell, right in attacked.items()
        if (cell.knowledge == "static" or defence == NO_DEFENCE)
        and success.get((victim, cell.source), 100.0) >= WEAK
    ]
    adaptive = [right for cell, right in attacked.items() if cell.adaptive]
    found: Json = about
    worst = _worst([*clean, *attacked.values()])
    found["clouds"] = worst.shape[1]
    found["clean"] = _accuracy(clean[0], labels)
    # As if attacks were draws: the mean over attacks and clouds, with the error over clouds.
    found["static"] = _accuracy(torch.cat(_common(strong)), labels) if strong else None
    if strong:
        del found["static"]["spread"]
    found["adaptive"] = _accuracy(_worst(adaptive), labels) if adaptive else None
    found["worst"] = _accuracy(worst, labels)
    return found


def _common(rights: Iterable[Tensor]) -> list[Tensor]:
    """Predictions on the clouds that all have, which are the first."""
    rights = list(rights)
    count = min(right.shape[1] for right in rights)
    return [right[:, :count] for right in rights]


def _worst(rights: Iterable[Tensor]) -> Tensor:
    return statistics.worst(_common(rights))


def _accuracy(right: Tensor, labels: Tensor) -> dict[str, float]:
    found = statistics.accuracy(right, labels[: right.shape[1]])
    return {"clouds": right.shape[1]} | {name: round(value, 3) for name, value in found.items()}


def _differences(
    rights: Mapping[Cell, Tensor], row: str, victims: Iterable[str], defences: Iterable[str]
) -> list[Json]:
    """Differences of the worst accuracy between the defence and the others, on the same clouds."""
    found = []
    for victim in victims:
        worst = {}
        for name in defences:
            own = [
                right
                for cell, right in rights.items()
                if (cell.victim, cell.defence) == (victim, name)
                and (cell.source == "clean" or cell.source in SUITE)
            ]
            if own:
                worst[name] = _worst(own)
        for name in worst:
            if row in worst and name != row:
                first, second = _common([worst[row], worst[name]])
                found.append(
                    {"victim": victim, "defence": row, "against": name}
                    | {key: round(value, 3) for key, value in statistics.paired(first, second).items()}
                )
    return found


def _rounded(points: Any) -> list[list[float]]:
    return [[round(float(value), 3) for value in point] for point in points]


def _value(figure: Json | None) -> float:
    return math.nan if figure is None else float(figure["accuracy"])


def _shown(figure: Json | None) -> str:
    return "–" if figure is None else f"{figure['accuracy']:.1f} ± {figure['error']:.1f}"
