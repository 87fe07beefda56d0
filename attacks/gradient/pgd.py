"""Projected gradient descent on the positions of the points."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.base import Ball, Norm, ThreatModel
from attacks.functional.losses import cross_entropy
from attacks.oracle import Oracle
from attacks.settings import NonNegativeFloat, PositiveInt


@dataclass(frozen=True)
class Bounded(Ball):
    """Base of attacks that shift points within a ball around the clean cloud.

    Attributes:
        norm: norm of the budget: of the whole shift, of each point, or of each coordinate.
        delta: budget per coordinate (IF-Defense: 0.08); the radius is ``delta * sqrt(3 N)`` for ``"l2"``
            (4.43 for 1,024 points), ``delta * sqrt(3)`` for ``"point-l2"`` and ``delta`` for ``"linf"``.
        epsilon: radius of the ball, instead of ``delta``.

    Raises:
        ValueError: if a setting is out of range.
    """

    norm: Norm = "l2"
    delta: NonNegativeFloat = 0.08
    epsilon: NonNegativeFloat | None = None

    @property
    def threat(self) -> ThreatModel:
        """White-box, targeted or untargeted shifts."""
        return ThreatModel("white-box", "both", "shift", self.norm, self.budget(1024))

    def budget(self, num_points: int) -> float:
        """Radius of the ball for a cloud of ``num_points`` points."""
        if self.epsilon is not None:
            return self.epsilon
        return self.delta * per_coordinate(self.norm, num_points)

    def randomised(self, points: Tensor, generator: torch.Generator) -> Tensor:
        """Clouds ``(B, N, 3)`` plus shared uniform noise in ``[-delta, delta]``, projected."""
        width = self.budget(points.shape[1]) / per_coordinate(self.norm, points.shape[1])
        noise = torch.rand(points.shape[1:], generator=generator, dtype=points.dtype) * 2 - 1
        return self.constrain(points + width * noise.to(points.device), points)


@dataclass(frozen=True)
class Iterated(Bounded):
    """Base of bounded attacks with steps of a fixed length.

    Attributes:
        iterations: steps (IF-Defense: 50).
        step: length of a step as a fraction of the budget; ``1 / iterations`` by default (IF-Defense).
    """

    iterations: PositiveInt = 50
    step: NonNegativeFloat | None = None


@dataclass(frozen=True)
class PGD(Iterated):
    """Projected gradient descent on the cross-entropy from a random start.

    Madry et al., 2018, `arXiv:1706.06083 <https://arxiv.org/abs/1706.06083>`_, with the budget and steps of
    IF-Defense, `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_: ``x' = P(x - step * u)`` with the
    direction of steepest ascent u in the norm.

    Differs from IF-Defense's code: its script minimises the hinge with ``kappa = 0``, which stops at the
    decision boundary, instead of the cross-entropy; it measures the budget from the random start, here from
    the clean cloud; and here all clouds of a batch share their noise.

    Other settings are those of `Bounded` and `Iterated`.

    Attributes:
        random_start: whether to start from noise inside the budget.
        early_stop: whether an example stops at its first success (published: no).

    Examples:
        >>> attack = attacks.PGD("linf", epsilon=0.05, iterations=3)
        >>> result = attack(classifier, points, labels)
        >>> bool(result.distances["linf"].max() <= 0.0501)
        True
    """

    random_start: bool = True
    early_stop: bool = False

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Descends from the random start; the last iterate is the result."""
        start = self.randomised(points, generator) if self.random_start else points.clone()
        return descend(self, oracle, points, start, self.iterations, self.step, early_stop=self.early_stop)


def descend(
    attack: Bounded,
    oracle: Oracle,
    points: Tensor,
    start: Tensor,
    iterations: int,
    step: float | None = None,
    *,
    momentum: float = 0.0,
    early_stop: bool = False,
) -> tuple[Tensor, Tensor]:
    """Projected steps of a fixed length down the cross-entropy.

    Settings are those of `PGD` and `attacks.MIFGM`; ``start`` is written to. Returns the last iterate and the
    ``(B,)`` steps per example.
    """
    length = attack.budget(points.shape[1]) * (1 / iterations if step is None else step)
    attacked, velocity = start, torch.zeros_like(start) if momentum else None
    taken = torch.zeros_like(oracle.queries)
    active = torch.arange(len(points), device=points.device)
    for _ in range(iterations):
        logits, gradient = oracle.gradient(attacked[active], cross_entropy, active)
        if early_stop:
            missing = ~oracle.reached(logits, active)
            active, gradient = active[missing], gradient[missing]
            if len(active) == 0:
                break
        if velocity is not None:
            size = gradient.abs().sum((1, 2), keepdim=True)
            gradient = momentum * velocity[active] + gradient / size.clamp_min(torch.finfo(size.dtype).tiny)
            velocity[active] = gradient
        stepped = attacked[active] - length * steepest(gradient, attack.norm)
        attacked[active] = attack.constrain(stepped, points[active])
        taken[active] += 1
    return attacked, taken


def steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """Direction of steepest ascent with norm 1; 0 where the gradient vanishes."""
    if norm == "linf":
        return gradient.sign()
    if norm == "l2":
        size = gradient.flatten(1).norm(dim=1)[:, None, None]
    else:
        size = gradient.norm(dim=2, keepdim=True)
    unit: Tensor = gradient / size.clamp_min(torch.finfo(gradient.dtype).tiny)
    return unit


def per_coordinate(norm: Norm, num_points: int) -> float:
    """Norm of a shift of 1 in every coordinate."""
    return {"l2": math.sqrt(3 * num_points), "point-l2": math.sqrt(3), "linf": 1.0}[norm]
