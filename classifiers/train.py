"""Trains the classifiers: ``python -m classifiers.train --help``.

The published recipe (yanx27, IF-Defense: Adam 1e-3, 200 epochs of 1,024 points) takes a day without a GPU. A
maximum over points makes a random part of a cloud nearly as good a training example as the whole, so most
epochs see few points a cloud and only the last ones see all: the schedule ``256x18,512x4,1024x1`` is 18
epochs of 256 random points, and so on. Networks with neighbourhoods look at fewer neighbours (and centres) in
proportion, so that the neighbourhoods keep their extent. ``1024x0.3`` is an epoch of three tenths of the
clouds.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from classifiers import NETWORKS, build
from classifiers.layers import Sized
from classifiers.pointnet import PointNet, orthogonality_penalty
from ifdefense.checkpoints import load_into, load_state, save_safetensors
from ifdefense.console import use_huge_pages
from ifdefense.data.sets import training_sets
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.training.runs import EpochRun, write_card

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of a run. Lengths are in the unit-sphere frame.

    Attributes:
        schedule: ``((points, epochs), ...)``, random points a cloud and for how many epochs; a fraction is an
            epoch of a part of the clouds.
        batch: clouds a step.
        rate: largest learning rate of AdamW, reached after a tenth of the steps, then cosine to nearly zero.
        decay: weight decay.
        smoothing: label smoothing.
        penalty: weight of the feature alignment's distance from orthogonality.
        scale: each axis is scaled by a factor between the inverse of this and this.
        shift: largest shift along each axis.
        jitter: standard deviation of the noise on each coordinate, clipped at five times it.
        turn: largest rotation about the up axis z, in degrees.
        seed: seed of the initial weights, the order and the augmentation.
        half_search: look for the largest points in bfloat16, see `classifiers.pointnet.max_pooled_linear`.
        mix: probability that a batch is mixed by `cut_mix`.
        warmup: part of the steps in which the rate rises to its largest; after it a half cosine.
    """

    schedule: tuple[tuple[int, float], ...] = ((256, 18), (512, 4), (1024, 1))
    batch: int = 32
    rate: float = 2e-3
    decay: float = 1e-4
    smoothing: float = 0.1
    penalty: float = 1e-3
    scale: float = 1.25
    shift: float = 0.1
    jitter: float = 0.01
    turn: float = 0.0
    seed: int = 0
    half_search: bool = True
    mix: float = dataclasses.field(default=0.0, repr=False)
    warmup: float = dataclasses.field(default=0.1, repr=False)

    def describe(self) -> str:
        """The settings as text; those that came later only where they are not the default."""
        later = [field for field in dataclasses.fields(self) if not field.repr]
        changed = {f.name: getattr(self, f.name) for f in later if getattr(self, f.name) != f.default}
        return repr(self) + (f" + {changed}" if changed else "")

    @property
    def epochs(self) -> int:
        """Epochs of the whole schedule."""
        return len(self._epochs())

    def _epochs(self) -> list[tuple[int, float]]:
        """Points a cloud, and the part of the clouds, in every epoch."""
        every = []
        for points, epochs in self.schedule:
            whole = math.floor(epochs)
            every += [(points, 1.0)] * whole
            if epochs > whole:
                every.append((points, epochs - whole))
        return every

    def points_at(self, epoch: int) -> int:
        """Points a cloud in an epoch, counted from 0."""
        if epoch >= self.epochs:
            raise ValueError(f"epoch {epoch} lies after the schedule")
        return self._epochs()[epoch][0]

    def batches_at(self, epoch: int, clouds: int) -> int:
        """Steps in an epoch of a set of so many clouds."""
        return max(1, round(clouds // self.batch * self._epochs()[epoch][1]))


@dataclasses.dataclass(frozen=True, eq=False)
class Clouds:
    """Clouds to train or validate on: ``(S, N, 3)`` points in the unit sphere, and ``(S,)`` labels."""

    points: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.points)


def clouds_from(points: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> Clouds:
    """Normalised clouds from arrays in any frame."""
    return Clouds(
        to_unit_sphere(torch.from_numpy(np.asarray(points, np.float32))),
        torch.from_numpy(np.asarray(labels, np.int64)),
    )


def joined(first: Clouds, second: Clouds) -> Clouds:
    """Both sets, one after the other."""
    return Clouds(torch.cat([first.points, second.points]), torch.cat([first.labels, second.labels]))


def augment(points: Tensor, count: int, options: Options, generator: torch.Generator) -> Tensor:
    """Random ``count`` points of each cloud, turned, stretched, shifted and jittered.

    Args:
        points: ``(B, N, 3)``.
        count: points to keep, the same number for every cloud.
        options: sizes of the changes.
        generator: source of randomness.

    Returns:
        ``(B, min(count, N), 3)``.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * 2 - 1

    batch = len(points)
    order = torch.rand(points.shape[:2], generator=generator).argsort(1)[:, :count]
    points = points.gather(1, order.unsqueeze(2).expand(-1, -1, 3))
    if options.turn:
        angle = uniform(batch) * math.radians(options.turn)
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(batch)
        rows = [torch.stack(row, 1) for row in ((cos, -sin, zero), (sin, cos, zero), (zero, zero, zero + 1))]
        points = points @ torch.stack(rows, 1)
    points = (
        points * torch.exp(uniform(batch, 1, 3) * math.log(options.scale))
        + uniform(batch, 1, 3) * options.shift
    )
    noise = torch.randn(points.shape, generator=generator) * options.jitter
    return points + noise.clamp(-5 * options.jitter, 5 * options.jitter)


def cut_mix(points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Gives every cloud of a batch some random points of another one.

    PointCutMix-R (Zhang et al., 2021, https://arxiv.org/abs/2101.01461), with beta = 1. There the points that
    are replaced and those that replace them are matched; here both are drawn independently, which has the
    same marginals and needs no assignment.

    Args:
        points: ``(B, N, 3)``.
        generator: source of randomness.

    Returns:
        ``(B, N, 3)`` mixed clouds, the ``(B,)`` places of the clouds that the new points come from, and the
        part of the points that stayed, the same for every cloud.
    """
    batch, size, _ = points.shape
    other = torch.randperm(batch, generator=generator)
    kept = int(torch.randint(size + 1, (), generator=generator))
    stay = torch.rand(batch, size, generator=generator).argsort(1)[:, :kept]
    come = torch.rand(batch, size, generator=generator).argsort(1)[:, kept:]
    own = points.gather(1, stay.unsqueeze(2).expand(-1, -1, 3))
    new = points[other].gather(1, come.unsqueeze(2).expand(-1, -1, 3))
    return torch.cat([own, new], 1), other, kept / size


@torch.no_grad()
def accuracy(model: nn.Module, clouds: Clouds, batch: int = 64) -> float:
    """Share of clouds that are classified rightly, with the model in evaluation mode."""
    model.eval()
    parts = zip(torch.split(clouds.points, batch), torch.split(clouds.labels, batch), strict=True)
    return sum(int((model(points).argmax(1) == labels).sum()) for points, labels in parts) / len(clouds)


class Run(EpochRun):
    """A training run that can be stopped after any epoch and goes on as if it had not been.

    Args:
        model: network to train, changed in place; any from ``(B, N, 3)`` points to logits.
        train: clouds to train on.
        validation: clouds that choose the epoch whose weights are kept, by name; the mean of their accuracies
            counts.
        options: settings.
        folder: where ``last.pt``, ``best.safetensors`` and ``log.jsonl`` go.
    """

    def __init__(
        self, model: nn.Module, train: Clouds, validation: dict[str, Clouds], options: Options, folder: Path
    ) -> None:
        self.train, self.validation = train, validation
        self.options = options
        optimiser = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=options.decay)
        steps = sum(options.batches_at(epoch, len(train)) for epoch in range(options.epochs))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, options.rate, steps, pct_start=options.warmup
        )
        super().__init__(model, optimiser, schedule, options.describe(), options.seed, folder)
        self.best = {"mean": -1.0}

    def _loss(self, points: Tensor, labels: Tensor) -> Tensor:
        """Loss on augmented clouds, for PointNet with the penalty on its feature alignment."""
        other, part = None, 1.0
        if self.options.mix and float(torch.rand((), generator=self.generator)) < self.options.mix:
            points, other, part = cut_mix(points, self.generator)
        alignment = None
        if isinstance(self.model, PointNet):
            logits, alignment = self.model.with_alignment(points)
        else:
            logits = self.model(points)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.options.smoothing)
        if other is not None:
            second = F.cross_entropy(logits, labels[other], label_smoothing=self.options.smoothing)
            loss = part * loss + (1 - part) * second
        if alignment is not None:
            loss = loss + self.options.penalty * orthogonality_penalty(alignment)
        return loss

    def _train_epoch(self, progress: bool) -> float:
        """One pass over the training clouds; returns the mean loss."""
        self.model.train()
        if isinstance(self.model, PointNet):
            self.model.search_in(torch.bfloat16 if self.options.half_search else None)
        count = self.options.points_at(self.epoch)
        if isinstance(self.model, Sized):
            self.model.sized_for(count)
        steps = self.options.batches_at(self.epoch, len(self.train))
        order = torch.randperm(len(self.train), generator=self.generator)
        batches = torch.split(order[: steps * self.options.batch], self.options.batch)
        total = 0.0
        for chosen in tqdm(batches, f"epoch {self.epoch}", disable=not progress, mininterval=10):
            points = augment(self.train.points[chosen], count, self.options, self.generator)
            loss = self._loss(points, self.train.labels[chosen])
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self.optimiser.step()
            self.schedule.step()
            total += float(loss.detach())
        if isinstance(self.model, PointNet):
            self.model.search_in(None)
        if isinstance(self.model, Sized):
            self.model.sized_for(1024)
        return total / len(batches)

    def _validated(self) -> dict[str, float]:
        """Validation accuracies and their mean.

        None in the epochs of few points, whose batch statistics are not those of whole clouds.
        """
        if 2 * self.options.points_at(self.epoch) < max(points for points, _ in self.options.schedule):
            return {}
        scores = {name: accuracy(self.model, clouds) for name, clouds in self.validation.items()}
        return scores | {"mean": sum(scores.values()) / len(scores)}

    def __call__(self, progress: bool = False) -> dict[str, float]:
        """Trains to the end of the schedule; returns the validation accuracies of the kept weights."""
        while self.epoch < self.options.epochs:
            started = time.perf_counter()
            loss = self._train_epoch(progress)
            scores = self._validated()
            entry = {
                "epoch": self.epoch,
                "points": self.options.points_at(self.epoch),
                "loss": round(loss, 4),
            }
            entry |= {name: round(score, 4) for name, score in scores.items()}
            entry["seconds"] = round(time.perf_counter() - started, 1)
            with (self.folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
            logger.info("%s", entry)
            self.epoch += 1
            if scores and scores["mean"] >= self.best["mean"]:
                self.best = scores | {"epoch": float(entry["epoch"])}
                save_safetensors(self.model, self.folder / "best.safetensors")
            self.keep()
        return self.best


def load_data(
    data: str, hybrid: Path | None, hybrid_validation: Path | None
) -> tuple[Clouds, dict[str, Clouds], int]:
    """Training clouds, validation clouds by name, and the number of classes.

    Args:
        data: ``"modelnet40"`` (root from ``IFDEFENSE_DATA``) or ``"procedural"``.
        hybrid: npz of purified copies of the training clouds: ``points`` ``(S, N, 3)`` in any frame,
            ``label`` ``(S,)``.
        hybrid_validation: the same for the validation clouds.
    """
    sets = training_sets(data)
    train, validation = (clouds_from(part.points, part.labels) for part in sets)
    named = {"validation": validation}
    if hybrid is not None:
        train = joined(train, _purified(hybrid))
    if hybrid_validation is not None:
        named["purified"] = _purified(hybrid_validation)
    return train, named, len(sets[0].classes)


def _purified(path: Path) -> Clouds:
    with np.load(path) as arrays:
        return clouds_from(arrays["points"], arrays["label"])


def _parse_schedule(text: str) -> tuple[tuple[int, float], ...]:
    try:
        parts = [part.split("x") for part in text.split(",")]
        schedule = tuple((int(points), _number(epochs)) for points, epochs in parts)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no schedule such as 256x18,512x4,1024x0.5") from None
    if any(points < 1 or epochs <= 0 for points, epochs in schedule):
        raise click.BadParameter(f"{text!r} has an entry without points or epochs")
    return schedule


def _number(text: str) -> float:
    """A number of epochs; whole ones as int, which keeps the description of older runs."""
    return int(text) if text.isdecimal() else float(text)


def _write_card(path: Path, run: Run, data: str, test: float | None) -> None:
    """A model card beside the exported weights."""
    lines = [f"epoch kept by validation: {int(run.best['epoch'])}"]
    lines += [
        f"{name} accuracy: {run.best[name]:.2%} of {len(clouds)}" for name, clouds in run.validation.items()
    ]
    if test is not None:
        lines.append(f"test accuracy, measured once: {test:.2%}")
    size = sum(p.numel() for p in run.model.parameters())
    write_card(
        path,
        "classifiers.train",
        f"{type(run.model).__name__} of {size:,} parameters, (B, N, 3) mean-centred clouds of largest norm "
        "1, z up, to logits.",
        run.options.describe(),
        f"{data}, {len(run.train)} training clouds",
        lines,
    )


@click.command()
@click.option(
    "--data", type=click.Choice(["modelnet40", "procedural"]), default="modelnet40", show_default=True
)
@click.option("--model", "network", type=click.Choice(list(NETWORKS)), default="pointnet", show_default=True)
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
@click.option(
    "--schedule", default="256x18,512x4,1024x1", show_default=True, help="Points x epochs, comma-separated."
)
@click.option("--rate", default=Options.rate, show_default=True)
@click.option(
    "--turn", default=Options.turn, show_default=True, help="Largest rotation about the up axis, degrees."
)
@click.option("--scale", default=Options.scale, show_default=True, help="Largest factor along each axis.")
@click.option("--shift", default=Options.shift, show_default=True, help="Largest shift along each axis.")
@click.option("--jitter", default=Options.jitter, show_default=True, help="Standard deviation of the noise.")
@click.option(
    "--mix", default=0.0, show_default=True, help="Probability that a batch is mixed (PointCutMix)."
)
@click.option("--smoothing", default=Options.smoothing, show_default=True, help="Label smoothing.")
@click.option("--decay", default=Options.decay, show_default=True, help="Weight decay.")
@click.option("--warmup", default=0.1, show_default=True, help="Part of the steps before the cosine.")
@click.option("--batch", default=Options.batch, show_default=True)
@click.option("--seed", default=Options.seed, show_default=True)
@click.option(
    "--feature-transform/--no-feature-transform", default=True, show_default=True, help="PointNet's."
)
@click.option("--init", type=click.Path(exists=True, path_type=Path), help="Weights to start from.")
@click.option(
    "--hybrid", type=click.Path(exists=True, path_type=Path), help="Purified copies of the training clouds."
)
@click.option(
    "--hybrid-validation", type=click.Path(exists=True, path_type=Path), help="The same for validation."
)
@click.option(
    "--test/--no-test", default=False, help="Measure the test accuracy of the kept weights (ModelNet40)."
)
@click.option("--progress/--no-progress", default=None, help="Show a bar; by default on a terminal.")
def main(
    data: str,
    network: str,
    out: Path,
    export: Path | None,
    schedule: str,
    rate: float,
    turn: float,
    scale: float,
    shift: float,
    jitter: float,
    mix: float,
    smoothing: float,
    decay: float,
    warmup: float,
    batch: int,
    seed: int,
    feature_transform: bool,
    init: Path | None,
    hybrid: Path | None,
    hybrid_validation: Path | None,
    test: bool,
    progress: bool | None,
) -> None:
    """Trains a classifier and keeps the weights that validate best."""
    use_huge_pages()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options = Options(
        _parse_schedule(schedule),
        batch,
        rate,
        decay,
        smoothing,
        scale=scale,
        shift=shift,
        jitter=jitter,
        turn=turn,
        seed=seed,
        mix=mix,
        warmup=warmup,
    )
    train, validation, classes = load_data(data, hybrid, hybrid_validation)
    torch.manual_seed(seed)
    model = build(
        network, classes, **({"feature_transform": feature_transform} if network == "pointnet" else {})
    )
    if init is not None:
        load_into(model, load_state(init), init)
    run = Run(model, train, validation, options, out)
    if run.resume():
        logger.info("going on after epoch %d", run.epoch - 1)
    best = run(sys.stderr.isatty() if progress is None else progress)
    load_into(model, load_state(out / "best.safetensors"))
    score = None
    if test and data == "modelnet40":
        from ifdefense.data.modelnet import load_modelnet40

        part = load_modelnet40(split="test")
        score = accuracy(model, clouds_from(part.points, part.labels))
    if export is not None:
        save_safetensors(model, export)
        _write_card(export, run, data, score)
    click.echo(json.dumps(best | ({} if score is None else {"test": score})))


if __name__ == "__main__":
    main()
