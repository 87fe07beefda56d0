"""Fast gradient methods: one step, iterated, with momentum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.gradient.pgd import Bounded, Iterated, descend
from attacks.oracle import Oracle
from attacks.settings import NonNegativeFloat


@dataclass(frozen=True)
class FGM(Bounded):
    """One step of the whole budget down the gradient of the cross-entropy.

    Goodfellow et al., 2015, `arXiv:1412.6572 <https://arxiv.org/abs/1412.6572>`_ (``"linf"``); Liu et al.,
    2019, `arXiv:1901.03006 <https://arxiv.org/abs/1901.03006>`_, for clouds; budget of IF-Defense,
    `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_, see `Bounded`.

    Examples:
        >>> attack = attacks.FGM("l2", epsilon=0.5)
        >>> result = attack(classifier, points, labels)
        >>> result.points.shape
        torch.Size([2, 64, 3])
    """

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One step from the clean cloud."""
        return descend(self, oracle, points, points.clone(), 1)


@dataclass(frozen=True)
class IFGM(Iterated):
    """`FGM` in projected steps: `PGD` without random start.

    Kurakin et al., 2017, `arXiv:1607.02533 <https://arxiv.org/abs/1607.02533>`_, with the settings of
    IF-Defense, `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_, see `Iterated`.

    Attributes:
        early_stop: whether an example stops at its first success (published: no).

    Examples:
        >>> attack = attacks.IFGM("l2", epsilon=0.5, iterations=3)
        >>> result = attack(classifier, points, labels)
        >>> result.points.shape
        torch.Size([2, 64, 3])
    """

    early_stop: bool = False

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Descends from the clean cloud."""
        start = points.clone()
        return descend(self, oracle, points, start, self.iterations, self.step, early_stop=self.early_stop)


@dataclass(frozen=True)
class MIFGM(IFGM):
    """`IFGM` with momentum.

    Dong et al., 2018, `arXiv:1710.06081 <https://arxiv.org/abs/1710.06081>`_, algorithm 1: steps along
    ``v = momentum * v + g / |g|_1``. Settings of IF-Defense, `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_.

    Attributes:
        momentum: decay of the accumulated gradients (published: 1).

    Examples:
        >>> attack = attacks.MIFGM("l2", epsilon=0.5, iterations=3, momentum=0.9)
        >>> result = attack(classifier, points, labels)
        >>> result.points.shape
        torch.Size([2, 64, 3])
    """

    momentum: NonNegativeFloat = 1.0

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Descends from the clean cloud with momentum."""
        start, stop = points.clone(), self.early_stop
        return descend(
            self, oracle, points, start, self.iterations, self.step, momentum=self.momentum, early_stop=stop
        )
