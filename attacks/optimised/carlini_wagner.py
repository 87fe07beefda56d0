"""Search of Carlini & Wagner for the nearest adversarial cloud."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from attacks.base import Attack
from attacks.best_so_far import BestSoFar
from attacks.functional.losses import hinge
from attacks.oracle import Oracle, Rows
from attacks.settings import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, PositiveOrInfinite


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """Variables and objective of an attack on one batch; ``rows`` are the examples of the variables.

    Attributes:
        start: new variables, with the batch as first axis, for a search.
        clouds: variables and rows to ``(b, M, 3)`` clouds; differentiable.
        distance: variables, their clouds and rows to the ``(b,)`` distance to minimise; differentiable.
        size: variables to the ``(b,)`` size for comparing successes; by default the distance.
        rates: learning rate per variable, as a multiple of that of the attack; by default all 1.
        limit: limits variables in place after each step.
    """

    start: Callable[[torch.Generator], list[Tensor]]
    clouds: Callable[[list[Tensor], Rows], Tensor]
    distance: Callable[[list[Tensor], Tensor, Rows], Tensor]
    size: Callable[[list[Tensor]], Tensor] | None = None
    rates: Sequence[float] | None = None
    limit: Callable[[list[Tensor]], None] | None = None


@dataclass(frozen=True)
class Search:
    """The search of `CarliniWagner`; settings are described there.

    Attributes:
        loss: adversarial loss.
        evaluated_only: whether an example without success returns the last evaluated iterate instead of the
            one after it.
    """

    loss: Callable[[Tensor, Tensor, bool], Tensor]
    first_weight: float
    largest_weight: float
    searches: int
    iterations: int
    rate: float
    polish: int | None = None
    refine: bool = False
    nearer_only: bool = True
    evaluated_only: bool = False

    def __call__(
        self, space: SearchSpace, oracle: Oracle, points: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Bisects the weights of all examples at once; see `Attack.run`."""
        lower = points.new_zeros(len(points))
        upper = torch.full_like(lower, self.largest_weight)
        weight = torch.full_like(lower, self.first_weight)
        best, last = BestSoFar(points), points
        taken = torch.zeros_like(oracle.queries)
        for _ in range(self.searches):
            start, before = space.start(generator), best.value.clone()
            if self.refine and best.kept:
                again = best.rank > 0
                for variable, success in zip(start, best.kept[1:], strict=True):
                    variable[again] = success[again]
            smallest, last = self._once(oracle, space, weight, start, best, taken)
            # A refining search starts from an earlier success and must improve on it.
            raised = (smallest < before) if self.refine else smallest.isfinite()
            if self.nearer_only:
                raised = raised & (smallest <= before)
            lower, upper = torch.where(raised, weight, lower), torch.where(raised, upper, weight)
            weight = torch.where(upper.isinf(), 2 * lower, (lower + upper) / 2)
        return best.clouds(last), taken

    def _once(
        self,
        oracle: Oracle,
        space: SearchSpace,
        weight: Tensor,
        start: list[Tensor],
        best: BestSoFar,
        taken: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One run of Adam; updates ``best`` with every iterate and adds to ``taken``.

        Returns:
            ``(B,)`` size of the smallest success of this search, infinite without one, and the last iterate.
        """
        variables = [variable.requires_grad_() for variable in start]
        rates = [1.0] * len(variables) if space.rates is None else space.rates
        groups = zip(variables, rates, strict=True)
        adam = torch.optim.Adam([{"params": [one], "lr": rate * self.rate} for one, rate in groups])
        everyone = slice(None)
        smallest = torch.full_like(weight, torch.inf)
        last = space.clouds(variables, everyone).detach().clone()
        left = torch.full_like(taken, self.iterations)  # remaining steps per example
        cooling = self.iterations if self.polish is None else self.polish + 1
        rows: Rows = everyone
        for _ in range(self.iterations):
            with torch.enable_grad():
                part = [variable[rows] for variable in variables]
                clouds = space.clouds(part, rows)
                distance = space.distance(part, clouds, rows)
            logits, gradient = oracle.gradient(clouds, self.loss, rows)
            taken[rows] += 1
            reached = oracle.reached(logits, rows)
            seen = [clouds.detach(), *(variable.detach() for variable in part)]
            size = distance.detach() if space.size is None else space.size(seen[1:])
            best.see(seen, reached.long(), size, rows)
            smallest[rows] = torch.where(reached, size.minimum(smallest[rows]), smallest[rows])
            last[rows] = seen[0]
            if self.polish is not None:
                left[rows] = torch.where(reached, left[rows].clamp_max(self.polish + 1), left[rows])
            # Adam also updates variables of finished examples; these are not read again.
            gradients = torch.autograd.grad([clouds, distance], variables, [gradient, weight[rows]])
            for variable, slope in zip(variables, gradients, strict=True):
                variable.grad = slope
            if self.refine:
                _partial_step(adam, variables, (left / cooling).clamp_max(1).to(weight))
            else:
                adam.step()
            if space.limit is not None:
                space.limit(variables)
            left[rows] -= 1
            if self.polish is not None:
                rows = left.nonzero().squeeze(1)
                if len(rows) == 0:
                    break
        return smallest, last if self.evaluated_only else space.clouds(variables, everyone).detach()


@dataclass(frozen=True)
class CarliniWagner(Attack):
    """Minimises ``loss(logits) + weight * distance`` with a bisection of the weight per example.

    Carlini & Wagner, 2017, `arXiv:1608.04644 <https://arxiv.org/abs/1608.04644>`_; the weight is on the
    distance, as in IF-Defense, not on the loss. Each search is a run of Adam from a new start. The weight is
    raised after a success and lowered after a failure, to the middle of the remaining interval, or doubled
    while that is unbounded. Returns the success of smallest distance, or else the last iterate.

    A subclass defines the `space`. The published settings of an attack are its defaults.

    Attributes:
        kappa: margin of the hinge in logits.
        first_weight: weight of the distance in the first search.
        largest_weight: upper end of the bisection, possibly infinite.
        searches: steps of the bisection.
        iterations: steps of Adam per search.
        rate: learning rate of Adam.
        noise: standard deviation of the noise at the start of a search.
        polish: steps of an example after its first success in a search; ``None`` for all steps, as published.
        refine: start a search from the nearest earlier success, if there is one, instead of noise, and
            decrease steps linearly to zero, over ``polish`` steps after the first success or over
            ``iterations``. Not published; finds smaller shifts in fewer steps.

    Raises:
        ValueError: if a setting is out of range.
    """

    nearer_only: ClassVar[bool] = True
    """Whether a search without improvement over an earlier one counts as failed, as in IF-Defense; always
    with ``refine``."""

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
    def space(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> SearchSpace:
        """Search space of a batch; the arguments are those of `Attack.run`."""

    @property
    def loss(self) -> Callable[[Tensor, Tensor, bool], Tensor]:
        """Adversarial loss; by default the hinge with margin ``kappa``."""
        return functools.partial(hinge, kappa=self.kappa)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Searches the space."""
        search = Search(
            self.loss,
            self.first_weight,
            self.largest_weight,
            self.searches,
            self.iterations,
            self.rate,
            self.polish,
            self.refine,
            self.nearer_only,
        )
        return search(self.space(oracle, points, generator), oracle, points, generator)


def _partial_step(adam: torch.optim.Adam, variables: list[Tensor], share: Tensor) -> None:
    """A step scaled per example by its share ``(B,)``."""
    before = [variable.detach().clone() for variable in variables]
    adam.step()
    for variable, old in zip(variables, before, strict=True):
        variable.copy_(old.lerp(variable, share.view(-1, *[1] * (old.ndim - 1))))
