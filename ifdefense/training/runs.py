"""Resumable training runs, their best weights, and model cards."""

from __future__ import annotations

import copy
import io
import json
import logging
import math
import shlex
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from ifdefense.checkpoints import CheckpointError, load_pickle, load_weights, save_safetensors
from ifdefense.data.formats.files import write_bytes
from ifdefense.devices import device_of_weights, random_state, restore_random_state
from ifdefense.geometry.axes import UP

logger = logging.getLogger(__name__)

FORMAT = 2
"""Format version of ``last.pt``; runs of other versions are refused."""


class RunError(ValueError):
    """A run cannot start or be resumed; the message suggests a remedy."""


class Stateful(Protocol):
    """Part of a run, such as the model, an optimiser or a schedule."""

    def state_dict(self) -> dict[str, Any]:
        """State needed to resume."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Restores a state of `state_dict`."""
        ...


class MovingAverage:
    """Exponential moving average of a network's weights and buffers.

    The decay is smaller at first, to forget the initial weights.

    Args:
        network: network to average; it is copied.
        decay: share of the average that a step keeps, from 0 to below 1.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Updates the average with the current weights; values that are not floating-point are copied."""
        self.steps += 1
        share = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        values = network.state_dict().values()
        for mean, value in zip(self.network.state_dict().values(), values, strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, share)
            else:
                mean.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and the number of steps."""
        return {"network": self.network.state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Restores a state of `state_dict`."""
        self.network.load_state_dict(state_dict["network"])
        self.steps = state_dict["steps"]


