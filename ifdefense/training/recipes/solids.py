"""What the recipes of `onet` and `convonet` share: they learn the solids behind corrupted clouds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import click
from torch import nn

from ifdefense.geometry.axes import AXES, UP
from ifdefense.implicit.base import Calibration
from ifdefense.training.commands import Command, mix_of, options_of, with_options
from ifdefense.training.data.solid_sources import FOLDER, SOURCES, Labels, SolidSources
from ifdefense.training.data.solids import OFFSET
from ifdefense.training.examples.occupancy import OccupancySampler, SamplingOptions
from ifdefense.training.fit import TrainOptions
from ifdefense.training.recipes.implicit import Material, Recipe, train_implicit


def shape_options(sampling: SamplingOptions) -> Callable[[Command], Command]:
    """Options of the networks that learn from these shapes, beside `run_options`."""
    options = (
        click.option(
            "--mix",
            multiple=True,
            callback=mix_of(SOURCES, {}),
            help="NAME=WEIGHT of a source: modelnet40, meshes, procedural or points.  [default: points with "
            "--from-points, else procedural]",
        ),
        click.option(
            "--from-points",
            "clouds",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="Folder of clouds without meshes, the source points; every tenth cloud validates.",
        ),
        click.option(
            "--up",
            type=click.Choice(AXES),
            default=UP,
            show_default=True,
            help="Up axis of the clouds of --from-points; the network is trained on them z up.",
        ),
        click.option(
            "--labels",
            type=click.Choice(get_args(Labels)),
            default="local",
            show_default=True,
            help="Source of the solid behind a cloud: the local network, or planes and rays.",
        ),
        options_of(sampling, batch_size="Clouds per step.", queries="Queries per cloud."),
        options_of(TrainOptions, weight_decay="Of Muon's matrices."),
        click.option(
            "--per-class",
            type=click.IntRange(min=1),
            default=100,
            show_default=True,
            help="Procedural shapes per class.",
        ),
    )
    return with_options(*options)


def train_on_solids(
    kind: str,
    config: Any,
    create: Callable[[Calibration], Any],
    adam_layers: Callable[[Any], Iterable[nn.Module | None]],
    title: str,
    sampling: SamplingOptions,
    *,
    mix: dict[str, float],
    root: str | None,
    clouds: Path | None,
    up: str,
    labels: Labels,
    cache: Path,
    per_class: int,
    **settings: Any,
) -> None:
    """Trains a network and writes its weights.

    Args:
        kind: see `Recipe`, like the next four.
        config: dataclass of its sizes.
        create: makes it.
        adam_layers: its first and last layers.
        title: name and paper.
        sampling: how examples are drawn.
        mix: weights of the sources.
        root: data folder.
        clouds: folder of clouds, the source ``"points"``.
        up: up axis of these clouds.
        labels: source of the solid behind a cloud.
        cache: folder of the prepared shapes.
        per_class: procedural shapes per class.
        settings: of `train_implicit`.
    """
    mix = mix or {"procedural" if clouds is None else FOLDER: 1.0}
    if (FOLDER in mix) != (clouds is not None):
        raise ValueError("the source points and --from-points FOLDER belong together")

    def material(seed: int) -> Material:
        sources = SolidSources(mix, root, clouds, labels, cache, per_class, seed, up)
        data = sources.train()
        examples = OccupancySampler(data, sampling, mix)
        held = OccupancySampler(sources.validation(), sampling)
        names = ", ".join(f"{name} (weight {weight:g})" for name, weight in mix.items())
        taught = f"; solids behind clouds: {labels}" if {"modelnet40", FOLDER} & set(mix) else ""
        return Material(
            examples,
            held.validation(256),
            f"{names}; {len(data)} shapes{taught}",
            ": {clean:.3f} (clean input), {corrupted:.3f} (corrupted input)",
            {"validation": held.digest},
            held,
        )

    label = f"inside the solid thickened by {OFFSET}"
    recipe = Recipe(kind, config, create, adam_layers, title, label, sampling.box, OFFSET, sampling.points)
    train_implicit(recipe, material, **settings)
