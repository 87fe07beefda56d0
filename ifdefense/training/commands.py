"""Shared by the training commands: options, one-line errors, and checks of output paths."""

from __future__ import annotations

import logging
import math
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import click

from ifdefense.console import device_option
from ifdefense.training.fit import TrainOptions
from ifdefense.training.runs import RunError


def check_output(path: Path, force: bool = False) -> None:
    """Checks that weights can be written, before training.

    Raises:
        RunError: if the suffix is not ``.safetensors``, the file exists and ``force`` is not given,
            or its folder cannot be written.
    """
    if path.suffix != ".safetensors":
        raise RunError(f"{path}: weights are written as .safetensors")
    if path.is_dir():
        raise RunError(f"{path} is a folder")
    if path.exists() and not force:
        raise RunError(f"{path} exists already; --force replaces it")
    check_writable(path.parent)


def check_writable(folder: Path) -> None:
    """Creates a folder, and checks that files can be written in it.

    Raises:
        RunError: if it is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror}") from None


Command = Callable[..., None]


def with_options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """A decorator that adds options to a command, in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def options_of(settings: object, **helps: str) -> Callable[[Command], Command]:
    """Options for fields of a dataclass, with their names, types and defaults.

    Args:
        settings: the dataclass, or an instance with other defaults. A bool becomes ``--name/--no-name``.
        helps: help texts by field name.
    """
    options = []
    for field, text in helps.items():
        default, name = getattr(settings, field), field.replace("_", "-")
        flag = f"--{name}/--no-{name}" if isinstance(default, bool) else f"--{name}"
        options.append(click.option(flag, field, default=default, show_default=True, help=text))
    return with_options(*options)


def output_options(folder: Path | None) -> Callable[[Command], Command]:
    """Options shared by all trainings: ``folder`` of the run, ``out``, ``force``, ``progress``.

    Args:
        folder: default folder of the run; required if ``None``.
    """
    path = click.Path(path_type=Path)
    options = (
        click.option(
            "--run",
            "folder",
            type=path,
            default=folder,
            required=folder is None,
            show_default=folder is not None,
            help="Folder of the run; an interrupted one is resumed.",
        ),
        click.option("--out", type=path, help="File of the weights (.safetensors), with a model card."),
        click.option("--force", is_flag=True, help="Replace OUT if it exists."),
        click.option(
            "--progress/--no-progress",
            default=None,
            callback=lambda _, __, value: sys.stderr.isatty() if value is None else value,
            help="Show a bar; by default on a terminal.",
        ),
    )
    return with_options(*options)


surfaces_per_class = click.option(
    "--per-class",
    type=click.IntRange(min=5),
    default=60,
    show_default=True,
    help="Procedural shapes per class.",
)
"""Option of trainings on surfaces, some of which are held out per class."""


def prepare(out: Path | None, force: bool, folder: Path) -> None:
    """Sets up logging, and checks that the run folder and the weights can be written.

    Raises:
        RunError: as `check_output` and `check_writable`.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("ifdefense.training").setLevel(logging.INFO)  # `ifdefense` shows warnings only
    if out is not None:
        check_output(out, force)
    check_writable(folder)


def run_options(name: str, cache: str, defaults: TrainOptions, every: int) -> Callable[[Command], Command]:
    """Options shared by the trainings of implicit networks: data, run, weights, schedule, device.

    Args:
        name: name of the network; the default run folder is ``runs/NAME``.
        cache: folder of the prepared data.
        defaults: settings of the trainer.
        every: steps between validations.
    """
    path = click.Path(path_type=Path)
    positive = click.IntRange(min=1)
    options = (
        click.option("--data", "root", type=click.Path(), help="Data folder; IFDEFENSE_DATA by default."),
        click.option("--cache", type=path, default=Path(cache), show_default=True),
        output_options(Path("runs") / name),
        click.option("--init", type=click.Path(exists=True, path_type=Path), help="Weights to start from."),
        options_of(
            defaults,
            steps="Optimiser steps.",
            muon_lr="Learning rate of Muon.",
            adam_lr="Learning rate of Adam.",
            cooldown="Share of the steps with a falling rate.",
        ),
        click.option(
            "--every", type=positive, default=every, show_default=True, help="Steps between validations."
        ),
        click.option("--seed", type=click.IntRange(min=0), default=defaults.seed, show_default=True),
        device_option,
    )
    return with_options(*options)


def mix_of(
    sources: Collection[str], default: Mapping[str, float]
) -> Callable[[click.Context, click.Parameter, tuple[str, ...]], dict[str, float]]:
    """Callback of a repeated option ``NAME=WEIGHT``; the default weight is 1.

    Args:
        sources: allowed names.
        default: default mix.
    """

    def parse(
        context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
    ) -> dict[str, float]:
        mix: dict[str, float] = {}
        for value in values:
            name, _, weight = value.partition("=")
            if name not in sources:
                raise click.BadParameter(f"{name!r} is not one of {', '.join(sources)}")
            if name in mix:
                raise click.BadParameter(f"{name} is given twice")
            try:
                mix[name] = float(weight or 1)
            except ValueError:
                raise click.BadParameter(f"{weight!r} is not a number") from None
            if not 0 < mix[name] < math.inf:
                raise click.BadParameter(f"the weight of {name} must be positive, got {weight}")
        return mix or dict(default)

    return parse
