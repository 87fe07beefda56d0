"""Trains the classifiers: ``python -m classifiers.train --help``.

The published recipe (yanx27, IF-Defense: Adam 1e-3, 200 epochs of 1,024 points) takes a day without a GPU.
With max-pooling over points, a random subset of a cloud is nearly as good a training example as all of it, so
most epochs see few points per cloud and only the last ones all: the schedule ``256x18,512x4,1024x1`` is 18
epochs of 256 random points, and so on; ``1024x0.3`` is an epoch of three tenths of the clouds. Networks with
neighbourhoods use proportionally fewer neighbours and centres, so that a neighbourhood keeps its extent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from classifiers import NETWORKS, build
from classifiers.adversarial import attacked
from classifiers.neighbourhoods import Sized
from classifiers.pointnet import PointNet, orthogonality_penalty
from ifdefense.checkpoints import load_weights
from ifdefense.console import device_option, use_huge_pages
from ifdefense.devices import device_of_weights
from ifdefense.logits import classify
from ifdefense.training.commands import options_of, output_options, prepare, reported
from ifdefense.training.data.clouds import TrainingClouds, load_training_clouds
from ifdefense.training.runs import ResumableRun, check_ranges, file_digest

Schedule = tuple[tuple[int, float], ...]
MatmulPrecision = Literal["highest", "high", "medium"]

ATTACKED = 256
"""Validation clouds that are attacked after an epoch of adversarial training."""

ATTACK_STEPS = 6
"""Gradients of that attack."""


@dataclasses.dataclass(frozen=True)
class ClassifierOptions:
    """Settings of a run. Lengths are in the unit-sphere frame.

    Attributes:
        schedule: ``((points, epochs), ...)``, random points per cloud and for how many epochs; a fraction is
            an epoch of a part of the clouds.
        batch_size: clouds per step.
        lr: largest learning rate of AdamW, reached after the warm-up, then a cosine to nearly zero.
        weight_decay: weight decay of AdamW.
        label_smoothing: label smoothing.
        alignment_penalty: weight of the distance of PointNet's feature alignment from orthogonality.
        max_scale: each axis is scaled by a factor between the inverse of this and this.
        max_shift: largest shift along each axis.
        jitter: standard deviation of the noise on each coordinate, clipped at five times it.
        max_rotation: largest rotation about the up axis z, in degrees.
        mix: probability that a batch is mixed by `cut_mix`.
        warmup: share of the steps in which the rate rises.
        adversarial: share of each batch that is attacked, see `classifiers.adversarial`.
        delta: radius of that attack's L∞ ball.
        attack_steps: gradients of that attack.
        coherent: in a share of the batches the attacked clouds' points move as the means of up to so many
            nearest points among 256, proportionally more among more; see `classifiers.adversarial.attacked`.
            1 for none.
        coherent_share: probability that a batch is one of these.
        average: decay of the moving average of the weights, per step, which is validated and kept; 0 for the
            weights themselves.
        half_search: search the largest points in bfloat16, see `classifiers.layers.max_pooled_linear`.
        matmul_precision: of the products of training, see `torch.set_float32_matmul_precision`. ``"medium"``
            is two to four times as fast on some processors.
        seed: seed of the initial weights, the order and the augmentation.

    Raises:
        ValueError: if a number is out of range.
    """

    schedule: Schedule = ((256, 18), (512, 4), (1024, 1))
    batch_size: int = 32
    lr: float = 2e-3
    weight_decay: float = 1e-4
    label_smoothing: float = 0.1
    alignment_penalty: float = 1e-3
    max_scale: float = 1.25
    max_shift: float = 0.1
    jitter: float = 0.01
    max_rotation: float = 0.0
    mix: float = 0.0
    warmup: float = 0.1
    adversarial: float = 0.0
    delta: float = 0.05
    attack_steps: int = 3
    coherent: int = 1
    coherent_share: float = 0.5
    average: float = 0.0
    half_search: bool = True
    matmul_precision: MatmulPrecision = "highest"
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(
            self,
            batch_size=(1, math.inf),
            lr=(1e-12, 10),
            weight_decay=(0, 10),
            label_smoothing=(0, 1),
            alignment_penalty=(0, math.inf),
            max_scale=(1, 10),
            max_shift=(0, 10),
            jitter=(0, 1),
            max_rotation=(0, 180),
            mix=(0, 1),
            warmup=(0, 1),
            adversarial=(0, 1),
            delta=(0, 10),
            attack_steps=(1, math.inf),
            coherent=(1, 256),
            coherent_share=(0, 1),
            average=(0, 1 - 1e-9),
        )
        if self.matmul_precision not in get_args(MatmulPrecision):
            raise ValueError(
                f"matmul_precision must be one of {', '.join(get_args(MatmulPrecision))}, "
                f"got {self.matmul_precision!r}"
            )

    @property
    def epochs(self) -> int:
        """Epochs of the whole schedule."""
        return len(self._epochs())

    def _epochs(self) -> list[tuple[int, float]]:
        """Points per cloud, and the share of the clouds, in every epoch."""
        every = []
        for points, epochs in self.schedule:
            whole = math.floor(epochs)
            every += [(points, 1.0)] * whole
            if epochs > whole:
                every.append((points, epochs - whole))
        return every

    def points_at(self, epoch: int) -> int:
        """Points per cloud in an epoch, counted from 0."""
        if epoch >= self.epochs:
            raise ValueError(f"epoch {epoch} lies after the schedule")
        return self._epochs()[epoch][0]

    def batches_at(self, epoch: int, clouds: int) -> int:
        """Steps of an epoch."""
        return max(1, round(clouds // self.batch_size * self._epochs()[epoch][1]))


def augment(points: Tensor, count: int, options: ClassifierOptions, generator: torch.Generator) -> Tensor:
    """Random subsets of the points, rotated, scaled, shifted and jittered.

    Args:
        points: ``(B, N, 3)``.
        count: points of each subset.
        options: strength of the augmentation.
        generator: source of randomness.

    Returns:
        ``(B, min(count, N), 3)``.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * 2 - 1

    batch = len(points)
    order = torch.rand(points.shape[:2], generator=generator).argsort(1)[:, :count]
    points = points.gather(1, order.unsqueeze(2).expand(-1, -1, 3))
    if options.max_rotation:
        angle = uniform(batch) * math.radians(options.max_rotation)
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(batch)
        rows = [torch.stack(row, 1) for row in ((cos, -sin, zero), (sin, cos, zero), (zero, zero, zero + 1))]
        points = points @ torch.stack(rows, 1)
    points = (
        points * torch.exp(uniform(batch, 1, 3) * math.log(options.max_scale))
        + uniform(batch, 1, 3) * options.max_shift
    )
    noise = torch.randn(points.shape, generator=generator) * options.jitter
    return points + noise.clamp(-5 * options.jitter, 5 * options.jitter)


