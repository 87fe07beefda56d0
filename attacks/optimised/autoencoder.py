"""Auto-encoder of point clouds for AdvPC: ``python -m attacks.optimised.autoencoder`` trains it."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import sys
import time
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from ifdefense.checkpoints import load_into, load_state, save_safetensors, shipped
from ifdefense.console import use_huge_pages
from ifdefense.data.sets import training_sets
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.geometry.points import gather, knn
from ifdefense.training.runs import EpochRun, write_card

logger = logging.getLogger(__name__)

SHIPPED = "autoencoder-modelnet40"
"""Name of the weights that travel with the package."""


class AutoEncoder(nn.Module):
    """A PointNet encoder and a decoder of linear layers, as that of AdvPC but compact.

    Hamdi et al., ECCV 2020, `arXiv:1912.00461 <https://arxiv.org/abs/1912.00461>`_, after Achlioptas et al.,
    2018, `arXiv:1707.02392 <https://arxiv.org/abs/1707.02392>`_. No layer depends on the other clouds of a
    batch.

    Args:
        code: numbers that a cloud is put into.
        points: points that come out, however many went in.

    Shapes: ``(B, N, 3)`` clouds in the unit sphere to ``(B, points, 3)``.
    """

    def __init__(self, code: int = 128, points: int = 1024) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 256)
        )
        self.code = nn.Linear(256, code)
        self.decoder = nn.Sequential(
            nn.Linear(code, 256), nn.ReLU(), nn.Linear(256, 384), nn.ReLU(), nn.Linear(384, 3 * points)
        )

    def forward(self, points: Tensor) -> Tensor:
        """Reconstructed clouds."""
        code = self.code(self.encoder(points).amax(1))
        rebuilt: Tensor = self.decoder(code).unflatten(1, (-1, 3))
        return rebuilt

    @classmethod
    def from_file(cls, path: str | Path) -> AutoEncoder:
        """An auto-encoder of the sizes that a file of weights has.

        Raises:
            ifdefense.checkpoints.CheckpointError: if the file does not fit.
        """
        state = load_state(path)
        sizes = {}
        if {"code.weight", "decoder.4.bias"} <= state.keys():
            sizes = {"code": len(state["code.weight"]), "points": len(state["decoder.4.bias"]) // 3}
        model = cls(**sizes)
        load_into(model, state, path)
        return model.eval()


@functools.lru_cache(maxsize=8)
def pretrained(device: torch.device, dtype: torch.dtype) -> AutoEncoder:
    """The auto-encoder that travels with the package, without gradients of its parameters.

    Raises:
        ValueError: if there is none.
    """
    return AutoEncoder.from_file(shipped("attacks", SHIPPED)).to(device, dtype).requires_grad_(False)


def chamfer(rebuilt: Tensor, points: Tensor) -> Tensor:
    """Two-sided Chamfer distance of squared distances; differentiable by the first cloud.

    Neighbours are searched without gradients, which spares the backward pass through all pairs of points.

    Args:
        rebuilt: ``(B, N, 3)``.
        points: ``(B, M, 3)``.

    Returns:
        ``(B,)``.
    """
    with torch.no_grad():
        forward, backward = knn(rebuilt, points, 1)[1].squeeze(2), knn(points, rebuilt, 1)[1].squeeze(2)
    there = (rebuilt - gather(points, forward)).square().sum(2).mean(1)
    back = (gather(rebuilt, backward) - points).square().sum(2).mean(1)
    return there + back


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of a run. Lengths are in the unit-sphere frame.

    Attributes:
        epochs: passes over the training clouds.
        batch: clouds a step.
        points: random points of a cloud that are encoded, and to be met.
        rate: largest learning rate of Adam, reached after a tenth of the steps, then cosine to nearly zero.
        scale: each axis is scaled by a factor between the inverse of this and this.
        jitter: standard deviation of the noise on what is encoded, not on what is to be met.
        seed: seed of the initial weights, the order and the augmentation.
    """

    epochs: int = 40
    batch: int = 32
    points: int = 256
    rate: float = 2e-3
    scale: float = 1.15
    jitter: float = 0.01
    seed: int = 0


def normalised(points: NDArray[np.floating]) -> Tensor:
    """``(S, N, 3)`` clouds of any frame in the unit sphere, float32."""
    return to_unit_sphere(torch.from_numpy(np.asarray(points, np.float32)))


@torch.no_grad()
def reconstruction_error(model: nn.Module, clouds: Tensor, batch: int = 64) -> float:
    """Mean Chamfer distance of ``(S, N, 3)`` clouds and their reconstructions."""
    return sum(float(chamfer(model(part), part).sum()) for part in torch.split(clouds, batch)) / len(clouds)


