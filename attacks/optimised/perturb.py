"""Smallest shifts in the Euclidean norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.base import ThreatModel
from attacks.functional import distances
from attacks.functional.noise import shared_noise
from attacks.optimised.carlini_wagner import CarliniWagner, SearchSpace
from attacks.oracle import Oracle


@dataclass(frozen=True)
class Perturb(CarliniWagner):
    """Smallest shift of the points that changes the class.

    Xiang et al., 2019, `arXiv:1809.07016 <https://arxiv.org/abs/1809.07016>`_, with the settings of
    IF-Defense, `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_. Minimises
    ``hinge(logits) + weight * |shift|``, see `CarliniWagner`; the size of the shift is not bounded.

    Differs from IF-Defense's code in that all clouds of a batch share their noise.

    Examples:
        >>> attack = attacks.Perturb(searches=1, iterations=3)
        >>> result = attack(classifier, points, labels)
        >>> result.distances.keys() >= {'l2', 'linf'}
        True
    """

    @property
    def threat(self) -> ThreatModel:
        """White-box, targeted or untargeted, smallest global shift."""
        return ThreatModel("white-box", "both", "shift", "l2")

    def space(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> SearchSpace:
        """Varies the clouds."""
        return SearchSpace(
            start=lambda generator: [points + self.noise * shared_noise(points, generator)],
            clouds=lambda variables, _: variables[0],
            distance=lambda _, clouds, rows: distances.l2(clouds, points[rows]),
        )