def cut_mix(points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Replaces a random share of the points of every cloud by points of another cloud of the batch.

    PointCutMix-R (Zhang et al., 2021, https://arxiv.org/abs/2101.01461), with beta = 1. The paper matches the
    points that are exchanged; here both are drawn independently, which has the same marginals and needs no
    assignment.

    Args:
        points: ``(B, N, 3)``.
        generator: source of randomness.

    Returns:
        ``(B, N, 3)`` mixed clouds, the ``(B,)`` indices of the clouds that the new points come from, and the
        share of the points that stayed, the same for every cloud.
    """
    batch, size, _ = points.shape
    other = torch.randperm(batch, generator=generator).to(points.device)
    kept = int(torch.randint(size + 1, (), generator=generator))
    stay = torch.rand(batch, size, generator=generator).argsort(1)[:, :kept].to(points.device)
    come = torch.rand(batch, size, generator=generator).argsort(1)[:, kept:].to(points.device)
    own = points.gather(1, stay.unsqueeze(2).expand(-1, -1, 3))
    new = points[other].gather(1, come.unsqueeze(2).expand(-1, -1, 3))
    return torch.cat([own, new], 1), other, kept / size


@contextlib.contextmanager
def float32_products(precision: MatmulPrecision) -> Iterator[None]:
    """Sets `torch.set_float32_matmul_precision` inside the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def accuracy(model: nn.Module, clouds: TrainingClouds, batch_size: int = 64) -> float:
    """Share of clouds that are classified correctly, with the model in evaluation mode."""
    model.eval()
    device = device_of_weights(model)
    parts = zip(clouds.points.split(batch_size), clouds.labels.split(batch_size), strict=True)
    hits = (classify(model, points).argmax(1) == labels.to(device) for points, labels in parts)
    return sum(int(right.sum()) for right in hits) / len(clouds)


class ClassifierRun(ResumableRun):
    """Trains a classifier, in epochs.

    Args:
        model: network to train, changed in place, on its device; any from ``(B, N, 3)`` points to logits.
        train: clouds to train on.
        validation: clouds that choose the epoch whose weights are kept, by name; the mean of their accuracies
            counts, in adversarial training also of those under attack.
        options: settings.
        folder: folder of the run, see `ResumableRun`.
        settings: what else determines the result, such as the name of the network.
    """

    def __init__(
        self,
        model: nn.Module,
        train: TrainingClouds,
        validation: Mapping[str, TrainingClouds],
        options: ClassifierOptions,
        folder: Path,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.train, self.validation, self.options = train, validation, options
        self.optimiser = torch.optim.AdamW(
            model.parameters(), lr=options.lr, weight_decay=options.weight_decay
        )
        steps = sum(options.batches_at(epoch, len(train)) for epoch in range(options.epochs))
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, options.lr, steps, pct_start=options.warmup
        )
        data = {"train": train.digest(), **{name: part.digest() for name, part in validation.items()}}
        super().__init__(
            model,
            {"optimiser": self.optimiser, "schedule": self.schedule},
            {**dataclasses.asdict(options), "data": data, **(settings or {})},
            options.epochs,
            options.seed,
            folder,
            decay=options.average,
        )

    def _neighbours(self, count: int) -> int:
        """Over how many of ``count`` points the attack of a batch is averaged."""
        most = self._most_neighbours(count)
        if most == 1 or float(torch.rand((), generator=self.generator)) >= self.options.coherent_share:
            return 1
        return round(math.pow(most, float(torch.rand((), generator=self.generator))))

    def _most_neighbours(self, count: int) -> int:
        """The most of ``count`` points that an attack moves together."""
        return 1 if self.options.coherent == 1 else max(1, round(self.options.coherent * count / 256))

    def _loss(self, points: Tensor, labels: Tensor) -> Tensor:
        """Loss of augmented clouds, for PointNet with the penalty on its feature alignment."""
        other, part = None, 1.0
        some = round(self.options.adversarial * len(points))
        if some:
            spoilt = attacked(
                self.model,
                points[:some],
                labels[:some],
                self.options.delta,
                self.options.attack_steps,
                self.generator,
                self._neighbours(points.shape[1]),
            )
            points = torch.cat([spoilt, points[some:]])
        if self.options.mix and float(torch.rand((), generator=self.generator)) < self.options.mix:
            points, other, part = cut_mix(points, self.generator)
        alignment = None
        if isinstance(self.model, PointNet):
            logits, alignment = self.model.with_alignment(points)
        else:
            logits = classify(self.model, points)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.options.label_smoothing)
        if other is not None:
            second = F.cross_entropy(logits, labels[other], label_smoothing=self.options.label_smoothing)
            loss = part * loss + (1 - part) * second
        if alignment is not None:
            loss = loss + self.options.alignment_penalty * orthogonality_penalty(alignment)
        return loss

    def _withstood(self, clouds: TrainingClouds) -> float:
        """Accuracy on the first clouds under the attack of the training with more steps.

        As many neighbours move together as ever in the training.
        """
        some = clouds.first(ATTACKED)
        delta, generator = self.options.delta, torch.Generator().manual_seed(self.options.seed)
        together = self._most_neighbours(some.points.shape[1])
        parts = []
        for points, labels in zip(some.points.split(64), some.labels.split(64), strict=True):
            given = points.to(self.device), labels.to(self.device)
            parts.append(attacked(self.evaluated, *given, delta, ATTACK_STEPS, generator, together))
        return accuracy(self.evaluated, TrainingClouds(torch.cat(parts), some.labels))

    def _train(self, stop: int, progress: bool) -> float:
        """One epoch."""
        epoch = self.position
        self.model.train()
        if isinstance(self.model, PointNet):
            self.model.search_in(torch.bfloat16 if self.options.half_search else None)
        count = self.options.points_at(epoch)
        if isinstance(self.model, Sized):
            self.model.sized_for(count)
        steps = self.options.batches_at(epoch, len(self.train))
        order = torch.randperm(len(self.train), generator=self.generator)
        batches = torch.split(order[: steps * self.options.batch_size], self.options.batch_size)
        total = 0.0
        for chosen in tqdm(batches, f"epoch {epoch + 1}", disable=not progress, mininterval=10):
            points = augment(self.train.points[chosen], count, self.options, self.generator)
            with float32_products(self.options.matmul_precision):
                loss = self._loss(points.to(self.device), self.train.labels[chosen].to(self.device))
                self.optimiser.zero_grad(set_to_none=True)
                loss.backward()
            self.optimiser.step()
            self.schedule.step()
            self.update_average()
            total += float(loss.detach())
        if isinstance(self.model, PointNet):
            self.model.search_in(None)
        if isinstance(self.model, Sized):
            self.model.sized_for(1024)
        self.position += 1
        return total / len(batches)

    def _validate(self) -> dict[str, float]:
        """None in epochs of few points, whose batch statistics are not those of whole clouds."""
        points = self.options.points_at(self.position - 1)
        if 2 * points < max(points for points, _ in self.options.schedule):
            return {}
        scores = {name: accuracy(self.evaluated, clouds) for name, clouds in self.validation.items()}
        if self.options.adversarial:
            scores |= {f"{name}, attacked": self._withstood(part) for name, part in self.validation.items()}
        return scores | {"mean": sum(scores.values()) / len(scores)}


def load_data(
    data: str, hybrid: Path | None, hybrid_validation: Path | None
) -> tuple[TrainingClouds, dict[str, TrainingClouds], int]:
    """Training clouds, validation clouds by name, and the number of classes.

    Args:
        data: ``"modelnet40"`` (root from ``IFDEFENSE_DATA``) or ``"procedural"``.
        hybrid: npz of purified copies of the training clouds, see `TrainingClouds.of_file`.
        hybrid_validation: the same for the validation clouds.

    Raises:
        DataError: if the data is missing or cannot be used.
    """
    train, validation, num_classes = load_training_clouds(data)
    named = {"validation": validation}
    if hybrid is not None:
        train = train.joined(TrainingClouds.of_file(hybrid))
    if hybrid_validation is not None:
        named["purified"] = TrainingClouds.of_file(hybrid_validation)
    return train, named, num_classes


def _parse_schedule(text: str) -> Schedule:
    try:
        parts = [part.split("x") for part in text.split(",")]
        schedule = tuple((int(points), float(epochs)) for points, epochs in parts)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no schedule such as 256x18,512x4,1024x0.5") from None
    if not all(points >= 1 and 0 < epochs < math.inf for points, epochs in schedule):
        raise click.BadParameter(f"{text!r} has an entry without points or epochs")
    return schedule


@click.command()
@click.option(
    "--data", type=click.Choice(["modelnet40", "procedural"]), default="modelnet40", show_default=True
)
@click.option("--model", "network", type=click.Choice(list(NETWORKS)), default="pointnet", show_default=True)
@output_options(None)
@click.option(
    "--schedule", default="256x18,512x4,1024x1", show_default=True, help="Points x epochs, comma-separated."
)
@options_of(
    ClassifierOptions,
    batch_size="Clouds per step.",
    lr="Largest learning rate.",
    weight_decay="Of AdamW.",
    label_smoothing="Share of the label that all classes divide.",
    max_rotation="Largest rotation about the up axis, degrees.",
    max_scale="Largest factor along each axis.",
    max_shift="Largest shift along each axis.",
    jitter="Standard deviation of the noise.",
    mix="Probability that a batch is mixed (PointCutMix).",
    warmup="Share of the steps before the cosine.",
    adversarial="Share of each batch that is attacked in L∞ (adversarial training).",
    delta="Radius of that attack, unit sphere.",
    attack_steps="Gradients of that attack.",
    coherent="It moves up to so many of 256 points together, proportionally more of more.",
    coherent_share="Share of the batches in which it does; in the others every point by itself.",
    average="Decay of a moving average of the weights.",
    half_search="Search PointNet's largest points in bfloat16.",
)
@click.option(
    "--matmul-precision",
    type=click.Choice(get_args(MatmulPrecision)),
    default=ClassifierOptions.matmul_precision,
    show_default=True,
    help="Of the products in training; medium is faster on some processors.",
)
@click.option("--seed", type=click.IntRange(min=0), default=ClassifierOptions.seed, show_default=True)
@device_option
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
@reported()
def main(
    data: str,
    network: str,
    folder: Path,
    out: Path | None,
    force: bool,
    schedule: str,
    device: torch.device,
    feature_transform: bool,
    init: Path | None,
    hybrid: Path | None,
    hybrid_validation: Path | None,
    test: bool,
    progress: bool,
    **settings: Any,
) -> None:
    """Trains a classifier and keeps the weights that validate best."""
    use_huge_pages()
    if test and data != "modelnet40":
        raise click.UsageError(f"--test measures on ModelNet40, not on {data}")
    options = ClassifierOptions(_parse_schedule(schedule), **settings)
    prepare(out, force, folder)
    train, validation, num_classes = load_data(data, hybrid, hybrid_validation)
    torch.manual_seed(options.seed)
    extra = {"feature_transform": feature_transform} if network == "pointnet" else {}
    model = build(network, num_classes, **extra)
    if init is not None:
        load_weights(model, init)
    run = ClassifierRun(
        model.to(device),
        train,
        validation,
        options,
        folder,
        {"model": network, **extra, "init": file_digest(init)},
    )
    run.resume()
    best = run(progress)
    run.load_best()
    lines = [f"data: {data}, {len(train)} training clouds"]
    lines += [f"{name} accuracy: {best[name]:.2%} of {len(clouds)}" for name, clouds in validation.items()]
    together = f", {options.coherent} of 256 points together" if options.coherent > 1 else ""
    lines += [
        f"{name} accuracy in L∞ {options.delta}, {ATTACK_STEPS} steps{together}: {best[score]:.2%} of "
        f"{min(ATTACKED, len(clouds))}"
        for name, clouds in validation.items()
        if (score := f"{name}, attacked") in best
    ]
    if test:
        from ifdefense.data.modelnet import load_modelnet40

        part = load_modelnet40(split="test")
        best["test"] = accuracy(model, TrainingClouds.of_arrays(part.points, part.labels))
        lines.append(f"test accuracy, measured once: {best['test']:.2%} of {len(part.points)}")
    if out is not None:
        size = sum(parameter.numel() for parameter in model.parameters())
        about = (
            f"{type(model).__name__} of {size:,} parameters, from (B, N, 3) mean-centred clouds of largest "
            "norm 1, z up, to logits."
        )
        run.export(out, "python -m classifiers.train", about, lines)
    click.echo(json.dumps(best))


if __name__ == "__main__":
    main()
