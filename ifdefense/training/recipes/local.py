"""``ifdefense train local``: from surfaces to a local occupancy network with its model card."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from ifdefense.console import reported
from ifdefense.implicit.local import LocalConfig, LocalOccupancyNetwork
from ifdefense.training.commands import mix_of, options_of, run_options, surfaces_per_class
from ifdefense.training.data.attacked_clouds import AttackedClouds
from ifdefense.training.data.surfaces import SOURCES, collect, mixed
from ifdefense.training.examples.thickened_surfaces import ThickenedOptions, ThickenedSampler
from ifdefense.training.fit import TrainOptions
from ifdefense.training.recipes.implicit import Material, Recipe, train_implicit

POINTS = 1024
"""Largest number of encoded points, slightly more than in any example; larger clouds are subsampled."""

VALIDATED = 96
"""Held-out surfaces for choosing the weights by IoU."""

DEFAULTS = TrainOptions(
    steps=13000,
    muon_lr=6e-3,
    adam_lr=6e-4,
    weight_decay=0.01,
    adam_decay=0.01,
    adam_beta2=0.99,
    warmup=300,
    cooldown=0.75,
    bfloat16=True,
    ema=0.999,
)


def adam_layers(network: LocalOccupancyNetwork) -> list[nn.Module]:
    """Layers trained by Adam: the outermost ones and those of positions, which have rank 3."""
    encoder = network.encoder
    flat = [m for m in network.modules() if isinstance(m, nn.Linear) and m.in_features == 3]
    return [encoder.first, encoder.values, encoder.whole_1, network.decoder.out, *flat]


@click.command("local")
@click.option(
    "--mix",
    multiple=True,
    callback=mix_of(SOURCES, {"procedural": 1.0}),
    help="NAME=WEIGHT of a source: meshes, furniture, procedural or modelnet40.",
)
@run_options("local", "cache/surfaces", DEFAULTS, every=500)
@click.option(
    "--teacher",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Weights that label ModelNet40's training clouds.",
)
@click.option(
    "--teacher-clouds",
    type=click.IntRange(min=1),
    default=1179,
    show_default=True,
    help="Clouds that the teacher tries, rare classes first.",
)
@click.option(
    "--attacked",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Attacked clouds of the sources, as ifdefense-bench attacked-set writes them.",
)
@click.option(
    "--attacked-share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.6,
    show_default=True,
    help="Share of the examples that are attacked clouds, if there are any.",
)
@options_of(ThickenedOptions, batch_size="Clouds per step.", queries="Queries per cloud.")
@options_of(
    DEFAULTS,
    weight_decay="Of all parameters.",
    warmup="Steps of linear warm-up.",
    ema="Decay of the average of the weights.",
)
@click.option(
    "--bfloat16/--float32",
    default=DEFAULTS.bfloat16,
    show_default=True,
    help="Precision of the products in training.",
)
@options_of(
    LocalConfig(),
    width="Features per point.",
    coarse="Features per coarse point; a multiple of 4.",
    values="Size of a point's affine map; a multiple of 6.",
    hidden="Width of the decoder.",
)
@surfaces_per_class
@reported()
def train_command(
    mix: dict[str, float],
    root: str | None,
    cache: Path,
    teacher: Path | None,
    teacher_clouds: int,
    attacked: Path | None,
    attacked_share: float,
    batch_size: int,
    queries: int,
    weight_decay: float,
    width: int,
    coarse: int,
    values: int,
    hidden: int,
    per_class: int,
    device: torch.device,
    **settings: Any,
) -> None:
    """Trains a local occupancy network.

    Validation shapes are held-out meshes, furniture and procedural solids. ModelNet40's clouds have no
    surfaces; they are extracted by an earlier network, --teacher. A run can only be resumed with the same
    options, except for more steps.
    """
    sampling = ThickenedOptions(batch_size=batch_size, queries=queries)
    config = LocalConfig(width=width, coarse=coarse, values=values, hidden=hidden)
    if ("modelnet40" in mix) != (teacher is not None):
        raise ValueError("--mix modelnet40 and --teacher are given together or not at all")
    if set(mix) == {"modelnet40"}:
        raise ValueError("the mix needs a second source: of modelnet40 no surface is held out for validation")

    def material(_: int) -> Material:
        sources = {
            name: collect(name, root, cache, per_class, teacher, teacher_clouds, device) for name in mix
        }
        examples = ThickenedSampler(
            sources,
            sampling,
            mix=mix,
            attacked=AttackedClouds.load(attacked) if attacked is not None else None,
            attacked_share=attacked_share if attacked is not None else 0.0,
        )
        scores = " at queries near the surface and anywhere: {clean:.3f} (clean input), "
        scores += "{corrupted:.3f} (corrupted input)"
        if attacked is not None:
            scores += ", {attacked:.3f} (attacked input)"
        return Material(
            examples, examples.validation(VALIDATED), mixed(mix, sources), scores, shapes=examples
        )

    recipe = Recipe(
        "local",
        config,
        lambda calibration: LocalOccupancyNetwork(config, calibration),
        adam_layers,
        "Local occupancy network, one code per point",
        f"logistic of width {sampling.softness} in the distance from the surface, 0.5 at {sampling.offset}",
        sampling.box,
        sampling.offset,
        POINTS,
    )
    # The loss is summed over the queries, so this clips the gradient of the mean to norm 1.
    defaults = dataclasses.replace(
        DEFAULTS, weight_decay=weight_decay, adam_decay=weight_decay, max_norm=float(queries)
    )
    train_implicit(recipe, material, defaults, device=device, **settings)
