"""Adding points close to the surface."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.adding.critical import critical_points
from attacks.base import ThreatModel
from attacks.functional import distances
from attacks.functional.noise import shared_noise
from attacks.optimised.carlini_wagner import CarliniWagner, SearchSpace
from attacks.oracle import Oracle
from attacks.settings import PositiveFloat, PositiveInt, PositiveOrInfinite
from ifdefense.geometry.points import directed_chamfer


@dataclass(frozen=True)
class _AddPoints(CarliniWagner):
    """Adds points that start at the critical ones; a subclass defines their distance."""

    num: PositiveInt = 512

    @property
    def threat(self) -> ThreatModel:
        """White-box, targeted or untargeted, ``num`` points."""
        return ThreatModel("white-box", "both", "add", count=self.num)

    @staticmethod
    @abstractmethod
    def distance(added: Tensor, clean: Tensor) -> Tensor:
        """``(B,)`` distances of added points to clean clouds."""

    def space(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> SearchSpace:
        """Varies the added points."""
        critical = critical_points(oracle, points, self.num)
        return SearchSpace(
            start=lambda generator: [critical + self.noise * shared_noise(critical, generator)],
            clouds=lambda variables, rows: torch.cat([points[rows], variables[0]], 1),
            distance=lambda variables, _, rows: self.distance(variables[0], points[rows]),
        )


@dataclass(frozen=True)
class AddCD(_AddPoints):
    """Adds points close to the cloud on average (Chamfer distance).

    Xiang et al., 2019, `arXiv:1809.07016 <https://arxiv.org/abs/1809.07016>`_, with the settings of
    IF-Defense, `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_. The distance of `CarliniWagner` is the
    mean squared distance of the added points to the nearest original ones. They start at the critical points
    and come last; the original points are not moved.

    Differs from IF-Defense's code in that clouds of fewer than ``num`` points repeat their critical points,
    and in that all clouds of a batch share their noise.

    Attributes:
        num: points to add (published: 512).

    Examples:
        >>> attack = attacks.AddCD(num=16, searches=1, iterations=2)
        >>> result = attack(classifier, points, labels)
        >>> result.points.shape
        torch.Size([2, 80, 3])
    """

    first_weight: PositiveFloat = 5e3
    largest_weight: PositiveOrInfinite = 4e4

    @staticmethod
    def distance(added: Tensor, clean: Tensor) -> Tensor:
        """One-sided squared Chamfer distance."""
        return directed_chamfer(added, clean)


@dataclass(frozen=True)
class AddHD(_AddPoints):
    """Adds points none of which is far from the cloud (Hausdorff distance).

    As `AddCD`, `arXiv:1809.07016 <https://arxiv.org/abs/1809.07016>`_ and
    `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_, with the largest squared distance of an added
    point to the nearest original one.

    Attributes:
        num: points to add (published: 512).

    Examples:
        >>> attack = attacks.AddHD(num=16, searches=1, iterations=2)
        >>> result = attack(classifier, points, labels)
        >>> result.points.shape
        torch.Size([2, 80, 3])
    """

    first_weight: PositiveFloat = 2e2
    largest_weight: PositiveOrInfinite = 9e2

    @staticmethod
    def distance(added: Tensor, clean: Tensor) -> Tensor:
        """One-sided squared Hausdorff distance."""
        return distances.directed_hausdorff(added, clean)
