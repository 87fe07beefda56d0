"""``ifdefense train autoencoder``: the auto-encoder of ``sor-ae`` and of AdvPC."""

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
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.geometry.points import chamfer_distance, gather
from ifdefense.point_networks.autoencoder import AutoEncoder
from ifdefense.provenance import digest
from ifdefense.training.commands import options_of, output_options, prepare
from ifdefense.training.data.clouds import load_training_clouds
from ifdefense.training.runs import ResumableRun, check_ranges


@dataclasses.dataclass(frozen=True)
class AutoencoderOptions:
    """Settings of a run. Lengths are in the unit-sphere frame.

    Attributes:
        epochs: passes over the training clouds.
        batch_size: clouds per step.
        points: random points per cloud that are encoded and reconstructed.
        lr: largest learning rate of Adam, reached after a tenth of the steps, then a cosine to nearly zero.
        max_scale: each axis is scaled by a factor between the inverse of this and this.
        jitter: standard deviation of the noise on the input, not on the target.
        seed: seed of the initial weights, the order and the augmentation.

    Raises:
        ValueError: if a number is out of range.
    """

    epochs: int = 40
    batch_size: int = 32
    points: int = 256
    lr: float = 2e-3
    max_scale: float = 1.15
    jitter: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(
            self,
            epochs=(1, math.inf),
            batch_size=(1, math.inf),
            points=(1, math.inf),
            lr=(1e-12, 10),
            max_scale=(1, 10),
            jitter=(0, 1),
        )


@torch.no_grad()
def reconstruction_error(model: nn.Module, clouds: Tensor, batch_size: int = 64) -> float:
    """Mean Chamfer distance of ``(S, N, 3)`` clouds and their reconstructions, on the model's device."""
    device = device_of_weights(model)
    parts = (part.to(device) for part in clouds.split(batch_size))
    return sum(float(chamfer_distance(model(part), part).sum()) for part in parts) / len(clouds)


class AutoencoderRun(ResumableRun):
    """Trains the auto-encoder, in epochs.

    Args:
        model: network to train, changed in place, on its device.
        train: ``(S, N, 3)`` clouds to train on, unit sphere, on the CPU like the others.
        validation: clouds for choosing the best epoch.
        options: settings.
        folder: folder of the run, see `ResumableRun`.
    """

    criterion: ClassVar[str] = "chamfer"
    minimise: ClassVar[bool] = True

    def __init__(
        self, model: AutoEncoder, train: Tensor, validation: Tensor, options: AutoencoderOptions, folder: Path
    ) -> None:
        self.train, self.validation, self.options = train, validation, options
        self.optimiser = torch.optim.Adam(model.parameters(), lr=options.lr)
        self.steps_per_epoch = max(1, len(train) // options.batch_size)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, options.lr, options.epochs * self.steps_per_epoch, pct_start=0.1
        )
        super().__init__(
            model,
            {"optimiser": self.optimiser, "schedule": self.schedule},
            dataclasses.asdict(options) | {"data": [digest(train), digest(validation)]},
            options.epochs,
            options.seed,
            folder,
            metadata={"network": "autoencoder"},
        )

    def _example(self, clouds: Tensor) -> tuple[Tensor, Tensor]:
        """Input and target: random points of scaled clouds, with and without noise."""
        options = self.options
        order = torch.rand(clouds.shape[:2], generator=self.generator).argsort(1)[:, : options.points]
        scale = torch.rand((len(clouds), 1, 3), generator=self.generator) * 2 - 1
        target = to_unit_sphere(gather(clouds, order) * torch.exp(scale * math.log(options.max_scale)))
        noise = torch.randn(target.shape, generator=self.generator) * options.jitter
        return target + noise, target

    def _train(self, stop: int, progress: bool) -> float:
        """One epoch."""
        self.model.train()
        order = torch.randperm(len(self.train), generator=self.generator)
        order = order[: self.steps_per_epoch * self.options.batch_size]
        batches = torch.split(order, self.options.batch_size)
        total = 0.0
        for chosen in tqdm(batches, f"epoch {self.position + 1}", disable=not progress, mininterval=10):
            given, target = (part.to(self.device) for part in self._example(self.train[chosen]))
            loss = chamfer_distance(self.model(given), target).mean()
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self.optimiser.step()
            self.schedule.step()
            total += float(loss.detach())
        self.position += 1
        return total / len(batches)

    def _validate(self) -> dict[str, float]:
        return {"chamfer": reconstruction_error(self.model.eval(), self.validation)}


@click.command("autoencoder")
@click.option(
    "--data", type=click.Choice(["modelnet40", "procedural"]), default="modelnet40", show_default=True
)
@output_options(None)
@options_of(
    AutoencoderOptions,
    epochs="Passes over the clouds.",
    batch_size="Clouds per step.",
    points="Random points per cloud.",
    lr="Largest learning rate.",
)
@click.option("--seed", type=click.IntRange(min=0), default=AutoencoderOptions.seed, show_default=True)
@device_option
@reported()
def train_command(
    data: str,
    folder: Path,
    out: Path | None,
    force: bool,
    progress: bool,
    device: torch.device,
    **settings: Any,
) -> None:
    """Trains the auto-encoder of sor-ae and AdvPC; keeps the weights with the best validation score."""
    options = AutoencoderOptions(**settings)
    prepare(out, force, folder)
    train, validation, _ = load_training_clouds(data)
    torch.manual_seed(options.seed)
    model = AutoEncoder().to(device)
    run = AutoencoderRun(model, train.points, validation.points, options, folder)
    run.resume()
    best = run(progress)
    if out is not None:
        size = sum(parameter.numel() for parameter in model.parameters())
        about = (
            f"Auto-encoder of {size:,} parameters, from (B, N, 3) mean-centred clouds of largest "
            "norm 1, z up, to reconstructions."
        )
        lines = [
            f"data: {data}, {len(train)} training clouds",
            f"validation Chamfer distance (squared, both ways): {best['chamfer']:.5f} "
            f"of {len(validation)} clouds",
        ]
        run.export(out, "ifdefense", about, lines)
    click.echo(json.dumps(best))
