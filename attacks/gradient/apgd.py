"""Auto-PGD: projected gradient descent with adaptive step sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attacks.best_so_far import BestSoFar
from attacks.functional.losses import cross_entropy, dlr
from attacks.gradient.pgd import Bounded, steepest
from attacks.oracle import Oracle
from attacks.settings import NonNegativeInt, PositiveFraction, PositiveInt

LOSSES: dict[str, Callable[[Tensor, Tensor, bool], Tensor]] = {"ce": cross_entropy, "dlr": dlr}
"""Losses by their names in AutoAttack."""


@dataclass(frozen=True)
class APGD(Bounded):
    """Auto-PGD: projected gradient descent with momentum and a step size adapted per example.

    Croce & Hein, 2020, `arXiv:2003.01690 <https://arxiv.org/abs/2003.01690>`_, algorithm 1. With the
    projection P, the direction u of steepest descent and ``eta`` starting at twice the budget::

        z = P(x + eta u),   x' = P(x + alpha (z - x) + (1 - alpha) (x - x_previous))

    At each of the `checkpoints`, ``eta`` is halved and the best point restored if fewer than ``rho`` of the
    steps lowered the loss, or if neither ``eta`` nor the best loss changed since the last checkpoint. Returns
    the success of lowest loss, or else the iterate of lowest loss. Budget of `PGD`, for comparison.

    Differs from AutoAttack's code: starts are those of `PGD`, inside the budget and shared by the batch;
    momentum is reset when the best point is restored; targeted `attacks.functional.losses.dlr`;
    ``"point-l2"`` is added.

    Attributes:
        loss: ``"ce"`` or ``"dlr"``.
        iterations: steps per start (published: 100).
        restarts: starts, of the examples without success (published: 1 in AutoAttack, 5 in the paper).
        rho: fraction of the steps that must lower the loss (published: 0.75).
        alpha: weight of the new step against the last one (published: 0.75).
        early_stop: whether an example stops at its first success (AutoAttack: no).
        targets: without targets, classes at which the loss aims in turn, from every start: those with the
            largest logits of the clean cloud, apart from the label. Any misclassification is a success.
            AutoAttack's APGD-T has the loss ``"dlr"`` and 9. 0 moves away from the label instead.

    Examples:
        >>> attack = attacks.APGD("linf", epsilon=0.1, iterations=4)
        >>> result = attack(classifier, points, labels)
        >>> bool(result.distances["linf"].max() <= 0.1001)
        True
    """

    loss: Literal["ce", "dlr"] = "ce"
    iterations: PositiveInt = 100
    restarts: PositiveInt = 1
    rho: PositiveFraction = 0.75
    alpha: PositiveFraction = 0.75
    early_stop: bool = True
    targets: NonNegativeInt = 0

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Restarts the examples without success."""
        best = BestSoFar(points)  # rank 2 for a success, 1 otherwise
        taken = torch.zeros_like(oracle.queries)
        aims = [oracle] if oracle.targeted or not self.targets else self._aims(oracle, points)
        for _ in range(self.restarts):
            start = self.randomised(points, generator)
            for aim in aims:
                rows = (best.rank < 2).nonzero().squeeze(1)
                if len(rows) == 0:
                    return best.kept[0], taken
                self._descend(aim, points, start.clone(), rows, best, taken)
        return best.kept[0], taken

    def _aims(self, oracle: Oracle, points: Tensor) -> list[Oracle]:
        """Access to the model per class to aim at, the strongest first."""
        logits = oracle.logits(points)
        others = logits.scatter(1, oracle.labels[:, None], -torch.inf)
        count = min(self.targets, logits.shape[1] - 1)
        return [oracle.towards(classes) for classes in others.topk(count, dim=1).indices.T]

    def _descend(
        self, oracle: Oracle, points: Tensor, start: Tensor, rows: Tensor, best: BestSoFar, taken: Tensor
    ) -> None:
        """One start of the examples ``rows``; updates ``best`` and ``taken``."""
        loss, marks = LOSSES[self.loss], checkpoints(self.iterations)
        current, previous = start, start.clone()
        eta = points.new_full((len(points),), 2 * self.budget(points.shape[1]))
        value = torch.full_like(eta, -torch.inf)
        lowest, lowest_before = BestSoFar(points), torch.full_like(eta, torch.inf)
        lowered, halved = torch.zeros_like(eta), torch.zeros_like(eta, dtype=torch.bool)
        for step in range(self.iterations + 1):
            if step < self.iterations:
                logits, gradient = oracle.gradient(current[rows], loss, rows)
            else:
                logits = oracle.logits(current[rows], rows)
            new = loss(logits, oracle.classes[rows], oracle.targeted)
            reached = oracle.reached(logits, rows)
            best.see([current[rows]], 1 + reached.long(), new, rows)
            if step == self.iterations:
                return
            if self.early_stop:
                missing = ~reached
                rows, new, gradient = rows[missing], new[missing], gradient[missing]
                if len(rows) == 0:
                    return
            lowered[rows] += new < value[rows]
            value[rows] = new
            lowest.see([current[rows], gradient], torch.ones_like(rows), new, rows)
            if step in marks:
                since = step - max((mark for mark in marks if mark < step), default=0)
                stuck = lowered[rows] < self.rho * since
                stuck |= ~halved[rows] & (lowest.value[rows] >= lowest_before[rows])
                back = rows[stuck]
                eta[back] /= 2
                point, slope = lowest.kept
                current[back], previous[back] = point[back], point[back]
                value[back], gradient[stuck] = lowest.value[back], slope[back]
                lowest_before[rows], halved[rows], lowered[rows] = lowest.value[rows], stuck, 0
            here, clean = current[rows], points[rows]
            ahead = self.constrain(here - eta[rows, None, None] * steepest(gradient, self.norm), clean)
            alpha = self.alpha if step else 1.0
            there = here + alpha * (ahead - here) + (1 - alpha) * (here - previous[rows])
            previous[rows], current[rows] = here, self.constrain(there, clean)
            taken[rows] += 1


def checkpoints(iterations: int) -> list[int]:
    """Steps ``ceil(p_j * iterations)`` at which step sizes are reconsidered.

    ``p_0 = 0``, ``p_1 = 0.22``, ``p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)`` (section 3.2).
    """
    before, share = 0.0, 0.22
    marks = []
    while (mark := math.ceil(share * iterations - 1e-9)) < iterations:
        if mark not in marks:
            marks.append(mark)
        before, share = share, share + max(share - before - 0.03, 0.06)
    return marks