class Run(EpochRun):
    """A training run that can be stopped after any epoch and goes on as if it had not been.

    Args:
        model: network to train, changed in place.
        train: ``(S, N, 3)`` clouds to train on, unit sphere.
        validation: clouds that choose the epoch whose weights are kept.
        options: settings.
        folder: where ``last.pt``, ``best.safetensors`` and ``log.jsonl`` go.
    """

    model: AutoEncoder

    def __init__(
        self, model: AutoEncoder, train: Tensor, validation: Tensor, options: Options, folder: Path
    ) -> None:
        self.train, self.validation = train, validation
        self.options = options
        optimiser = torch.optim.Adam(model.parameters(), lr=options.rate)
        self.steps_an_epoch = max(1, len(train) // options.batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, options.rate, options.epochs * self.steps_an_epoch, pct_start=0.1
        )
        super().__init__(model, optimiser, schedule, repr(options), options.seed, folder)
        self.best = {"chamfer": math.inf}

    def _drawn(self, clouds: Tensor) -> tuple[Tensor, Tensor]:
        """Random points of stretched clouds: what is encoded, and what is to be met."""
        options = self.options
        order = torch.rand(clouds.shape[:2], generator=self.generator).argsort(1)[:, : options.points]
        stretch = torch.rand((len(clouds), 1, 3), generator=self.generator) * 2 - 1
        points = to_unit_sphere(gather(clouds, order) * torch.exp(stretch * math.log(options.scale)))
        noise = torch.randn(points.shape, generator=self.generator) * options.jitter
        return points + noise, points

    def _train_epoch(self, progress: bool) -> float:
        """One pass over the training clouds; returns the mean loss."""
        self.model.train()
        order = torch.randperm(len(self.train), generator=self.generator)
        batches = torch.split(order[: self.steps_an_epoch * self.options.batch], self.options.batch)
        total = 0.0
        for chosen in tqdm(batches, f"epoch {self.epoch}", disable=not progress, mininterval=10):
            given, wanted = self._drawn(self.train[chosen])
            loss = chamfer(self.model(given), wanted).mean()
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self.optimiser.step()
            self.schedule.step()
            total += float(loss.detach())
        return total / len(batches)

    def __call__(self, progress: bool = False) -> dict[str, float]:
        """Trains to the last epoch; returns the validation error of the kept weights."""
        while self.epoch < self.options.epochs:
            started = time.perf_counter()
            loss = self._train_epoch(progress)
            self.model.eval()
            error = reconstruction_error(self.model, self.validation)
            entry = {
                "epoch": self.epoch,
                "loss": round(loss, 6),
                "chamfer": round(error, 6),
                "seconds": round(time.perf_counter() - started, 1),
            }
            with (self.folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
            logger.info("%s", entry)
            if error <= self.best["chamfer"]:
                self.best = {"chamfer": error, "epoch": float(self.epoch)}
                save_safetensors(self.model, self.folder / "best.safetensors")
            self.epoch += 1
            self.keep()
        return self.best


def load_data(data: str) -> tuple[Tensor, Tensor]:
    """Training and validation clouds: ``"modelnet40"`` (root from ``IFDEFENSE_DATA``) or ``"procedural"``.

    Those of ModelNet40 are both from its training set, as `ifdefense.data.modelnet.holdout` cuts it.
    """
    sets = training_sets(data)
    train, validation = (normalised(part.points) for part in sets)
    return train, validation


def _write_card(path: Path, run: Run, data: str) -> None:
    """A model card beside the exported weights."""
    write_card(
        path,
        "attacks.optimised.autoencoder",
        f"Auto-encoder of {sum(p.numel() for p in run.model.parameters()):,} parameters for AdvPC, "
        "(B, N, 3) mean-centred clouds of largest norm 1, z up, to reconstructions.",
        repr(run.options),
        f"{data}, {len(run.train)} training clouds",
        [
            f"epoch kept by validation: {int(run.best['epoch'])}",
            f"validation Chamfer distance (squared, both ways): {run.best['chamfer']:.5f} "
            f"of {len(run.validation)} clouds",
        ],
    )


@click.command()
@click.option(
    "--data", type=click.Choice(["modelnet40", "procedural"]), default="modelnet40", show_default=True
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the run; an unfinished one goes on.",
)
@click.option(
    "--export",
    type=click.Path(path_type=Path),
    help="Where the kept weights go (.safetensors), with a model card.",
)
@click.option("--epochs", default=Options.epochs, show_default=True)
@click.option("--points", default=Options.points, show_default=True, help="Random points of a cloud.")
@click.option("--rate", default=Options.rate, show_default=True)
@click.option("--batch", default=Options.batch, show_default=True)
@click.option("--seed", default=Options.seed, show_default=True)
@click.option("--progress/--no-progress", default=None, help="Show a bar; by default on a terminal.")
def main(
    data: str,
    out: Path,
    export: Path | None,
    epochs: int,
    points: int,
    rate: float,
    batch: int,
    seed: int,
    progress: bool | None,
) -> None:
    """Trains the auto-encoder of AdvPC and keeps the weights that validate best."""
    use_huge_pages()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options = Options(epochs, batch, points, rate, seed=seed)
    train, validation = load_data(data)
    torch.manual_seed(seed)
    run = Run(AutoEncoder(), train, validation, options, out)
    if run.resume():
        logger.info("going on after epoch %d", run.epoch - 1)
    best = run(sys.stderr.isatty() if progress is None else progress)
    if export is not None:
        load_into(run.model, load_state(out / "best.safetensors"))
        save_safetensors(run.model, export)
        _write_card(export, run, data)
    click.echo(json.dumps(best))


if __name__ == "__main__":
    main()
