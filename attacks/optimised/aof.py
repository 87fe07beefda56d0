"""Transferable perturbations of low frequencies."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.base import Ball, Norm, ThreatModel
from attacks.best_so_far import BestSoFar
from attacks.functional import distances
from attacks.functional.losses import hinge
from attacks.functional.noise import shared_noise
from attacks.oracle import Oracle
from attacks.settings import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from ifdefense.devices import in_float64
from ifdefense.geometry.points import knn, squared_distances


def graph_laplacian(points: Tensor, k: int = 30) -> Tensor:
    """``(B, N, N)`` Laplacian ``D - A`` of the nearest-neighbour graph with weights ``exp(-d^2)``.

    Args:
        points: ``(B, N, 3)``, unit sphere.
        k: neighbours, including the point itself; an edge exists if either end chooses the other.
    """
    index = knn(points, points, min(k, points.shape[1]))[1]
    joined = torch.zeros(*points.shape[:2], points.shape[1], dtype=torch.bool, device=points.device)
    joined.scatter_(2, index, True)
    weight = torch.exp(-squared_distances(points, points)) * (joined | joined.mT)
    return torch.diag_embed(weight.sum(2)) - weight


def low_frequencies(points: Tensor, k: int = 30, count: int = 100) -> Tensor:
    """``(B, N, min(count, N))`` eigenvectors of the Laplacian with the smallest eigenvalues."""
    # Single precision (1e-6 of the largest eigenvalue) is too coarse to separate the smallest ones.
    vectors = torch.linalg.eigh(graph_laplacian(in_float64(points), k)).eigenvectors
    basis: Tensor = vectors[..., :count].to(points)
    return basis


@dataclass(frozen=True)
class AOF(Ball):
    """Attack on frequency: shifts the low frequencies of a cloud, for transferability.

    Liu et al., 2022, `arXiv:2201.10937 <https://arxiv.org/abs/2201.10937>`_. With the lowest eigenvectors V
    of the graph Laplacian, Adam minimises ``(1 - gamma) hinge(x) + gamma hinge(V V^T x)`` over the low
    frequencies ``V V^T x``; after each step the cloud is projected onto the budget and split again.

    Returns the nearest iterate that reaches the goal with its low frequencies alone too, else the nearest
    that reaches it, else the last. Differs from the public code, which only accepts the first kind; and all
    clouds of a batch share their noise.

    Attributes:
        epsilon: budget in ``norm`` (published: 0.18).
        kappa: margin of the hinge in logits (published: 30).
        gamma: weight of the low frequencies alone (published: 0.25).
        neighbours: neighbours in the graph (published: 30).
        frequencies: eigenvectors (published: 100).
        restarts: runs of Adam (published: 2).
        iterations: steps of Adam per run (published: 200).
        rate: learning rate of Adam (published: 1e-2).
        noise: standard deviation of the noise at the start of a run (published: 1e-7).
        norm: norm of the budget (published: ``"point-l2"``).

    Examples:
        >>> attack = attacks.AOF(restarts=1, iterations=2, neighbours=8, frequencies=20)
        >>> result = attack(classifier, points, labels)
        >>> result.points.shape
        torch.Size([2, 64, 3])
    """

    epsilon: NonNegativeFloat = 0.18
    kappa: NonNegativeFloat = 30.0
    gamma: Fraction = 0.25
    neighbours: PositiveInt = 30
    frequencies: PositiveInt = 100
    restarts: PositiveInt = 2
    iterations: PositiveInt = 200
    rate: PositiveFloat = 1e-2
    noise: NonNegativeFloat = 1e-7
    norm: Norm = "point-l2"

    @property
    def threat(self) -> ThreatModel:
        """White-box shifts of points."""
        return ThreatModel("white-box", "both", "shift", self.norm, self.epsilon)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Runs all restarts; returns the iterates described above."""
        basis = low_frequencies(points, self.neighbours, self.frequencies)
        loss = functools.partial(hinge, kappa=self.kappa)
        best = BestSoFar(points)
        for _ in range(self.restarts):
            attacked = points + self.noise * shared_noise(points, generator)
            low = basis @ (basis.mT @ attacked)
            adam = torch.optim.Adam([low], lr=self.rate)
            for _ in range(self.iterations):
                logits, gradient = oracle.gradient(attacked, loss)
                rank = oracle.reached(logits).long()
                if self.gamma:
                    low_logits, low_gradient = oracle.gradient(low, loss)
                    gradient = (1 - self.gamma) * gradient + self.gamma * low_gradient
                    rank = rank * (1 + oracle.reached(low_logits).long())
                best.see([attacked], rank, distances.l2(attacked, points))
                high = attacked - low
                low.grad = gradient
                adam.step()
                attacked = self.constrain(low + high, points)
                low.copy_(basis @ (basis.mT @ attacked))
        steps = self.restarts * self.iterations
        return best.clouds(attacked), torch.full_like(oracle.queries, steps)
