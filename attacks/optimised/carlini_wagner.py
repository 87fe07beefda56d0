"""Search of Carlini & Wagner for the nearest adversarial cloud."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from attacks.base import Attack, Oracle, Rows
from attacks.functional.losses import hinge
from attacks.nearest import Nearest
from attacks.settings import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, PositiveOrInfinite


@dataclass(frozen=True, eq=False)
class Problem:
    """Search space of an attack on one batch; ``rows`` are the examples that variables belong to.

    Attributes:
        start: new variables, with the batch as first axis, for a search.
        clouds: variables and rows to ``(b, M, 3)`` clouds; differentiable.
        distance: variables, their clouds and rows to the ``(b,)`` distance to minimise; differentiable.
    """

    start: Callable[[torch.Generator], list[Tensor]]
    clouds: Callable[[list[Tensor], Rows], Tensor]
    distance: Callable[[list[Tensor], Tensor, Rows], Tensor]


@dataclass(frozen=True)
class CarliniWagner(Attack):
    """Minimises ``loss(logits) + weight * distance`` with a bisection of the weight per example.

    Carlini & Wagner, 2017, `arXiv:1608.04644 <https://arxiv.org/abs/1608.04644>`_; the weight is on the
    distance, as in IF-Defense, not on the loss. Each search is a run of Adam from new noise. The weight is
    raised after a success and lowered after a failure, to the middle of the remaining interval, or doubled
    while that is unbounded. Returns the success of smallest distance, or else the last iterate.

    A subclass defines the `problem`. The published settings of an attack are its defaults.

    Attributes:
        kappa: margin of the hinge in logits.
        first_weight: weight of the distance in the first search.
        largest_weight: upper end of the bisection, possibly infinite.
        searches: steps of the bisection.
        iterations: steps of Adam per search.
        rate: learning rate of Adam.
        noise: standard deviation of the noise at the start of a search.
        polish: steps of an example after its first success in a search, before it leaves the batch; ``None``
            for all steps, as published.
        refine: start a search from the nearest success of the earlier ones, where there is one, not from
            noise, and let steps shrink linearly to zero, over ``polish`` from the first success on, or over
            ``iterations``. Not published; comes nearer in fewer steps.

    Raises:
        ValueError: if a setting is out of range.
    """

    nearer_only: ClassVar[bool] = True
    """Whether a search that comes no nearer than an earlier one counts as failed, as in IF-Defense. With
    ``refine`` it always does."""

    kappa: NonNegativeFloat = 0.0
    first_weight: PositiveFloat = 10.0
    largest_weight: PositiveOrInfinite = 80.0
    searches: PositiveInt = 10
    iterations: PositiveInt = 500
    rate: PositiveFloat = 1e-2
    noise: NonNegativeFloat = 1e-7
    polish: NonNegativeInt | None = field(default=None, kw_only=True)
    refine: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first_weight > self.largest_weight:
            raise ValueError(
                f"first_weight must not exceed largest_weight, got {self.first_weight} and "
                f"{self.largest_weight}"
            )

    @abstractmethod
    def problem(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> Problem:
        """Search space of a batch; the arguments are those of `Attack.run`."""

    @property
    def loss(self) -> Callable[[Tensor, Tensor, bool], Tensor]:
        """Adversarial loss; by default the hinge with margin ``kappa``."""
        return functools.partial(hinge, kappa=self.kappa)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Bisects the weights of all examples at once."""
        problem = self.problem(oracle, points, generator)
        lower = points.new_zeros(len(points))
        upper = torch.full_like(lower, self.largest_weight)
        weight = torch.full_like(lower, self.first_weight)
        nearest = torch.full_like(lower, torch.inf)
        best = last = points
        taken = torch.zeros_like(oracle.queries)
        kept: list[Tensor] = []
        for search in range(self.searches):
            start = problem.start(generator)
            if self.refine and search > 0:
                succeeded = nearest.isfinite()
                for variable, success in zip(start, kept, strict=True):
                    variable[succeeded] = success[succeeded]
            found, distance, last, variables = self._search(oracle, problem, weight, start, taken)
            succeeded = distance.isfinite()
            # A refining search begins with the earlier success, so it has to come nearer than that.
            nearer = succeeded & ((distance < nearest) if self.refine else (distance <= nearest))
            best = found if search == 0 else torch.where(nearer[:, None, None], found, best)
            kept = kept or variables
            for success, variable in zip(kept, variables, strict=True):
                success[nearer] = variable[nearer]
            nearest = torch.where(nearer, distance, nearest)
            raised = nearer if self.nearer_only or self.refine else succeeded
            lower, upper = torch.where(raised, weight, lower), torch.where(raised, upper, weight)
            weight = torch.where(upper.isinf(), 2 * lower, (lower + upper) / 2)
        return torch.where(nearest.isfinite()[:, None, None], best, last), taken

    def _search(
        self,
        oracle: Oracle,
        problem: Problem,
        weight: Tensor,
        start: list[Tensor],
        taken: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """One run of Adam.

        Returns:
            Nearest success, its distance (infinite without one), last iterate, variables of the success.
        """
        kept = [variable.clone() for variable in start]
        variables = [variable.requires_grad_() for variable in start]
        adam = torch.optim.Adam(variables, lr=self.rate)
        everyone = slice(None)
        nearest = Nearest(problem.clouds(variables, everyone).detach())
        left = torch.full_like(taken, self.iterations)  # steps until an example leaves
        cooling = self.iterations if self.polish is None else self.polish + 1
        rows: Rows = everyone
        for _ in range(self.iterations):
            with torch.enable_grad():
                part = [variable[rows] for variable in variables]
                clouds = problem.clouds(part, rows)
                distance = problem.distance(part, clouds, rows)
            logits, gradient = oracle.gradient(clouds, self.loss, rows)
            taken[rows] += 1
            reached = oracle.reached(logits, rows)
            which = nearest.see(clouds.detach(), distance.detach(), reached.long(), rows)
            for success, variable in zip(kept, variables, strict=True):
                success[which] = variable.detach()[which]
            if self.polish is not None:
                left[rows] = torch.where(reached, left[rows].clamp_max(self.polish + 1), left[rows])
            # Adam also updates the variables of examples that have left; they are not read again.
            gradients = torch.autograd.grad([clouds, distance], variables, [gradient, weight[rows]])
            for variable, slope in zip(variables, gradients, strict=True):
                variable.grad = slope
            if self.refine:
                _partial_step(adam, variables, (left / cooling).clamp_max(1).to(weight))
            else:
                adam.step()
            left[rows] -= 1
            if self.polish is not None:
                rows = left.nonzero().squeeze(1)
                if len(rows) == 0:
                    break
        return nearest.points, nearest.size, problem.clouds(variables, everyone).detach(), kept


def _partial_step(adam: torch.optim.Adam, variables: list[Tensor], share: Tensor) -> None:
    """A step of which each example takes its share ``(B,)``."""
    before = [variable.detach().clone() for variable in variables]
    adam.step()
    for variable, old in zip(variables, before, strict=True):
        variable.copy_(old.lerp(variable, share.view(-1, *[1] * (old.ndim - 1))))
