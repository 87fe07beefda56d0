"""What training runs keep: checkpoints that a stopped one goes on from, and a card of what was made."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a checkpoint in one step: whoever stops the run finds the old one or the new one."""
    partial = path.with_suffix(".partial")
    torch.save(dict(state), partial)
    os.replace(partial, path)


class EpochRun:
    """A run in epochs that can be stopped after any of them and goes on as if it had not been.

    A subclass trains, and calls `keep` after every epoch.

    Args:
        model: network to train, changed in place.
        optimiser: of its parameters.
        schedule: of the learning rate.
        settings: the options as text; a folder is only gone on from with the same ones.
        seed: of the generator.
        folder: where ``last.pt`` goes; made where it is missing.
    """

    def __init__(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        settings: str,
        seed: int,
        folder: Path,
    ) -> None:
        self.model, self.optimiser, self.schedule = model, optimiser, schedule
        self.settings, self.folder = settings, folder
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch = 0
        self.best: dict[str, float] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> bool:
        """Goes back to the last finished epoch in the folder; returns whether there was one.

        Raises:
            ValueError: if the folder holds a run with other settings.
        """
        path = self.folder / "last.pt"
        if not path.is_file():
            return False
        state = torch.load(path, weights_only=True)
        if state["options"] != self.settings:
            raise ValueError(f"{path} belongs to a run with other options: {state['options']}")
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["dropout"])
        self.epoch, self.best = state["epoch"], state["best"]
        return True

    def keep(self) -> None:
        """Writes ``last.pt``."""
        state = {
            "options": self.settings,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "dropout": torch.get_rng_state(),
            "epoch": self.epoch,
            "best": self.best,
        }
        save_state(self.folder / "last.pt", state)


def write_card(
    weights: Path, module: str, about: str, settings: str, data: str, lines: Sequence[str]
) -> None:
    """Writes a model card beside exported weights, with the command line of this process.

    Args:
        weights: the file of weights; the card has its name and the ending ``.md``.
        module: module that was run with ``python -m``.
        about: what the network is, and from what to what.
        settings: the options as text.
        data: the data set and how much of it.
        lines: what was measured.
    """
    items = [
        f"data: {data}",
        f"command: `python -m {module} {shlex.join(sys.argv[1:])}`",
        f"settings: `{settings}`",
        f"trained: {datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}",
        *lines,
    ]
    text = "\n".join([f"# {weights.stem}", "", about, "", *(f"* {item}" for item in items)])
    weights.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
