"""Projected gradient descent on the positions of the points."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.base import PROJECTIONS, Attack, Norm, Oracle, ThreatModel
from attacks.losses import cross_entropy


@dataclass(frozen=True)
class PGD(Attack):
    """Projected gradient descent on the cross-entropy from a random start.

    Madry et al., 2018, `arXiv:1706.06083 <https://arxiv.org/abs/1706.06083>`_, with the settings of
    IF-Defense, `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_.

    Each step goes a fixed length, in the norm of the budget, down the gradient of the loss: along the whole
    gradient for ``"l2"``, along each point's own for ``"point-l2"``, along each coordinate's sign for
    ``"linf"``.

    Differs from IF-Defense's code in that the budget is measured from the clean cloud, not from the random
    start, and in that all clouds of a batch start from the same noise.

    Attributes:
        norm: norm of the budget: over all points together, of each point, or of each coordinate.
        delta: size of the budget a coordinate (IF-Defense: 0.08). The budget itself is ``delta * sqrt(3 N)``
            for ``"l2"``, 4.43 for 1,024 points, ``delta * sqrt(3)`` for ``"point-l2"`` and ``delta`` for
            ``"linf"``: each ball holds the next.
        epsilon: budget in the norm itself, instead of ``delta``.
        iterations: steps (IF-Defense: 50).
        step: length of a step, as a share of the budget; by default one over the iterations (IF-Defense).
        random_start: whether to start from uniform noise in ``[-delta, delta]``, projected onto the budget.
        early_stop: whether an example stops once it has reached its goal. Published figures come without.

    Raises:
        ValueError: if a budget is negative or there is no iteration.
    """

    norm: Norm = "l2"
    delta: float = 0.08
    epsilon: float | None = None
    iterations: int = 50
    step: float | None = None
    random_start: bool = True
    early_stop: bool = False

    def __post_init__(self) -> None:
        if self.norm not in PROJECTIONS:
            raise ValueError(f"unknown norm {self.norm!r}; there are: {', '.join(PROJECTIONS)}")
        if self.delta < 0 or (self.epsilon is not None and self.epsilon < 0):
            raise ValueError(f"a budget must not be negative, got delta={self.delta}, epsilon={self.epsilon}")
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")

    @property
    def threat(self) -> ThreatModel:
        """White box, targeted or untargeted shifts within the budget of 1,024 points."""
        return ThreatModel("white-box", "both", "shift", self.norm, self.budget(1024))

    def budget(self, num_points: int) -> float:
        """Radius of the ball that the shift of a cloud of ``num_points`` points must stay in."""
        if self.epsilon is not None:
            return self.epsilon
        return (
            self.delta * {"l2": math.sqrt(3 * num_points), "point-l2": math.sqrt(3), "linf": 1.0}[self.norm]
        )

    def constrain(self, points: Tensor, clean: Tensor) -> Tensor:
        """Nearest clouds within the budget around the clean ones."""
        return clean + PROJECTIONS[self.norm](points - clean, self.budget(clean.shape[1]))

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Descends from the random start; the last iterate is the result."""
        length = self.budget(points.shape[1]) * (1 / self.iterations if self.step is None else self.step)
        attacked = points.clone()
        if self.random_start:
            scale = self.budget(points.shape[1]) / PGD(self.norm, delta=1.0).budget(points.shape[1])
            noise = torch.rand(points.shape[1:], generator=generator, dtype=points.dtype) * 2 - 1
            attacked = self.constrain(points + scale * noise.to(points.device), points)
        taken = torch.zeros_like(oracle.queries)
        active = torch.arange(len(points), device=points.device)
        for _ in range(self.iterations):
            logits, gradient = oracle.gradient(attacked[active], cross_entropy, active)
            if self.early_stop:
                missing = ~oracle.reached(logits, active)
                active, gradient = active[missing], gradient[missing]
                if len(active) == 0:
                    break
            stepped = attacked[active] - length * _unit(gradient, self.norm)
            attacked[active] = self.constrain(stepped, points[active])
            taken[active] += 1
        return attacked, taken


def _unit(gradient: Tensor, norm: Norm) -> Tensor:
    """Direction of steepest ascent of length 1 in the norm; 0 where the gradient vanishes."""
    if norm == "linf":
        return gradient.sign()
    if norm == "l2":
        size = gradient.flatten(1).norm(dim=1)[:, None, None]
    else:
        size = gradient.norm(dim=2, keepdim=True)
    unit: Tensor = gradient / size.clamp_min(torch.finfo(gradient.dtype).tiny)
    return unit
