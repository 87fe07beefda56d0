"""Carlini & Wagner's optimisation: the nearest cloud that is classified as the attacker wants."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks import distances
from attacks.base import Attack, Oracle, ThreatModel
from attacks.losses import hinge


@dataclass(frozen=True)
class Perturb(Attack):
    """Shifts points as little as possible towards another class.

    Xiang et al., 2019, `arXiv:1809.07016 <https://arxiv.org/abs/1809.07016>`_, with the settings of
    IF-Defense, `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_.

    Minimises ``hinge(logits) + weight * |shift|`` with Adam, and looks by bisection for each example's
    largest weight that still succeeds. The nearest success of all iterates is returned; an example without
    one keeps its last iterate. Nothing is clipped, so the size of the shift is an outcome, not a budget.

    Attributes:
        kappa: margin of the hinge in logits (published: 0).
        first_weight: weight of the distance in the first search (published: 10).
        largest_weight: upper end of the bisection (published: 80).
        searches: steps of the bisection (published: 10).
        iterations: steps of Adam a search (published: 500).
        rate: learning rate of Adam (published: 1e-2).
        noise: standard deviation of the noise each search starts from (published: 1e-7).

    Raises:
        ValueError: if a number is out of range.
    """

    kappa: float = 0.0
    first_weight: float = 10.0
    largest_weight: float = 80.0
    searches: int = 10
    iterations: int = 500
    rate: float = 1e-2
    noise: float = 1e-7

    def __post_init__(self) -> None:
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

    @property
    def threat(self) -> ThreatModel:
        """White box, targeted or untargeted, the smallest global shift."""
        return ThreatModel("white-box", "both", "shift", "l2")

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Bisects the weight of every example at once."""
        lower = points.new_zeros(len(points))
        upper = torch.full_like(lower, self.largest_weight)
        weight = torch.full_like(lower, self.first_weight)
        best, nearest = points, torch.full_like(lower, torch.inf)
        for _ in range(self.searches):
            found, found_distance, last = self._search(oracle, points, weight, generator)
            # As published: a search also fails if an earlier one has been nearer.
            succeeded = found_distance.isfinite() & (found_distance <= nearest)
            best = torch.where(succeeded[:, None, None], found, best)
            nearest = torch.where(succeeded, found_distance, nearest)
            lower, upper = torch.where(succeeded, weight, lower), torch.where(succeeded, upper, weight)
            weight = (lower + upper) / 2
        attacked = torch.where(nearest.isfinite()[:, None, None], best, last)
        return attacked, torch.full_like(oracle.queries, self.searches * self.iterations)

    def _search(
        self, oracle: Oracle, points: Tensor, weight: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One run of Adam: the nearest success, its distance (infinite without one), and the last iterate."""
        noise = torch.randn(points.shape[1:], generator=generator, dtype=points.dtype).to(points.device)
        attacked = points + self.noise * noise
        adam = torch.optim.Adam([attacked], lr=self.rate)
        found, nearest = points.clone(), torch.full_like(weight, torch.inf)
        loss = functools.partial(hinge, kappa=self.kappa)
        tiny = torch.finfo(points.dtype).tiny
        for _ in range(self.iterations):
            logits, gradient = oracle.gradient(attacked, loss)
            distance = distances.l2(attacked, points)
            nearer = oracle.reached(logits) & (distance < nearest)
            found[nearer], nearest[nearer] = attacked[nearer], distance[nearer]
            pull = (weight / distance.clamp_min(tiny))[:, None, None] * (attacked - points)
            attacked.grad = gradient + pull
            adam.step()
        return found, nearest, attacked
