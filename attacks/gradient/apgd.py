"""Auto-PGD: projected gradient descent that sets its own step size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attacks.base import Oracle
from attacks.functional.losses import cross_entropy, dlr
from attacks.gradient.pgd import Bounded, steepest

LOSSES: dict[str, Callable[[Tensor, Tensor, bool], Tensor]] = {"ce": cross_entropy, "dlr": dlr}
"""Losses of APGD by the names of AutoAttack."""


@dataclass(frozen=True)
class APGD(Bounded):
    """Projected gradient descent with momentum and a step size that each example halves by itself.

    Croce & Hein, 2020, `arXiv:2003.01690 <https://arxiv.org/abs/2003.01690>`_, algorithm 1. With P the
    projection onto the budget, ``u`` the direction of steepest descent of length 1 in the norm, and a first
    step ``eta`` of twice the budget::

        z = P(x + eta u),   x' = P(x + alpha (z - x) + (1 - alpha) (x - x_previous))

    At checkpoints, which grow denser (`checkpoints`), an example halves its ``eta`` and goes back to its best
    point if fewer than the share ``rho`` of its steps have lowered the loss, or if neither ``eta`` nor its
    best loss has changed since the checkpoint before. ``loss="ce"`` and ``loss="dlr"`` are AutoAttack's
    APGD-CE and APGD-DLR. The budget is IF-Defense's, so that it compares with `PGD`.

    Of all iterates an example keeps the one of lowest loss that has reached the goal, or without any the one
    of lowest loss. Only examples that have not been broken are started again.

    Differs from AutoAttack's code in that each start is `PGD`'s, uniform noise inside the budget and the same
    for all examples, not noise of the size of the budget; in that the momentum is 0 after going back to the
    best point; in a budget of each point's own length (``"point-l2"``), which images have no use for; and in
    the targeted `attacks.functional.losses.dlr`.

    Attributes:
        norm: norm of the budget, as in `Bounded`.
        delta: size of the budget a coordinate (IF-Defense: 0.08).
        epsilon: budget in the norm itself, instead of ``delta``.
        loss: ``"ce"`` or ``"dlr"``.
        iterations: steps a start (published: 100).
        restarts: starts (published: 1 in AutoAttack, 5 in the comparison with PGD).
        rho: share of the steps that have to lower the loss (published: 0.75).
        alpha: weight of the new step against the last one (published: 0.75).
        early_stop: whether an example leaves at its first success. AutoAttack goes on and finds no more
            successes by it, only larger margins.

    Raises:
        ValueError: if a number is out of range or there is no such loss.
    """

    loss: Literal["ce", "dlr"] = "ce"
    iterations: int = 100
    restarts: int = 1
    rho: float = 0.75
    alpha: float = 0.75
    early_stop: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in LOSSES:
            raise ValueError(f"unknown loss {self.loss!r}; there are: {', '.join(LOSSES)}")
        if self.iterations < 1 or self.restarts < 1:
            raise ValueError(
                f"iterations and restarts must be at least 1, got {self.iterations} and {self.restarts}"
            )
        if not (0 < self.rho <= 1 and 0 < self.alpha <= 1):
            raise ValueError(f"rho and alpha must lie in (0, 1], got {self.rho} and {self.alpha}")

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Starts again and again for the examples that still hold."""
        kept = _Best.of(points)
        taken = torch.zeros_like(oracle.queries)
        for _ in range(self.restarts):
            start = self.randomised(points, generator)
            rows = (~kept.reached).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            self._descend(oracle, points, start, rows, kept, taken)
        return kept.points, taken

    def _descend(
        self, oracle: Oracle, points: Tensor, start: Tensor, rows: Tensor, kept: _Best, taken: Tensor
    ) -> None:
        """One start for the examples ``rows``; updates what is kept and the steps taken."""
        loss, marks = LOSSES[self.loss], checkpoints(self.iterations)
        current, previous = start, start.clone()
        eta = points.new_full((len(points),), 2 * self.budget(points.shape[1]))
        value = torch.full_like(eta, -torch.inf)
        lowest, lowest_before = torch.full_like(eta, torch.inf), torch.full_like(eta, torch.inf)
        lowest_points, lowest_gradient = start.clone(), torch.zeros_like(start)
        lowered, halved = torch.zeros_like(eta), torch.zeros_like(eta, dtype=torch.bool)
        for step in range(self.iterations + 1):
            if step < self.iterations:
                logits, gradient = oracle.gradient(current[rows], loss, rows)
            else:
                logits = oracle.logits(current[rows], rows)
            new = loss(logits, oracle.classes[rows], oracle.targeted)
            reached = oracle.reached(logits, rows)
            kept.update(rows, current[rows], new, reached)
            if step == self.iterations:
                return
            if self.early_stop:
                missing = ~reached
                rows, new, gradient = rows[missing], new[missing], gradient[missing]
                if len(rows) == 0:
                    return
            lowered[rows] += new < value[rows]
            value[rows] = new
            better = new < lowest[rows]
            improved = rows[better]
            lowest[improved], lowest_points[improved] = new[better], current[improved]
            lowest_gradient[improved] = gradient[better]
            if step in marks:
                since = step - max((mark for mark in marks if mark < step), default=0)
                stuck = lowered[rows] < self.rho * since
                stuck |= ~halved[rows] & (lowest[rows] >= lowest_before[rows])
                back = rows[stuck]
                eta[back] /= 2
                current[back], previous[back] = lowest_points[back], lowest_points[back]
                value[back], gradient[stuck] = lowest[back], lowest_gradient[back]
                lowest_before[rows], halved[rows], lowered[rows] = lowest[rows], stuck, 0
            here, clean = current[rows], points[rows]
            ahead = self.constrain(here - eta[rows, None, None] * steepest(gradient, self.norm), clean)
            alpha = self.alpha if step else 1.0
            there = here + alpha * (ahead - here) + (1 - alpha) * (here - previous[rows])
            previous[rows], current[rows] = here, self.constrain(there, clean)
            taken[rows] += 1


def checkpoints(iterations: int) -> list[int]:
    """Steps after which step sizes are reconsidered, ``ceil(p_j * iterations)``, ascending.

    ``p_0 = 0``, ``p_1 = 0.22`` and ``p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)`` (Croce & Hein, 2020,
    section 3.2).
    """
    before, share = 0.0, 0.22
    marks = []
    while (mark := math.ceil(share * iterations - 1e-9)) < iterations:
        if mark not in marks:
            marks.append(mark)
        before, share = share, share + max(share - before - 0.03, 0.06)
    return marks


@dataclass
class _Best:
    """The best cloud of each example so far: by success first, then by the loss."""

    points: Tensor
    value: Tensor
    reached: Tensor

    @classmethod
    def of(cls, points: Tensor) -> _Best:
        """Nothing but the clean clouds."""
        value = torch.full_like(points[:, 0, 0], torch.inf)
        return cls(points.clone(), value, torch.zeros_like(value, dtype=torch.bool))

    def update(self, rows: Tensor, points: Tensor, value: Tensor, reached: Tensor) -> None:
        """Takes those of the clouds ``(b, N, 3)`` that are better than what ``rows`` have."""
        had = self.reached[rows]
        better = (reached & ~had) | ((reached == had) & (value < self.value[rows]))
        taken = rows[better]
        self.points[taken], self.value[taken] = points[better], value[better]
        self.reached[taken] = reached[better]
