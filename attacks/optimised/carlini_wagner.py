"""Carlini & Wagner's optimisation: the nearest cloud that is classified as the attacker wants."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from attacks.base import Attack, Oracle, ThreatModel
from attacks.functional import distances
from attacks.functional.losses import hinge
from attacks.nearest import Nearest

Rows = Tensor | slice
"""Indices into a batch."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What an attack of this family searches, on one batch.

    ``rows`` are the examples of the batch that variables and clouds stand for.

    Attributes:
        start: the variables that a search begins with, fresh tensors with the batch as first axis.
        clouds: variables and rows to the ``(b, M, 3)`` clouds they stand for; differentiable.
        distance: variables, their clouds and rows to the ``(b,)`` distance to be made small; differentiable.
    """

    start: Callable[[torch.Generator], list[Tensor]]
    clouds: Callable[[list[Tensor], Rows], Tensor]
    distance: Callable[[list[Tensor], Tensor, Rows], Tensor]


@dataclass(frozen=True)
class CarliniWagner(Attack):
    """Minimises ``loss(logits) + weight * distance`` and bisects each example's weight.

    Carlini & Wagner, 2017, `arXiv:1608.04644 <https://arxiv.org/abs/1608.04644>`_; with a weight on the
    distance, as in IF-Defense, not on the loss. A subclass says in `problem` what varies and which distance
    counts.

    Each search is one run of Adam from fresh noise; all examples take part, each with its own weight. A
    weight is raised after a search that succeeded and lowered after one that failed: halfway to the end of
    the range that is still open, or twofold while that has no upper end. The success with the smallest
    distance among all iterates is returned; an example without one keeps its last iterate.

    Attributes:
        kappa: margin of the hinge in logits.
        first_weight: weight of the distance in the first search.
        largest_weight: upper end of the bisection, infinite for none.
        searches: steps of the bisection.
        iterations: steps of Adam a search.
        rate: learning rate of Adam.
        noise: standard deviation of the noise each search starts from.
        polish: steps that an example takes after its first success in a search, to come nearer; then it
            leaves the batch, and the time goes to the hard ones. ``None`` for all the steps of the search.

    Raises:
        ValueError: if a number is out of range.
    """

    nearer_only: ClassVar[bool] = True
    """Whether a search also fails if an earlier one has been nearer, as in IF-Defense's code."""

    kappa: float = 0.0
    first_weight: float = 10.0
    largest_weight: float = 80.0
    searches: int = 10
    iterations: int = 500
    rate: float = 1e-2
    noise: float = 1e-7
    polish: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.polish is not None and self.polish < 0:
            raise ValueError(f"polish must not be negative, got {self.polish}")
        if self.searches < 1 or self.iterations < 1:
            raise ValueError(
                f"searches and iterations must be at least 1, got {self.searches} and {self.iterations}"
            )
        if not 0 < self.first_weight <= self.largest_weight:
            raise ValueError(
                "weights must satisfy 0 < first_weight <= largest_weight, "
                f"got {self.first_weight} and {self.largest_weight}"
            )
        if self.kappa < 0 or self.noise < 0 or self.rate <= 0:
            raise ValueError(f"kappa, noise and rate must not be negative: {self}")

    @abstractmethod
    def problem(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> Problem:
        """What varies, which clouds it makes and how far they are.

        Args:
            oracle: model under attack and goal.
            points: ``(B, N, 3)`` clean clouds; not to be changed.
            generator: source of randomness, on the CPU.
        """

    @property
    def loss(self) -> Callable[[Tensor, Tensor, bool], Tensor]:
        """One of `attacks.functional.losses`; by default the hinge with margin ``kappa``."""
        return functools.partial(hinge, kappa=self.kappa)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Bisects the weight of every example at once."""
        problem = self.problem(oracle, points, generator)
        lower = points.new_zeros(len(points))
        upper = torch.full_like(lower, self.largest_weight)
        weight = torch.full_like(lower, self.first_weight)
        nearest = torch.full_like(lower, torch.inf)
        best = last = points
        taken = torch.zeros_like(oracle.queries)
        for search in range(self.searches):
            found, distance, last = self._search(oracle, problem, weight, generator, taken)
            succeeded = distance.isfinite()
            nearer = succeeded & (distance <= nearest)
            best = found if search == 0 else torch.where(nearer[:, None, None], found, best)
            nearest = torch.where(nearer, distance, nearest)
            raised = nearer if self.nearer_only else succeeded
            lower, upper = torch.where(raised, weight, lower), torch.where(raised, upper, weight)
            weight = torch.where(upper.isinf(), 2 * lower, (lower + upper) / 2)
        return torch.where(nearest.isfinite()[:, None, None], best, last), taken

    def _search(
        self,
        oracle: Oracle,
        problem: Problem,
        weight: Tensor,
        generator: torch.Generator,
        taken: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One run of Adam: the nearest success, its distance (infinite without one), and the last iterate."""
        variables = [variable.requires_grad_() for variable in problem.start(generator)]
        adam = torch.optim.Adam(variables, lr=self.rate)
        everyone = slice(None)
        nearest = Nearest(problem.clouds(variables, everyone).detach())
        left = torch.full_like(taken, self.iterations)  # steps until an example leaves
        rows: Rows = everyone
        for _ in range(self.iterations):
            with torch.enable_grad():
                part = [variable[rows] for variable in variables]
                clouds = problem.clouds(part, rows)
                distance = problem.distance(part, clouds, rows)
            logits, gradient = oracle.gradient(clouds, self.loss, rows)
            taken[rows] += 1
            reached = oracle.reached(logits, rows)
            nearest.see(clouds.detach(), distance.detach(), reached.long(), rows)
            # Adam goes on with the variables of those who have left; nobody looks at them any more.
            gradients = torch.autograd.grad([clouds, distance], variables, [gradient, weight[rows]])
            for variable, slope in zip(variables, gradients, strict=True):
                variable.grad = slope
            adam.step()
            if self.polish is not None:
                left[rows] = torch.where(reached, left[rows].clamp_max(self.polish + 1), left[rows]) - 1
                rows = left.nonzero().squeeze(1)
                if len(rows) == 0:
                    break
        return nearest.points, nearest.size, problem.clouds(variables, everyone).detach()


@dataclass(frozen=True)
class Perturb(CarliniWagner):
    """Shifts points as little as possible towards another class.

    Xiang et al., 2019, `arXiv:1809.07016 <https://arxiv.org/abs/1809.07016>`_, with the settings of
    IF-Defense, `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_.

    Minimises ``hinge(logits) + weight * |shift|``, as `CarliniWagner` does. Nothing is clipped, so the size
    of the shift is an outcome, not a budget.

    Differs from IF-Defense's code in that all clouds of a batch start from the same noise.

    Attributes:
        kappa: margin of the hinge in logits (published: 0).
        first_weight: weight of the distance in the first search (published: 10).
        largest_weight: upper end of the bisection (published: 80).
        searches: steps of the bisection (published: 10).
        iterations: steps of Adam a search (published: 500).
        rate: learning rate of Adam (published: 1e-2).
        noise: standard deviation of the noise each search starts from (published: 1e-7).
        polish: steps after the first success of a search (published: all that are left), see `CarliniWagner`.

    Raises:
        ValueError: if a number is out of range.
    """

    @property
    def threat(self) -> ThreatModel:
        """White box, targeted or untargeted, the smallest global shift."""
        return ThreatModel("white-box", "both", "shift", "l2")

    def problem(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> Problem:
        """Varies the clouds themselves."""
        return Problem(
            start=lambda generator: [points + self.noise * shared_noise(points, generator)],
            clouds=lambda variables, _: variables[0],
            distance=lambda _, clouds, rows: distances.l2(clouds, points[rows]),
        )


def shared_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise for one example, to be added to all of a batch, ``like.shape[1:]``."""
    return torch.randn(like.shape[1:], generator=generator, dtype=like.dtype).to(like.device)
