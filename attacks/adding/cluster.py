"""Adding small clusters of points."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.adding.critical import draw_members
from attacks.adding.groups import AddGroups
from attacks.functional import distances
from attacks.functional.noise import shared_noise
from attacks.optimised.carlini_wagner import SearchSpace
from attacks.oracle import Oracle
from attacks.settings import PositiveOrInfinite
from ifdefense.geometry.points import directed_chamfer, gather


@dataclass(frozen=True)
class AddCluster(AddGroups):
    """Adds a few compact clusters of points near the cloud.

    Xiang et al., 2019, `arXiv:1809.07016 <https://arxiv.org/abs/1809.07016>`_, with the settings of
    IF-Defense, `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_. The distance of `CarliniWagner` is the
    sum of the clusters' diameters plus ``chamfer_weight`` times the one-sided squared Chamfer distance. Added
    points come last; the original ones are not moved. Settings are those of `AddGroups`.

    Differs from IF-Defense's code: clusters of too few points are repeated as a whole, not drawn with
    replacement; too few clusters are no error; all clouds of a batch share their random numbers.

    Examples:
        >>> attack = attacks.AddCluster(num=1, size=16, critical=16, searches=1, iterations=2)
        >>> result = attack(classifier, points, labels)
        >>> result.points.shape
        torch.Size([2, 80, 3])
    """

    largest_weight: PositiveOrInfinite = 30.0

    def distance(self, added: Tensor, clean: Tensor) -> Tensor:
        """``(B,)`` distance of the added points ``(B, num * size, 3)``."""
        clusters = added.unflatten(1, (self.num, self.size))
        spread: Tensor = (
            distances.diameter(clusters.flatten(0, 1)).unflatten(0, (len(added), self.num)).sum(1)
        )
        return spread + self.chamfer_weight * directed_chamfer(added, clean)

    def space(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> SearchSpace:
        """Varies the added points."""
        critical, members = self.seeds(oracle, points, self.size, generator)
        first = gather(critical, draw_members(members, self.size, generator)).flatten(1, 2)
        return SearchSpace(
            start=lambda generator: [first + self.noise * shared_noise(first, generator)],
            clouds=lambda variables, rows: torch.cat([points[rows], variables[0]], 1),
            distance=lambda variables, _, rows: self.distance(variables[0], points[rows]),
        )
