"""What the recipes of implicit networks share: from options and data to weights with a model card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from ifdefense.implicit.base import Calibration
from ifdefense.training.chamfer import ValidationShapes, chamfer_l1
from ifdefense.training.commands import prepare
from ifdefense.training.fit import Batch, Examples, Loss, TrainOptions, fit, likelihood_loss

SECOND_THRESHOLD = 0.2
"""Level at which the field is read where there is no surface at the first; thin shapes may need it."""

MEASURED = 64
"""Validation shapes whose Chamfer distance goes into the model card."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A network to train.

    Attributes:
        kind: its name in `ifdefense.implicit.base.NETWORKS`.
        config: dataclass of its sizes.
        create: makes it.
        adam_layers: its first and last layers, whose matrices Adam trains.
        title: name and paper, for the model card.
        label: what a query's label says, for the model card.
        box: side of the cube of the queries, unit cube.
        offset: thickening in the labels, unit cube.
        points: points that are encoded at most; ``None`` for all.
    """

    kind: str
    config: Any
    create: Callable[[Calibration], Any]
    adam_layers: Callable[[Any], Iterable[nn.Module | None]]
    title: str
    label: str
    box: float
    offset: float
    points: int | None


@dataclasses.dataclass(frozen=True)
class Material:
    """What a network learns from.

    Attributes:
        examples: training batches.
        validation: batches by name.
        data: sources and sizes, for the model card.
        scores: the validation scores in words, with their names in braces.
        settings: what else determines the result.
        shapes: source of the shapes whose Chamfer distance is measured, if it is.
    """

    examples: Examples
    validation: Mapping[str, Sequence[Batch]]
    data: str
    scores: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shapes: ValidationShapes | None = None


def train_implicit(
    recipe: Recipe,
    material: Callable[[int], Material],
    defaults: TrainOptions | None = None,
    *,
    folder: Path,
    out: Path | None,
    force: bool,
    init: Path | None,
    every: int,
    device: torch.device,
    progress: bool,
    loss: Loss = likelihood_loss,
    **settings: Any,
) -> None:
    """Trains a network and writes its weights; the body of the commands, with the options of `run_options`.

    Args:
        recipe: the network.
        material: collects what it learns from, given the seed, once the network is made.
        defaults: of ``settings``.
        folder: of the run.
        out: where the weights go.
        force: whether ``out`` may be replaced.
        init: weights to start from.
        every: steps between validations.
        device: of the network.
        progress: show a bar.
        loss: what is minimised.
        settings: of `TrainOptions`.
    """
    options = dataclasses.replace(defaults or TrainOptions(), **settings)
    prepare(out, force, folder)
    calibration = Calibration(recipe.box, options.threshold, SECOND_THRESHOLD, recipe.offset, recipe.points)
    torch.manual_seed(options.seed)
    network = recipe.create(calibration).to(device)
    given = material(options.seed)
    config = dataclasses.asdict(recipe.config)
    run = fit(
        network,
        given.examples,
        given.validation,
        folder,
        options,
        settings={"network": config, **given.settings},
        adam_layers=[layer for layer in recipe.adam_layers(network) if layer is not None],
        every=every,
        init=init,
        metadata={"network": recipe.kind, "config": json.dumps(config), **calibration.metadata()},
        progress=progress,
        loss=loss,
    )
    lines = [f"data: {given.data}", f"validation IoU{given.scores.format(**run.best)}"]
    if given.shapes is None:
        click.echo(lines[-1])
    else:
        distance = chamfer_l1(network, given.shapes, MEASURED, device=device)
        clean, corrupted = f"{distance['clean']:.3f}", f"{distance['corrupted']:.3f}"
        click.echo(f"validation Chamfer-L1: {clean} (clean), {corrupted} (corrupted)")
        lines.append(
            f"validation Chamfer-L1, tenths of the longest side: {clean} (clean input), {corrupted} "
            f"(corrupted input); no surface for {distance['missing']:.0%}"
        )
    lines.append(f"frame: unit cube; label: {recipe.label}; threshold {calibration.threshold}")
    if out is not None:
        size = sum(parameter.numel() for parameter in network.parameters())
        run.export(out, "ifdefense", f"{recipe.title}, {size:,} parameters, trained here.", lines)
