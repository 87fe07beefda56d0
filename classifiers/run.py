"""The training run of a classifier: its loss, its epochs and its validation."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from classifiers.adversarial import attacked, attacked_through
from classifiers.augmentation import augment, cut_mix
from classifiers.neighbourhoods import Sized
from classifiers.options import ClassifierOptions, MatmulPrecision
from classifiers.pointnet import PointNet, orthogonality_penalty
from ifdefense import Purifier
from ifdefense.devices import device_of_weights
from ifdefense.logits import classify
from ifdefense.provenance import digest
from ifdefense.training.data.clouds import TrainingClouds
from ifdefense.training.runs import ResumableRun

ATTACKED = 256
"""Attacked validation clouds after an epoch of adversarial training."""

ATTACK_STEPS = 6
"""Gradients of that attack."""

THROUGH = "attacked through the purifier"
"""Score of the first validation clouds, attacked through the purifier and purified."""

Through = tuple[Purifier, Purifier]
"""A purifier, and the one whose gradients stand for its own."""


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
    """Accuracy of the model, in evaluation mode."""
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
        validation: validation clouds by name; the epoch with the best mean accuracy is kept, in adversarial
            training including accuracy under attack.
        options: settings.
        folder: folder of the run, see `ResumableRun`.
        settings: further settings that determine the result, such as the name of the network.
        through: purifier, and the differentiable one whose gradients stand for its own, on the device of the
            model; see ``options.through_share``.

    Raises:
        ValueError: if ``through_share`` is given without ``through``, or the other way round.
    """

    def __init__(
        self,
        model: nn.Module,
        train: TrainingClouds,
        validation: Mapping[str, TrainingClouds],
        options: ClassifierOptions,
        folder: Path,
        settings: Mapping[str, Any] | None = None,
        through: Through | None = None,
    ) -> None:
        if (options.through_share > 0) != (through is not None):
            raise ValueError("through and options.through_share belong together; give both or neither")
        self.train, self.validation, self.options, self.through = train, validation, options, through
        self.optimiser = torch.optim.AdamW(
            model.parameters(), lr=options.lr, weight_decay=options.weight_decay
        )
        steps = sum(options.batches_at(epoch, len(train)) for epoch in range(options.epochs))
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, options.lr, steps, pct_start=options.warmup
        )
        data = {"train": train.digest(), **{name: part.digest() for name, part in validation.items()}}
        if through is not None:
            data["through"] = digest(*through)
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
        """Number of ``count`` points over which the attack of a batch is averaged."""
        most = self._most_neighbours(count)
        if most == 1 or self._share() >= self.options.coherent_share:
            return 1
        return round(math.pow(most, self._share()))

    def _share(self) -> float:
        """A random number in [0, 1)."""
        return float(torch.rand((), generator=self.generator))

    def _most_neighbours(self, count: int) -> int:
        """Largest number of ``count`` points that an attack moves together."""
        return 1 if self.options.coherent == 1 else max(1, round(self.options.coherent * count / 256))

    def _attacked(self, points: Tensor, labels: Tensor, count: int, through: Through | None) -> Tensor:
        """Attacked clouds of ``count`` points."""
        delta, steps, generator = self.options.delta, self.options.attack_steps, self.generator
        if through is not None:
            return attacked_through(self.model, *through, points, labels, count, delta, steps, generator)
        return attacked(self.model, points, labels, delta, steps, generator, self._neighbours(count))

    def _loss(self, points: Tensor, labels: Tensor, count: int, through: Through | None) -> Tensor:
        """Loss of augmented clouds, for PointNet with the penalty on its feature alignment.

        Clouds that are attacked through the purifier have all their points, others ``count``.
        """
        other, part = None, 1.0
        some = round(self.options.adversarial * len(points))
        if some:
            spoilt = self._attacked(points[:some], labels[:some], count, through)
            points = torch.cat([spoilt, points[some:, :count]])
        if self.options.mix and self._share() < self.options.mix:
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

    def _withstood(self, clouds: TrainingClouds, through: Through | None = None) -> float:
        """Accuracy on the first clouds under the attack of the training with more steps.

        Shifts are averaged over the largest number of neighbours used in training, except through the
        purifier.
        """
        some = clouds.first(ATTACKED)
        delta, generator = self.options.delta, torch.Generator().manual_seed(self.options.seed)
        together = self._most_neighbours(some.points.shape[1])
        parts = []
        for points, labels in zip(some.points.split(64), some.labels.split(64), strict=True):
            model, points, labels = self.evaluated, points.to(self.device), labels.to(self.device)
            if through is not None:
                count = points.shape[1]
                found = attacked_through(
                    model, *through, points, labels, count, delta, ATTACK_STEPS, generator
                )
            else:
                found = attacked(model, points, labels, delta, ATTACK_STEPS, generator, together)
            parts.append(found)
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
            through = self.through if self.through and self._share() < self.options.through_share else None
            drawn = count if through is None else self.train.points.shape[1]
            points = augment(self.train.points[chosen], drawn, self.options, self.generator).to(self.device)
            labels = self.train.labels[chosen].to(self.device)
            with float32_products(self.options.matmul_precision):
                loss = self._loss(points, labels, count, through)
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
        """None in epochs of few points, where batch statistics differ from whole clouds."""
        points = self.options.points_at(self.position - 1)
        if 2 * points < max(points for points, _ in self.options.schedule):
            return {}
        scores = {name: accuracy(self.evaluated, clouds) for name, clouds in self.validation.items()}
        if self.options.adversarial:
            scores |= {f"{name}, attacked": self._withstood(part) for name, part in self.validation.items()}
        if self.through is not None:
            scores[THROUGH] = self._withstood(next(iter(self.validation.values())), self.through)
        return scores | {"mean": sum(scores.values()) / len(scores)}
