"""Occupancy Networks that draw shapes, or see voxels or an image: ``ifdefense train generative|voxel|image``.

All learn from procedural solids, see `ifdefense.reconstruction.examples`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

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
from ifdefense.training.collections import cached_set
from ifdefense.training.commands import (
    Command,
    options_of,
    prepare,
    reported,
    run_options,
    with_options,
)
from ifdefense.training.fit import Loss, TrainOptions, fit, likelihood_loss
from ifdefense.training.occupancies import BOX, OccupancySet

SECOND_THRESHOLD = 0.2
"""Where nothing is inside at the first."""


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
    create: Callable[[Calibration], nn.Module],
    adam_layers: Callable[[Any], Iterable[nn.Module | None]],
    title: str,
    sampler: Callable[[OccupancySet, int, int], SolidSampler],
    offset: float,
    *,
    root: str | None,
    cache: Path,
    folder: Path,
    out: Path | None,
    force: bool,
    init: Path | None,
    per_class: int,
    every: int,
    device: torch.device,
    progress: bool | None,
    loss: Loss = likelihood_loss,
    more: dict[str, Any] | None = None,
    **settings: Any,
) -> None:
    """Trains a network and writes its weights; the body of the commands.

    Args:
        kind: name of the network in `ifdefense.implicit.base.NETWORKS`.
        config: dataclass of its sizes.
        create: makes it.
        adam_layers: its first and last layers.
        title: name and paper, for the model card.
        sampler: makes the source of examples of solids, given how many of each class and their seed.
        offset: thickening of the solid in the labels.
        root: not used, as the solids need no data.
        cache: folder of the prepared solids.
        folder: of the run.
        out: where the weights go.
        force: whether ``out`` may be replaced.
        init: weights to start from.
        per_class: training solids of each class.
        every: steps between validations.
        device: of the network.
        progress: whether to show a bar; by default on a terminal.
        loss: what is minimised.
        more: what else determines the result.
        settings: of `TrainOptions`.
    """
    options = TrainOptions(**settings)
    prepare(out, force, folder)
    torch.manual_seed(options.seed)
    calibration = Calibration(BOX, options.threshold, SECOND_THRESHOLD, offset, None)
    network = create(calibration).to(device)
    train, held = solids(cache, per_class, options.seed)
    validation = sampler(held, HELD_PER_CLASS, options.seed + 2)
    described = dataclasses.asdict(config)
    run = fit(
        network,
        sampler(train, per_class, options.seed + 1),
        validation.validation(),
        folder,
        options,
        settings={"network": described, "validation": validation.digest, **(more or {})},
        adam_layers=[layer for layer in adam_layers(network) if layer is not None],
        every=every,
        init=init,
        metadata={"network": kind, "config": json.dumps(described), **calibration.metadata()},
        progress=sys.stderr.isatty() if progress is None else progress,
        loss=loss,
    )
    click.echo(f"validation IoU: {run.best['iou']:.3f}")
    if out is None:
        return
    lines = [
        f"data: {len(train)} procedural solids of {len(CLASSES)} classes",
        f"validation IoU: {run.best['iou']:.3f}, {len(held)} other solids, uniform queries",
        f"frame: unit cube; label: inside the solid thickened by {offset}; threshold {options.threshold}",
    ]
    size = sum(parameter.numel() for parameter in network.parameters())
    run.export(out, "ifdefense", f"{title}, {size:,} parameters, trained here.", lines)


GENERATIVE = QueryOptions(offset=0.03)
"""Parts of drawn shapes hang together better where thin parts are thicker."""
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

    A run is resumed only with the options it was started with, but for more steps.
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

    A run is resumed only with the options it was started with, but for more steps.
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

    A run is resumed only with the options it was started with, but for more steps.
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
