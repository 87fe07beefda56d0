"""Adding single points close to the surface."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.adding.critical import critical_points
from attacks.base import Oracle, ThreatModel
from attacks.functional import distances
from attacks.optimised.carlini_wagner import CarliniWagner, Problem, shared_noise


@dataclass(frozen=True)
class _AddPoints(CarliniWagner):
    """Adds points that start at the critical ones; a subclass says how far a set of points is."""

    num: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num < 1:
            raise ValueError(f"num must be at least 1, got {self.num}")

    @property
    def threat(self) -> ThreatModel:
        """White box, targeted or untargeted, ``num`` points as close to the cloud as possible."""
        return ThreatModel("white-box", "both", "add", count=self.num)

    @staticmethod
    @abstractmethod
    def distance(added: Tensor, clean: Tensor) -> Tensor:
        """``(B,)`` distances of added points from clean clouds."""

    def problem(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> Problem:
        """Varies the added points, from the critical ones on."""
        critical = critical_points(oracle, points, self.num)
        return Problem(
            start=lambda generator: [critical + self.noise * shared_noise(critical, generator)],
            clouds=lambda variables, rows: torch.cat([points[rows], variables[0]], 1),
            distance=lambda variables, _, rows: self.distance(variables[0], points[rows]),
        )


@dataclass(frozen=True)
class AddCD(_AddPoints):
    """Adds points that are close to the cloud on average.

    Xiang et al., 2019, `arXiv:1809.07016 <https://arxiv.org/abs/1809.07016>`_, with the settings of
    IF-Defense, `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_.

    Minimises ``hinge(logits) + weight * distance``, as `CarliniWagner` does; the distance is the mean over
    the added points of the squared distance to the nearest original one. They start at the points with the
    largest squared gradient of the cross-entropy and come last in the returned clouds; the original ones stay
    as they are.

    Differs from IF-Defense's code in that a cloud with fewer than ``num`` points is starting points over
    again, and in that all clouds of a batch start from the same noise.

    Attributes:
        kappa: margin of the hinge in logits (published: 0).
        first_weight: weight of the distance in the first search (published: 5e3).
        largest_weight: upper end of the bisection (published: 4e4).
        searches: steps of the bisection (published: 10).
        iterations: steps of Adam a search (published: 500).
        rate: learning rate of Adam (published: 1e-2).
        noise: standard deviation of the noise each search starts from (published: 1e-7).
        polish: steps after the first success of a search (published: all that are left), see `CarliniWagner`.
        num: points to add (published: 512).

    Raises:
        ValueError: if a number is out of range.
    """

    first_weight: float = 5e3
    largest_weight: float = 4e4

    @staticmethod
    def distance(added: Tensor, clean: Tensor) -> Tensor:
        """One-sided Chamfer distance, squared."""
        return distances.directed_chamfer(added, clean)


@dataclass(frozen=True)
class AddHD(_AddPoints):
    """Adds points none of which is far from the cloud.

    As `AddCD`, but the distance is the largest squared distance of an added point from its nearest original
    one.

    Attributes:
        kappa: margin of the hinge in logits (published: 0).
        first_weight: weight of the distance in the first search (published: 2e2).
        largest_weight: upper end of the bisection (published: 9e2).
        searches: steps of the bisection (published: 10).
        iterations: steps of Adam a search (published: 500).
        rate: learning rate of Adam (published: 1e-2).
        noise: standard deviation of the noise each search starts from (published: 1e-7).
        polish: steps after the first success of a search (published: all that are left), see `CarliniWagner`.
        num: points to add (published: 512).

    Raises:
        ValueError: if a number is out of range.
    """

    first_weight: float = 2e2
    largest_weight: float = 9e2

    @staticmethod
    def distance(added: Tensor, clean: Tensor) -> Tensor:
        """One-sided Hausdorff distance, squared."""
        return distances.directed_hausdorff(added, clean)
