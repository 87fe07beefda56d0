"""Occupancy Networks that draw shapes, or see voxels or an image: ``ifdefense train generative|voxel|image``.

All learn from procedural solids: the label of a query is inside the thickened solid, as for ``train onet``.
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
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from ifdefense.implicit.base import Calibration
from ifdefense.implicit.conditions import (
    VOXEL_BOX,
    VOXELS,
    ConditionConfig,
    ImageNetwork,
    VoxelNetwork,
    voxel_centres,
)
from ifdefense.implicit.latent import GenerativeConfig, GenerativeOccupancyNetwork, generative_loss
from ifdefense.implicit.occupancy import ConditionalDecoder
from ifdefense.provenance import digest
from ifdefense.shapes.procedural import CLASSES, make_shape
from ifdefense.shapes.rendering import random_cameras, render
from ifdefense.training.collections import cached, cached_set, from_procedural
from ifdefense.training.commands import (
    Command,
    options_of,
    prepare,
    reported,
    run_options,
    with_options,
)
from ifdefense.training.fit import Batch, Loss, TrainOptions, fit, likelihood_loss
from ifdefense.training.occupancies import BOX, OFFSET, STEP, OccupancySet, interpolate
from ifdefense.training.runs import check_ranges

HELD_PER_CLASS = 4
"""Validation solids of each class."""
VIEWS = 4
"""Images of each solid."""
SECOND_THRESHOLD = 0.2
"""Where nothing is inside at the first."""


@dataclasses.dataclass(frozen=True)
class QueryOptions:
    """How examples are drawn. Lengths are in the unit cube.

    Attributes:
        batch_size: solids per step.
        queries: queries per solid; half of them uniform in the grid's box, half near the surface.
        near_sigma: standard deviation of the near-surface queries.
        offset: thickening of the solid in the labels.

    Raises:
        ValueError: if a number is out of range.
    """

    batch_size: int = 16
    queries: int = 512
    near_sigma: float = 0.04
    offset: float = OFFSET

    def __post_init__(self) -> None:
        infinity = float("inf")
        check_ranges(
            self, batch_size=(1, infinity), queries=(2, infinity), near_sigma=(0, 1), offset=(0, 0.05)
        )


class SolidSampler:
    """Draws solids and labelled queries in the solids' frame; a subclass adds what its network is given.

    Args:
        data: the solids.
        options: how examples are drawn.
    """

    mirrored = (False, False)
    """Whether examples are mirrored at random along x, and along y."""

    def __init__(self, data: OccupancySet, options: QueryOptions) -> None:
        self.points = torch.from_numpy(np.array(data.points))
        self.grids = torch.from_numpy(np.array(data.grids))
        self.options = options
        self.digest = digest(data.points)

    def given(self, index: Tensor, sign: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """What the network is given of solids ``(B,)``, mirrored by the signs ``(B, 3)`` of the axes."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What determines the examples, for the settings of a run."""
        return dataclasses.asdict(self.options) | {"shapes": self.digest}

    def draw(self, generator: torch.Generator) -> Batch:
        """What the network is given, queries ``(B, Q, 3)`` and bool labels ``(B, Q)`` of a training step."""
        batch = self.options.batch_size
        index = torch.randint(len(self.points), (batch,), generator=generator)
        sign = torch.ones(batch, 3)
        for axis, mirrored in enumerate(self.mirrored):
            if mirrored:
                sign[:, axis] = torch.randint(0, 2, (batch,), generator=generator) * 2.0 - 1
        queries, labels = self.labelled(index, self.options.queries, sign, generator)
        return (*self.given(index, sign, generator), queries, labels)

    def labelled(
        self, index: Tensor, count: int, sign: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Queries, half of them near the surface, and their labels."""
        near = torch.randint(self.points.shape[1], (len(index), count // 2), generator=generator)
        near_points = self.points[index[:, None], near].float()
        near_points = near_points + self.options.near_sigma * torch.randn(
            near_points.shape, generator=generator
        )
        uniform = (torch.rand(len(index), count - count // 2, 3, generator=generator) - 0.5) * BOX
        queries = torch.cat([near_points, uniform], 1)
        return queries * sign[:, None], self.inside(index, queries)

    def inside(self, index: Tensor, queries: Tensor) -> Tensor:
        """Labels ``(B, Q)`` of queries that are not mirrored; a grid holds its offset minus the distance."""
        return interpolate(self.grids, index, queries) * STEP > OFFSET - self.options.offset

    def validation(self) -> dict[str, list[Batch]]:
        """Batches of all solids with 2,048 uniform queries, not mirrored, the same at every call."""
        generator = torch.Generator().manual_seed(1)
        batches: list[Batch] = []
        for index in torch.arange(len(self.points)).split(16):
            queries = (torch.rand(len(index), 2048, 3, generator=generator) - 0.5) * BOX
            labels = self.inside(index, queries)
            batches.append((*self.given(index, torch.ones(len(index), 3), generator), queries, labels))
        return {"iou": batches}


class PairSampler(SolidSampler):
    """Gives labelled points, for the latent encoder."""

    def given(self, index: Tensor, sign: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Points ``(B, Q, 3)`` and their occupancies ``(B, Q)``, drawn as the queries are."""
        points, labels = self.labelled(index, self.options.queries, sign, generator)
        return points, labels.float()


class VoxelSampler(SolidSampler):
    """Gives voxels ``(B, 32, 32, 32)``."""

    mirrored = (True, True)

    def __init__(self, data: OccupancySet, options: QueryOptions) -> None:
        super().__init__(data, options)
        centres = voxel_centres().view(1, -1, 3)
        # The rule of voxelise; a grid holds the offset minus the distance.
        least = (OFFSET - VOXEL_BOX / VOXELS / 2) / STEP
        rows = [
            interpolate(self.grids, index, centres.expand(len(index), -1, -1)) >= least
            for index in torch.arange(len(self.grids)).split(16)
        ]
        self.voxels = torch.cat(rows).view(-1, VOXELS, VOXELS, VOXELS)

    def given(self, index: Tensor, sign: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Voxels of the solids."""
        voxels = self.voxels[index]
        for axis in (0, 1):
            turned = (sign[:, axis] < 0)[:, None, None, None]
            voxels = torch.where(turned, voxels.flip(axis + 1), voxels)
        return (voxels.float(),)


class ImageSampler(SolidSampler):
    """Gives images ``(B, H, W, 3)`` from random sides.

    Args:
        data: the solids.
        options: how examples are drawn.
        images: ``(S, V, H, W, 3)`` uint8 of the same solids.
    """

    # Mirrored along y, a solid gives no new image, as the camera may stand on either side.
    mirrored = (True, False)

    def __init__(self, data: OccupancySet, options: QueryOptions, images: NDArray[np.uint8]) -> None:
        super().__init__(data, options)
        self.images = torch.from_numpy(np.array(images))

    def describe(self) -> dict[str, Any]:
        """What determines the examples, for the settings of a run."""
        return super().describe() | {"images": list(self.images.shape)}

    def given(self, index: Tensor, sign: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """One image of each solid."""
        view = torch.randint(self.images.shape[1], (len(index),), generator=generator)
        images = self.images[index, view].float() / 255
        turned = (sign[:, 0] < 0)[:, None, None, None]
        return (torch.where(turned, images.flip(2, 3), images),)


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Images of solids.

    Attributes:
        values: ``(S, V, H, W, 3)`` uint8.
    """

    values: NDArray[np.uint8]

    def save(self, folder: Path) -> None:
        """Writes them into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "images.npy", self.values)

    @classmethod
    def load(cls, folder: Path) -> Images:
        """Maps into memory what `save` wrote."""
        return cls(np.load(folder / "images.npy", mmap_mode="r"))


def render_procedural(per_class: int, seed: int, views: int = VIEWS, size: int = 64) -> Images:
    """Images of the solids of `from_procedural`, in the same order."""
    values = []
    for number in tqdm(range(len(CLASSES) * per_class), desc="images", mininterval=5):
        label, index = divmod(number, per_class)
        shape = make_shape(CLASSES[label], np.random.default_rng([seed, label, index]))
        cameras = random_cameras(views, np.random.default_rng([seed, label, index, 1]))
        seen = [render(shape, camera, size).image for camera in cameras]
        values.append((np.stack(seen) * 255).round().astype(np.uint8))
    return Images(np.stack(values))


def solids(cache: Path, per_class: int, seed: int) -> tuple[OccupancySet, OccupancySet]:
    """Solids to train on, and to validate on, in the caches of ``train onet``."""
    train, held = seed + 1, seed + 2
    return (
        cached(
            cache / "procedural",
            lambda: from_procedural(per_class, train),
            {"per_class": per_class, "seed": train},
        ),
        cached(
            cache / "procedural-validation", lambda: from_procedural(HELD_PER_CLASS, held), {"seed": held}
        ),
    )


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