class ResumableRun(ABC):
    """A training run that can be interrupted at any time and resumes bit for bit on the same machine.

    After each validation ``last.pt`` holds the state, ``best.safetensors`` the best weights, and
    ``log.jsonl`` one more line. A subclass defines a round of training (`_train`) and validation.

    Args:
        model: network to train, changed in place, on its device.
        parts: other parts with a state, by name: optimisers, schedules.
        settings: all settings that determine the result, as plain values; must be equal to resume a run.
        length: units (`unit`) of the whole run.
        seed: of `generator`.
        folder: folder of the run, created if missing.
        may_change: settings that may differ when a run is resumed.
        metadata: text entries of the exported weights, besides their up axis.
        decay: of a moving average of the weights, which is then validated and exported; 0 for none. `_train`
            calls `update_average` after every step.
    """

    unit: ClassVar[str] = "epoch"
    criterion: ClassVar[str] = "mean"
    """Validation score for choosing the best weights."""
    minimise: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        parts: Mapping[str, Stateful],
        settings: Mapping[str, Any],
        length: int,
        seed: int,
        folder: Path,
        may_change: Collection[str] = (),
        metadata: Mapping[str, str] | None = None,
        decay: float = 0.0,
    ) -> None:
        self.model = model
        self.parts: dict[str, Stateful] = {"model": model, **parts}
        self.average = MovingAverage(model, decay) if decay else None
        if self.average is not None:
            self.parts["average"] = self.average
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.length = length
        self.generator = torch.Generator().manual_seed(seed)
        self.folder = folder
        self.may_change = may_change
        self.metadata = {"up": UP, **(metadata or {})}
        self.position = 0
        self.best: dict[str, float] = {}
        self.changes: list[str] = []

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return device_of_weights(self.model)

    @property
    def evaluated(self) -> nn.Module:
        """Network for validation and export: the moving average if there is one."""
        return self.model if self.average is None else self.average.network

    def update_average(self) -> None:
        """Updates the moving average of the weights, if there is one."""
        if self.average is not None:
            self.average.update(self.model)

    @abstractmethod
    def _train(self, stop: int, progress: bool) -> float:
        """Trains to the next validation, at most to ``stop``; updates `position`, returns the mean loss."""

    @abstractmethod
    def _validate(self) -> dict[str, float]:
        """Validation scores by name, among them `criterion`; empty if this round is not validated."""

    def resume(self) -> bool:
        """Restores the last state in the folder; returns whether there was one.

        Raises:
            RunError: if the state is damaged, or belongs to a run with other settings.
        """
        path = self.folder / "last.pt"
        if not path.is_file():
            return False
        state = self._read(path)
        before = state["settings"]
        changed = [
            name
            for name in sorted(before.keys() | self.settings.keys())
            if before.get(name) != self.settings.get(name)
        ]
        words = [f"{name} was {before.get(name)}, not {self.settings.get(name)}" for name in changed]
        if not set(changed) <= set(self.may_change):
            raise RunError(
                f"{path} belongs to a run with other settings: {'; '.join(words)}. "
                "Resume it with those, or train in another folder"
            )
        if state["position"] > self.length:
            raise RunError(
                f"{path} is from {self.unit} {state['position']}, beyond the {self.length} asked for"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["rng"])
        kind, drawn = state.get("device_rng", ("cpu", None))  # older runs have none
        if kind == self.device.type:
            restore_random_state(self.device, drawn)
        self.position, self.best = state["position"], state["best"]
        self.changes = state["changes"] + [f"from {self.unit} {self.position} on, {word}" for word in words]
        logger.info("resumed %s after %s %d", self.folder, self.unit, self.position)
        return True

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            state = load_pickle(path)
        except CheckpointError as error:
            raise RunError(f"{error}; delete {self.folder} to start over") from None
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise RunError(f"{path} is not of this version; delete {self.folder} to start over")
        return state

    def save(self) -> None:
        """Writes ``last.pt`` atomically.

        Raises:
            DataError: if it cannot be written, as on a full disk; the state before stays.
        """
        state = {
            "format": FORMAT,
            "settings": self.settings,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "generator": self.generator.get_state(),
            "rng": torch.get_rng_state(),
            "device_rng": (self.device.type, random_state(self.device)),
            "position": self.position,
            "best": self.best,
            "changes": self.changes,
        }
        data = io.BytesIO()
        torch.save(state, data)
        write_bytes(self.folder / "last.pt", data.getvalue(), force=True)

    def __call__(self, progress: bool = False, stop_after: int | None = None) -> dict[str, float]:
        """Trains to the end.

        Args:
            progress: show bars.
            stop_after: stop after this number of units, with the state written.

        Returns:
            Validation scores of the best weights, and the `unit` they are from.

        Raises:
            FloatingPointError: if the loss is NaN or infinite; ``last.pt`` keeps the state before.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        stop = self.length if stop_after is None else min(self.length, self.position + stop_after)
        while self.position < stop:
            started = time.perf_counter()
            loss = self._train(stop, progress)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} before {self.unit} {self.position}")
            scores = self._validate()
            if scores and self._is_best(scores[self.criterion]):
                self.best = scores | {self.unit: self.position}
                save_safetensors(self.evaluated, self.folder / "best.safetensors", self.metadata)
            self.save()
            entry = {self.unit: self.position, "loss": float(f"{loss:.5g}")}
            entry |= {name: round(score, 6) for name, score in scores.items()}
            self._log(entry | {"seconds": round(time.perf_counter() - started, 1)})
        return self.best

    def _is_best(self, score: float) -> bool:
        if self.criterion not in self.best:
            return True
        best = self.best[self.criterion]
        return score <= best if self.minimise else score >= best

    def _log(self, entry: Mapping[str, Any]) -> None:
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
        logger.info("%s", entry)

    def load_best(self) -> None:
        """Loads the best weights into the model, which is then in evaluation mode.

        Raises:
            RunError: if there are none yet.
        """
        path = self.folder / "best.safetensors"
        if not path.is_file():
            raise RunError(f"{self.folder} has no validated weights yet")
        load_weights(self.model, path)
        self.model.eval()

    def export(self, path: Path, program: str, about: str, lines: Sequence[str]) -> None:
        """Writes the best weights with a model card beside them, ``.md``.

        Args:
            path: file of the weights, ``.safetensors``.
            program: start of the command line, such as ``python -m classifiers.train``.
            about: description of the network.
            lines: measurements and their data.
        """
        self.load_best()
        save_safetensors(self.model, path, self.metadata)
        items = [
            f"command: `{program} {shlex.join(sys.argv[1:])}`",
            f"settings: `{json.dumps(self.settings)}`",
            *(f"resumed: {change}" for change in self.changes),
            f"weights: those after {self.unit} {self.best[self.unit]} of {self.length}, chosen by validation",
            *lines,
            f"trained: {datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}",
        ]
        text = "\n".join([f"# {path.stem}", "", about, "", *(f"* {item}" for item in items)])
        path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")


def check_ranges(options: object, **limits: tuple[float, float]) -> None:
    """Checks fields of a dataclass against inclusive limits; NaN is rejected.

    Raises:
        ValueError: naming the field.
    """
    for name, (low, high) in limits.items():
        value = getattr(options, name)
        if not low <= value <= high:
            bound = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"{name} must be {bound}, got {value}")
