"""Generative, voxel and image Occupancy Networks: ``ifdefense train generative|voxel|image``.

All are trained on procedural solids, see `ifdefense.reconstruction.examples`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from torch import nn

from ifdefense.console import reported
from ifdefense.implicit.base import Calibration
from ifdefense.implicit.occupancy import ConditionalDecoder
from ifdefense.reconstruction.conditions import ConditionConfig, ImageNetwork, VoxelNetwork
from ifdefense.reconstruction.examples import (
    HELD_PER_CLASS,
    VIEWS,
    Images,
    ImageSampler,
    PairSampler,
    QueryOptions,
    SolidSampler,
    VoxelSampler,
    render_procedural,
    solids,
)
from ifdefense.reconstruction.generative import (
    GenerativeConfig,
    GenerativeOccupancyNetwork,
    generative_loss,
)
from ifdefense.shapes.procedural import CLASSES
from ifdefense.training.commands import (
    Command,
    options_of,
    run_options,
    with_options,
)
from ifdefense.training.data.cache import cached_set
from ifdefense.training.data.solids import BOX, OccupancySet
from ifdefense.training.fit import TrainOptions
from ifdefense.training.recipes.implicit import Material, Recipe, train_implicit


def condition_options(defaults: QueryOptions, frequencies: int) -> Callable[[Command], Command]:
    """Options of these networks, beside `run_options`."""
    positive = click.IntRange(min=1)
    options = (
        options_of(defaults, batch_size="Solids per step.", queries="Queries per solid."),
        click.option(
            "--per-class",
            type=positive,
            default=100,
            show_default=True,
            help="Training solids of each class.",
        ),
        options_of(TrainOptions, weight_decay="Of Muon's matrices."),
        options_of(defaults, offset="Thickening of the solid that is learned, unit cube."),
        options_of(TrainOptions, threshold="Probability at the surface."),
        click.option(
            "--frequencies",
            default=frequencies,
            show_default=True,
            help="Octaves of the positional encoding, 0 for none.",
        ),
    )
    return with_options(*options)


def train_conditioned(
    kind: str,
    config: Any,
    create: Callable[[Calibration], Any],
    adam_layers: Callable[[Any], Iterable[nn.Module | None]],
    title: str,
    sampler: Callable[[OccupancySet, int, int], SolidSampler],
    offset: float,
    *,
    cache: Path,
    per_class: int,
    root: str | None,
    more: dict[str, Any] | None = None,
    **settings: Any,
) -> None:
    """Trains a network on procedural solids and writes its weights.

    Args:
        kind: see `ifdefense.training.recipes.implicit.Recipe`, like the next four.
        config: dataclass of its sizes.
        create: makes it.
        adam_layers: its first and last layers.
        title: name and paper.
        sampler: creates the examples, given the number of solids per class and their seed.
        offset: thickening of the solid in the labels.
        cache: folder of the prepared solids.
        per_class: training solids of each class.
        root: not used, because the solids are procedural.
        more: further settings that determine the result.
        settings: of `ifdefense.training.recipes.implicit.train_implicit`.
    """

    def material(seed: int) -> Material:
        train, held = solids(cache, per_class, seed)
        validation = sampler(held, HELD_PER_CLASS, seed + 2)
        return Material(
            sampler(train, per_class, seed + 1),
            validation.validation(),
            f"{len(train)} procedural solids of {len(CLASSES)} classes",
            f": {{iou:.3f}}, {len(held)} other solids, uniform queries",
            {"validation": validation.digest, **(more or {})},
        )

    label = f"inside the solid thickened by {offset}"
    recipe = Recipe(kind, config, create, adam_layers, title, label, BOX, offset, None)
    train_implicit(recipe, material, **settings)


GENERATIVE = QueryOptions(offset=0.03)
"""A larger thickening keeps thin parts of sampled shapes connected."""
VOXEL = QueryOptions()
IMAGE = QueryOptions(batch_size=32, queries=256)


@click.command("generative")
@run_options("generative", "cache/occupancy", TrainOptions(), every=250)
@condition_options(GENERATIVE, frequencies=2)
@click.option(
    "--widths",
    nargs=3,
    type=int,
    default=(32, 128, 128),
    show_default=True,
    help="Latent, latent encoder, decoder.",
)
@click.option("--kl", default=1.0, show_default=True, help="Weight of the KL divergence.")
@reported()
def generative_command(
    batch_size: int,
    queries: int,
    frequencies: int,
    offset: float,
    widths: tuple[int, int, int],
    kl: float,
    **settings: Any,
) -> None:
    """Trains a generative Occupancy Network on procedural solids: it draws new ones.

    A run can only be resumed with the same options, except for more steps.
    """
    if not kl >= 0:
        raise ValueError(f"the weight of the KL divergence must not be negative, got {kl}")
    latent, hidden, decoder = widths
    config = GenerativeConfig(0, latent, decoder, frequencies, latent, hidden)
    query = QueryOptions(batch_size, queries, offset=offset)

    def adam_layers(network: GenerativeOccupancyNetwork) -> list[nn.Module | None]:
        encoder = network.encoder_latent
        ends = [encoder.fc_pos, encoder.fc_0, encoder.fc_mean, encoder.fc_logstd]
        return [*ends, *_ends(network.decoder)]

    train_conditioned(
        "generative",
        config,
        lambda calibration: GenerativeOccupancyNetwork(config, calibration),
        adam_layers,
        "Generative Occupancy Network without condition (Mescheder et al., CVPR 2019)",
        lambda data, *_: PairSampler(data, query),
        query.offset,
        loss=functools.partial(generative_loss, weight=kl),
        more={"kl": kl},
        **settings,
    )


@click.command("voxel")
@run_options("voxel", "cache/occupancy", TrainOptions(), every=250)
@condition_options(VOXEL, frequencies=5)
@click.option(
    "--widths",
    nargs=3,
    type=int,
    default=(8, 128, 128),
    show_default=True,
    help="First convolution, code, decoder.",
)
@click.option(
    "--local",
    default=16,
    show_default=True,
    help="Channels of the features of cells; 0 for the code alone, as published.",
)
@reported()
def voxel_command(
    batch_size: int,
    queries: int,
    frequencies: int,
    offset: float,
    widths: tuple[int, int, int],
    local: int,
    **settings: Any,
) -> None:
    """Trains an Occupancy Network conditioned on 32 × 32 × 32 voxels, on procedural solids.

    A run can only be resumed with the same options, except for more steps.
    """
    width, code, decoder = widths
    config = ConditionConfig(width, code, decoder, frequencies, local)
    query = QueryOptions(batch_size, queries, offset=offset)
    train_conditioned(
        "voxel",
        config,
        lambda calibration: VoxelNetwork(config, calibration),
        lambda network: [network.encoder.conv_in, network.encoder.conv_local, *_ends(network.decoder)],
        "Occupancy Network conditioned on voxels (Mescheder et al., CVPR 2019)",
        lambda data, *_: VoxelSampler(data, query),
        query.offset,
        **settings,
    )


@click.command("image")
@run_options("image", "cache/occupancy", TrainOptions(), every=250)
@condition_options(IMAGE, frequencies=5)
@click.option(
    "--widths",
    nargs=3,
    type=int,
    default=(16, 128, 128),
    show_default=True,
    help="First convolution, code, decoder.",
)
@click.option("--size", type=click.IntRange(min=32), default=64, show_default=True, help="Pixels per side.")
@click.option(
    "--views", type=click.IntRange(min=1), default=VIEWS, show_default=True, help="Images of each solid."
)
@reported()
def image_command(
    batch_size: int,
    queries: int,
    frequencies: int,
    offset: float,
    widths: tuple[int, int, int],
    size: int,
    views: int,
    **settings: Any,
) -> None:
    """Trains an Occupancy Network conditioned on one rendered image, on procedural solids.

    A run can only be resumed with the same options, except for more steps.
    """
    width, code, decoder = widths
    config = ConditionConfig(width, code, decoder, frequencies)
    query = QueryOptions(batch_size, queries, offset=offset)
    cache: Path = settings["cache"]

    def sampler(data: OccupancySet, per_class: int, seed: int) -> ImageSampler:
        wanted = {"per_class": per_class, "seed": seed, "views": views, "size": size}
        name = f"images-{seed}"
        return ImageSampler(
            data,
            query,
            cached_set(
                cache / name, lambda: render_procedural(per_class, seed, views, size), Images.load, wanted
            ).values,
        )

    train_conditioned(
        "image",
        config,
        lambda calibration: ImageNetwork(config, calibration),
        lambda network: [network.encoder.features.conv1, *_ends(network.decoder)],
        "Occupancy Network conditioned on an image (Mescheder et al., CVPR 2019)",
        sampler,
        query.offset,
        **settings,
    )


def _ends(decoder: ConditionalDecoder) -> list[nn.Module | None]:
    """The first and last layers of a decoder."""
    return [decoder.fc_z, decoder.fc_p, decoder.fc_out]
