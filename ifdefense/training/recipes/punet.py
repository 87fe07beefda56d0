"""``ifdefense train punet``: PU-Net on dense samples of surfaces."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import click
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ifdefense.console import device_option, reported
from ifdefense.devices import device_of_weights
from ifdefense.geometry.points import Neighbours, chamfer_distance
from ifdefense.point_networks.punet import PUNet
from ifdefense.restorers.optimised import Repulsion
from ifdefense.training.commands import (
    mix_of,
    options_of,
    output_options,
    prepare,
    surfaces_per_class,
)
from ifdefense.training.data.surfaces import WITH_SURFACES, collect, mixed
from ifdefense.training.examples.upsampling import Example, UpsamplingOptions, UpsamplingSampler
from ifdefense.training.runs import ResumableRun, check_ranges

VALIDATED = 24
"""Held-out surfaces for choosing the weights."""

RECONSTRUCTION = 100.0
"""Weight of the reconstruction relative to a repulsion weight of 1."""

REPULSION = Repulsion()
"""Lengths as in PU-Net."""


@dataclasses.dataclass(frozen=True)
class PUNetOptions(UpsamplingOptions):
    """Settings of a run, with those of its examples.

    Attributes:
        steps: steps of the optimiser.
        lr: largest learning rate of Adam, reached after a tenth of the steps, then a cosine to nearly zero.
        repulsion: weight of the repulsion, relative to 100 for the reconstruction.
        seed: seed of the initial weights and the examples.

    Raises:
        ValueError: if a number is out of range.
    """

    steps: int = 600
    lr: float = 1e-3
    repulsion: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, steps=(1, math.inf), lr=(1e-12, 10), repulsion=(0, math.inf))


def _moved(example: Example, device: torch.device) -> Example:
    return Example(*(part.to(device) for part in example))


def start_at_the_input(network: PUNet, share: float = 0.05) -> None:
    """Initialises the network to repeat its input points, plus a random part.

    Six channels of each layer carry the positive and negative parts of the coordinates, and the last one
    joins them. Training from there takes minutes instead of hours.

    Args:
        network: changed in place.
        share: factor of the random part of the last layer.
    """

    def conv(layers: nn.Module, index: int) -> nn.Conv2d:
        found: nn.Conv2d = layers[f"layer{index}"]["conv"]  # type: ignore[index]
        return found

    eye = torch.eye(3)
    with torch.no_grad():
        passed = torch.cat([eye, -eye])  # (6, 3)
        for branch in network.FC_Modules:
            _carry(conv(branch, 0), passed)
            _carry(conv(branch, 1), torch.eye(6))
        hidden, last = conv(network.pcd_layer[0], 0), conv(network.pcd_layer[1], 0)
        _carry(hidden, torch.eye(6))
        last.weight.mul_(share)
        assert last.bias is not None
        last.bias.zero_()
        last.weight[:, :6, 0, 0] = passed.T


def _carry(layer: nn.Conv2d, values: Tensor) -> None:
    """Sets the first six outputs of a layer to ``values`` times its first inputs."""
    assert layer.bias is not None
    layer.weight[:6] = 0
    layer.weight[:6, : values.shape[1], 0, 0] = values
    layer.bias[:6] = 0


def repulsion(points: Tensor, options: Repulsion = REPULSION) -> Tensor:
    """`Repulsion` of clouds ``(B, N, 3)``, differentiable with fixed neighbours; a scalar."""
    flat = points.flatten(0, 1)
    near = options.near(flat.detach(), [points.shape[1]] * len(points))
    apart = flat[:, None] - flat.index_select(0, near.flatten()).view(*near.shape, 3)
    distance = apart.square().sum(-1).clamp_min(1e-12).sqrt()
    value: Tensor = (options.radius - distance) * torch.exp(-((distance / options.width) ** 2))
    return value.mean()


def upsampling_loss(points: Tensor, target: Tensor, weight: float) -> Tensor:
    """Reconstruction and repulsion of upsampled clouds, as in PU-Net.

    Yu et al., CVPR 2018, https://arxiv.org/abs/1801.06761, with the Chamfer distance instead of the earth
    mover's distance.

    Args:
        points: ``(B, M, 3)``.
        target: ``(B, T, 3)`` even samples of the surfaces.
        weight: weight of the repulsion.
    """
    loss = RECONSTRUCTION * chamfer_distance(points, target).mean()
    return loss + weight * repulsion(points) if weight else loss


def spacing(points: Tensor) -> Tensor:
    """Mean distances ``(B,)`` from each point of ``(B, N, 3)`` to its nearest; large for even clouds."""
    means = []
    for cloud in points:
        nearest = cloud[Neighbours(cloud)(cloud, 2)[:, 1]]
        means.append((cloud - nearest).norm(dim=1).mean())
    return torch.stack(means)


class PUNetRun(ResumableRun):
    """Trains PU-Net, in steps.

    Args:
        model: network to train, changed in place, on its device.
        examples: training and validation examples.
        options: settings.
        every: steps between validations.
        folder: folder of the run, see `ResumableRun`.
    """

    unit: ClassVar[str] = "step"
    criterion: ClassVar[str] = "objective"
    minimise: ClassVar[bool] = True

    def __init__(
        self, model: PUNet, examples: UpsamplingSampler, options: PUNetOptions, every: int, folder: Path
    ) -> None:
        self.examples, self.options, self.every = examples, options, every
        device = device_of_weights(model)
        self.validation = [_moved(batch, device) for batch in examples.validation(VALIDATED)]
        self.optimiser = torch.optim.Adam(model.parameters(), lr=options.lr)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, options.lr, options.steps + 1, pct_start=0.1
        )
        super().__init__(
            model,
            {"optimiser": self.optimiser, "schedule": self.schedule},
            dataclasses.asdict(options) | {"data": examples.describe()},
            options.steps,
            options.seed,
            folder,
            metadata={"network": "punet"},
        )

    def _train(self, stop: int, progress: bool) -> float:
        """Steps to the next validation."""
        self.model.train()
        size = min(stop, (self.position // self.every + 1) * self.every) - self.position
        total = 0.0
        for _ in tqdm(range(size), f"step {self.position}", disable=not progress, mininterval=10):
            points, target = _moved(self.examples.draw(self.generator), self.device)
            loss = upsampling_loss(self.model(points), target, self.options.repulsion)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            self.schedule.step()
            total += float(loss.detach())
        self.position += size
        return total / size

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """The loss, the squared Chamfer distance, and the mean spacing relative to that of the target."""
        model = self.model.eval()
        scores = {"objective": 0.0, "chamfer": 0.0, "spacing": 0.0}
        count = sum(len(points) for points, _ in self.validation)
        for points, target in self.validation:
            found = model(points)
            share = len(points) / count
            scores["objective"] += share * float(upsampling_loss(found, target, self.options.repulsion))
            scores["chamfer"] += share * float(chamfer_distance(found, target).mean())
            scores["spacing"] += share * float((spacing(found) / spacing(target)).mean())
        return scores


@click.command("punet")
@click.option(
    "--mix",
    multiple=True,
    callback=mix_of(WITH_SURFACES, {"procedural": 1.0}),
    help="NAME=WEIGHT of a source: meshes, furniture or procedural.",
)
@click.option("--data", "root", type=click.Path(), help="Data folder; IFDEFENSE_DATA by default.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path("cache/surfaces"), show_default=True)
@output_options(Path("runs/punet"))
@options_of(
    PUNetOptions,
    steps="Optimiser steps.",
    batch_size="Clouds per step.",
    lr="Largest learning rate.",
    repulsion="Weight of the repulsion.",
    jitter="Largest noise, unit sphere.",
)
@surfaces_per_class
@click.option(
    "--every", type=click.IntRange(min=1), default=100, show_default=True, help="Steps between validations."
)
@click.option("--seed", type=click.IntRange(min=0), default=PUNetOptions.seed, show_default=True)
@device_option
@reported()
def train_command(
    mix: dict[str, float],
    root: str | None,
    cache: Path,
    folder: Path,
    out: Path | None,
    force: bool,
    per_class: int,
    every: int,
    progress: bool,
    device: torch.device,
    **settings: Any,
) -> None:
    """Trains PU-Net, the network of dup-net; keeps the weights with the best validation score.

    Examples are 1,024 noisy samples of a surface and 4,096 even ones.
    """
    options = PUNetOptions(**settings)
    prepare(out, force, folder)
    sources = {name: collect(name, root, cache, per_class, None, 0, None) for name in mix}
    torch.manual_seed(options.seed)
    model = PUNet()
    start_at_the_input(model)
    run = PUNetRun(model.to(device), UpsamplingSampler(sources, options, mix), options, every, folder)
    run.resume()
    best = run(progress)
    if out is not None:
        size = sum(parameter.numel() for parameter in model.parameters())
        about = (
            f"PU-Net of {size:,} parameters, trained here: 1,024 points to 4,096, mean-centred and of "
            "largest norm 1. Tensors have the names of the public checkpoint."
        )
        lines = [
            f"data: {mixed(mix, sources)}",
            f"validation, {VALIDATED} held-out surfaces: Chamfer distance (squared, both ways) "
            f"{best['chamfer']:.6f}, mean distance to the nearest point {best['spacing']:.0%} of that of "
            "farthest-point samples",
        ]
        run.export(out, "ifdefense", about, lines)
    click.echo(json.dumps(best))
