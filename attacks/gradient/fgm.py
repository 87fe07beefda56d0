"""Gradient methods that start from the clean cloud: one step, several, and several with momentum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.base import Oracle
from attacks.gradient.pgd import Bounded, Iterated, descend


@dataclass(frozen=True)
class FGM(Bounded):
    """One step of the whole budget down the gradient of the cross-entropy.

    Goodfellow et al., 2015, `arXiv:1412.6572 <https://arxiv.org/abs/1412.6572>`_, whose sign method is
    ``"linf"``; Liu et al., 2019, `arXiv:1901.03006 <https://arxiv.org/abs/1901.03006>`_, brought the other
    norms to clouds. The budget is IF-Defense's,
    `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_.

    Attributes:
        norm: norm of the budget, as in `Bounded`.
        delta: size of the budget a coordinate (IF-Defense: 0.08).
        epsilon: budget in the norm itself, instead of ``delta``.

    Raises:
        ValueError: if a budget is negative.
    """

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Takes the step."""
        return descend(self, oracle, points, points.clone(), 1)


@dataclass(frozen=True)
class IFGM(Iterated):
    """`FGM` in small steps, each projected onto the budget: `PGD` without its random start.

    Kurakin et al., 2017, `arXiv:1607.02533 <https://arxiv.org/abs/1607.02533>`_, with the settings of
    IF-Defense, `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_.

    Attributes:
        norm: norm of the budget, as in `Bounded`.
        delta: size of the budget a coordinate (IF-Defense: 0.08).
        epsilon: budget in the norm itself, instead of ``delta``.
        iterations: steps (IF-Defense: 50).
        step: length of a step, as a share of the budget; by default one over the iterations (IF-Defense).
        early_stop: whether an example stops once it has reached its goal. Published figures come without.

    Raises:
        ValueError: if a budget is negative or there is no iteration.
    """

    early_stop: bool = False

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Descends from the clean cloud; the last iterate is the result."""
        start = points.clone()
        return descend(self, oracle, points, start, self.iterations, self.step, early_stop=self.early_stop)


@dataclass(frozen=True)
class MIFGM(IFGM):
    """`IFGM` along a running sum of the gradients instead of the last one.

    Dong et al., 2018, `arXiv:1710.06081 <https://arxiv.org/abs/1710.06081>`_, algorithm 1: every gradient g
    joins the sum as ``v = momentum * v + g / |g|_1``, and the step goes a fixed length along v. The budget,
    the iterations and the step are IF-Defense's, `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_.

    Attributes:
        norm: norm of the budget, as in `Bounded`.
        delta: size of the budget a coordinate (IF-Defense: 0.08).
        epsilon: budget in the norm itself, instead of ``delta``.
        iterations: steps (IF-Defense: 50).
        step: length of a step, as a share of the budget; by default one over the iterations (IF-Defense).
        early_stop: whether an example stops once it has reached its goal. Published figures come without.
        momentum: share of the sum that is kept (published: 1).

    Raises:
        ValueError: if a budget or the momentum is negative or there is no iteration.
    """

    momentum: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum < 0:
            raise ValueError(f"momentum must not be negative, got {self.momentum}")

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Descends from the clean cloud with momentum; the last iterate is the result."""
        start, stop = points.clone(), self.early_stop
        return descend(
            self, oracle, points, start, self.iterations, self.step, momentum=self.momentum, early_stop=stop
        )
