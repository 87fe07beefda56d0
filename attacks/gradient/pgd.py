"""Projected gradient descent on the positions of the points."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.base import PROJECTIONS, Ball, Norm, Oracle, ThreatModel
from attacks.functional.losses import cross_entropy


@dataclass(frozen=True)
class Bounded(Ball):
    """An attack that shifts points within a ball around the clean cloud; not an attack by itself.

    Attributes:
        norm: norm of the budget: over all points together, of each point, or of each coordinate.
        delta: size of the budget a coordinate (IF-Defense: 0.08). The budget itself is ``delta * sqrt(3 N)``
            for ``"l2"``, 4.43 for 1,024 points, ``delta * sqrt(3)`` for ``"point-l2"`` and ``delta`` for
            ``"linf"``: each ball holds the next.
        epsilon: budget in the norm itself, instead of ``delta``.

    Raises:
        ValueError: if a budget is negative or there is no such norm.
    """

    norm: Norm = "l2"
    delta: float = 0.08
    epsilon: float | None = None

    def __post_init__(self) -> None:
        if self.norm not in PROJECTIONS:
            raise ValueError(f"unknown norm {self.norm!r}; there are: {', '.join(PROJECTIONS)}")
        if self.delta < 0 or (self.epsilon is not None and self.epsilon < 0):
            raise ValueError(f"a budget must not be negative, got delta={self.delta}, epsilon={self.epsilon}")

    @property
    def threat(self) -> ThreatModel:
        """White box, targeted or untargeted shifts within the budget of 1,024 points."""
        return ThreatModel("white-box", "both", "shift", self.norm, self.budget(1024))

    def budget(self, num_points: int) -> float:
        """Radius of the ball that the shift of a cloud of ``num_points`` points must stay in."""
        if self.epsilon is not None:
            return self.epsilon
        return self.delta * _per_coordinate(self.norm, num_points)

    def randomised(self, points: Tensor, generator: torch.Generator) -> Tensor:
        """Clouds ``(B, N, 3)`` plus the same uniform noise, as wide as the budget a coordinate, projected."""
        width = self.budget(points.shape[1]) / _per_coordinate(self.norm, points.shape[1])
        noise = torch.rand(points.shape[1:], generator=generator, dtype=points.dtype) * 2 - 1
        return self.constrain(points + width * noise.to(points.device), points)


@dataclass(frozen=True)
class Iterated(Bounded):
    """A bounded attack in steps of a fixed length; not an attack by itself.

    Attributes:
        iterations: steps (IF-Defense: 50).
        step: length of a step, as a share of the budget; by default one over the iterations (IF-Defense).

    Raises:
        ValueError: if there is no iteration.
    """

    iterations: int = 50
    step: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")


@dataclass(frozen=True)
class PGD(Iterated):
    """Projected gradient descent on the cross-entropy from a random start.

    Madry et al., 2018, `arXiv:1706.06083 <https://arxiv.org/abs/1706.06083>`_, with the settings of
    IF-Defense, `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_.

    Each step goes a fixed length, in the norm of the budget, down the gradient of the loss: along the whole
    gradient for ``"l2"``, along each point's own for ``"point-l2"``, along each coordinate's sign for
    ``"linf"``.

    Differs from IF-Defense's code in that the budget is measured from the clean cloud, not from the random
    start, and in that all clouds of a batch start from the same noise.

    Attributes:
        norm: norm of the budget, as in `Bounded`.
        delta: size of the budget a coordinate (IF-Defense: 0.08).
        epsilon: budget in the norm itself, instead of ``delta``.
        iterations: steps (IF-Defense: 50).
        step: length of a step, as a share of the budget; by default one over the iterations (IF-Defense).
        random_start: whether to start from uniform noise in ``[-delta, delta]``, projected onto the budget.
        early_stop: whether an example stops once it has reached its goal. Published figures come without.

    Raises:
        ValueError: if a budget is negative or there is no iteration.
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
    """Projected steps of a fixed length down the cross-entropy; the last iterate is the result.

    Args:
        attack: gives the norm and the budget.
        oracle: model under attack.
        points: ``(B, N, 3)`` clean clouds.
        start: ``(B, N, 3)`` clouds to start from; written to.
        iterations: steps.
        step: length of a step as a share of the budget; by default one over the iterations.
        momentum: share of the former direction that is kept; gradients then count by their L1 norm (Dong et
            al., 2018, `arXiv:1710.06081 <https://arxiv.org/abs/1710.06081>`_, equation 6).
        early_stop: whether an example stops once it has reached its goal.

    Returns:
        ``(B, N, 3)`` attacked clouds and the ``(B,)`` steps that each example took.
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
    """Direction of steepest ascent of length 1 in the norm; 0 where the gradient vanishes."""
    if norm == "linf":
        return gradient.sign()
    if norm == "l2":
        size = gradient.flatten(1).norm(dim=1)[:, None, None]
    else:
        size = gradient.norm(dim=2, keepdim=True)
    unit: Tensor = gradient / size.clamp_min(torch.finfo(gradient.dtype).tiny)
    return unit


def _per_coordinate(norm: Norm, num_points: int) -> float:
    """Norm of a shift of 1 in every coordinate."""
    return {"l2": math.sqrt(3 * num_points), "point-l2": math.sqrt(3), "linf": 1.0}[norm]
