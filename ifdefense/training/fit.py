"""Training of implicit networks: modules from clouds and queries to occupancy logits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ifdefense.checkpoints import load_weights
from ifdefense.devices import device_of_weights
from ifdefense.implicit.occupancy import occupancy_loss
from ifdefense.provenance import digest
from ifdefense.training.muon import Muon, split_parameters
from ifdefense.training.runs import ResumableRun, check_ranges

Batch = tuple[Tensor, ...]
"""Arguments of the network, such as clouds ``(B, N, 3)`` and queries ``(B, Q, 3)``, then labels ``(B, Q)``.

Labels are occupancies: bool, or probabilities.
"""


Loss = Callable[[nn.Module, Sequence[Tensor], Tensor], Tensor]
"""Loss of a network for a batch's inputs and labels ``(B, Q)``, summed over queries, averaged over clouds."""


def likelihood_loss(network: nn.Module, inputs: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy of the network's logits."""
    return occupancy_loss(network(*inputs).float(), labels)


class Examples(Protocol):
    """Source of training batches."""

    def draw(self, generator: torch.Generator) -> Batch:
        """One training batch, on the CPU; ``generator`` is the only source of randomness."""
        ...

    def describe(self) -> dict[str, Any]:
        """Settings that determine the batches, as plain values; a run can only be resumed with equal ones."""
        ...


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Settings of a run.

    Attributes:
        steps: optimiser steps.
        muon_lr: learning rate of Muon, for hidden weight matrices, between warm-up and cool-down.
        adam_lr: learning rate of Adam, for all other parameters, on the same schedule.
        weight_decay: weight decay of the matrices trained by Muon.
        warmup: steps of linear warm-up.
        cooldown: share of the steps, at the end, over which the rates fall to a hundredth along a cosine.
        adam_decay: decoupled weight decay of the parameters trained by Adam.
        adam_beta2: decay of Adam's second moments.
        max_norm: gradients are clipped to this norm; 0 for no clipping.
        bfloat16: whether matrix products of training run in bfloat16.
        ema: decay of a moving average of the weights, used for validation and export; 0 for none.
        threshold: probability above which a query is inside in the validation IoU.
        seed: seed of the weights and of every draw.

    Raises:
        ValueError: if a number is out of range.
    """

    steps: int = 6000
    muon_lr: float = 0.02
    adam_lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 100
    cooldown: float = 0.4
    adam_decay: float = 0.0
    adam_beta2: float = 0.999
    max_norm: float = 0.0
    bfloat16: bool = False
    ema: float = 0.0
    threshold: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(
            self,
            steps=(1, math.inf),
            muon_lr=(0, 10),
            adam_lr=(0, 10),
            weight_decay=(0, 10),
            warmup=(0, math.inf),
            cooldown=(0, 1),
            adam_decay=(0, 10),
            adam_beta2=(0, 1 - 1e-9),
            max_norm=(0, math.inf),
            ema=(0, 1),
            threshold=(1e-6, 1 - 1e-6),
        )


def schedule(step: int, options: TrainOptions) -> float:
    """Factor of the learning rates at a step: linear warm-up, plateau, cosine to a hundredth."""
    rise = min(1.0, (step + 1) / max(options.warmup, 1))
    left = (options.steps - step) / max(options.steps * options.cooldown, 1.0)
    return rise if left >= 1 else rise * (0.01 + 0.99 * (1 - math.cos(math.pi * max(left, 0.0))) / 2)


@torch.no_grad()
def intersection_over_union(network: nn.Module, batches: Iterable[Batch], threshold: float) -> float:
    """Mean IoU of the occupancies at the queries, over clouds with occupied queries.

    Args:
        network: the network, in evaluation mode.
        batches: on the network's device.
        threshold: probability above which a query is inside.
    """
    logit = math.log(threshold / (1 - threshold))
    scores = []
    for *inputs, labels in batches:
        inside, occupied = network(*inputs) > logit, labels > 0.5
        union = (inside | occupied).sum(1)
        scores.append(((inside & occupied).sum(1) / union)[union > 0])
    return float(torch.cat(scores).mean())


class ImplicitRun(ResumableRun):
    """The run behind `fit`, in optimiser steps."""

    unit: ClassVar[str] = "step"

    def __init__(
        self,
        network: nn.Module,
        examples: Examples,
        validation: Mapping[str, Sequence[Batch]],
        folder: Path,
        options: TrainOptions,
        settings: Mapping[str, Any],
        adam_layers: Iterable[nn.Module],
        every: int,
        metadata: Mapping[str, str],
        loss: Loss = likelihood_loss,
    ) -> None:
        self.examples, self.options, self.every, self.loss = examples, options, every, loss
        device = device_of_weights(network)
        self.validation = {
            name: [tuple(part.to(device) for part in batch) for batch in batches]
            for name, batches in validation.items()
        }
        hidden, others = split_parameters(network, adam_layers)
        self.optimisers: dict[str, tuple[torch.optim.Optimizer, float]] = {}
        if hidden:
            muon = Muon(hidden, options.muon_lr, weight_decay=options.weight_decay)
            self.optimisers["muon"] = muon, options.muon_lr
        if others:
            betas = 0.9, options.adam_beta2
            adam = torch.optim.AdamW(others, options.adam_lr, betas, weight_decay=options.adam_decay)
            self.optimisers["adam"] = adam, options.adam_lr
        super().__init__(
            network,
            {name: optimiser for name, (optimiser, _) in self.optimisers.items()},
            dataclasses.asdict(options) | examples.describe() | dict(settings),
            options.steps,
            options.seed,
            folder,
            may_change={"steps"},
            metadata=metadata,
            decay=options.ema,
        )

    def _train(self, stop: int, progress: bool) -> float:
        stop = min(stop, (self.position // self.every + 1) * self.every)
        start, total = self.position, 0.0
        self.model.train()
        for _ in tqdm(range(start, stop), f"to step {stop}", disable=not progress, mininterval=10):
            for optimiser, rate in self.optimisers.values():
                optimiser.param_groups[0]["lr"] = rate * schedule(self.position, self.options)
            *inputs, labels = (part.to(self.device) for part in self.examples.draw(self.generator))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bfloat16):
                loss = self.loss(self.model, inputs, labels)
            self.model.zero_grad(set_to_none=True)
            loss.backward()
            if self.options.max_norm:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.options.max_norm)
            for optimiser, _ in self.optimisers.values():
                optimiser.step()
            self.position += 1
            self.update_average()
            total += loss.item() / labels.shape[1]
        return total / (stop - start)

    def _validate(self) -> dict[str, float]:
        network = self.evaluated.eval()
        scores = {
            name: intersection_over_union(network, batches, self.options.threshold)
            for name, batches in self.validation.items()
        }
        return scores | {"mean": sum(scores.values()) / len(scores)}


def fit(
    network: nn.Module,
    examples: Examples,
    validation: Mapping[str, Sequence[Batch]],
    folder: str | Path,
    options: TrainOptions = TrainOptions(),
    *,
    settings: Mapping[str, Any] | None = None,
    adam_layers: Iterable[nn.Module] = (),
    every: int = 250,
    init: str | Path | None = None,
    stop_after: int | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: bool = False,
    loss: Loss = likelihood_loss,
) -> ImplicitRun:
    """Trains an implicit network, or resumes the run in ``folder``.

    Args:
        network: maps clouds and queries to logits ``(B, Q)``; trained in place, on its device. Afterwards it
            has the weights with the best mean validation IoU, in evaluation mode.
        examples: training batches.
        validation: batches by name, such as clean and corrupted input.
        folder: folder of the run, see `ResumableRun`.
        options: settings. A run may be resumed with other ``steps``; the cool-down changes accordingly.
        settings: further settings that determine the result, such as the sizes of the network.
        adam_layers: layers trained by Adam: the first and the last ones.
        every: steps between validations.
        init: initial weights of a new run.
        stop_after: stop after this number of steps.
        metadata: text entries of the weights.
        progress: show bars.
        loss: training loss.

    Returns:
        The run, with its scores and `export`.

    Raises:
        RunError: if the run cannot be resumed with these settings.
        CheckpointError: if ``init`` does not fit.
        FloatingPointError: if the loss is NaN or infinite.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    path = Path(init) if init is not None else None
    if path is not None:
        load_weights(network, path)
    run = ImplicitRun(
        network,
        examples,
        validation,
        Path(folder),
        options,
        {**(settings or {}), "init": None if path is None else digest(path.read_bytes())},
        adam_layers,
        every,
        metadata or {},
        loss,
    )
    run.resume()
    run(progress, stop_after)
    run.load_best()
    return run
