"""Attacking the low frequencies of a cloud."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.base import Ball, Oracle, ThreatModel
from attacks.functional import distances
from attacks.functional.losses import hinge
from attacks.nearest import Nearest
from attacks.optimised.carlini_wagner import shared_noise
from ifdefense.geometry.points import knn, squared_distances


def graph_laplacian(points: Tensor, k: int = 30) -> Tensor:
    """Laplacian ``D - A`` of the graph of nearest neighbours.

    Two points are joined with weight ``exp(-d^2)`` if either is among the ``k`` nearest of the other, itself
    included. From `arXiv:2201.10937 <https://arxiv.org/abs/2201.10937>`_.

    Args:
        points: ``(B, N, 3)``, unit sphere.
        k: neighbours, the point itself included.

    Returns:
        ``(B, N, N)`` symmetric, with rows that sum to 0.
    """
    index = knn(points, points, min(k, points.shape[1]))[1]
    joined = torch.zeros(*points.shape[:2], points.shape[1], dtype=torch.bool, device=points.device)
    joined.scatter_(2, index, True)
    weight = torch.exp(-squared_distances(points, points)) * (joined | joined.mT)
    return torch.diag_embed(weight.sum(2)) - weight


def low_frequencies(points: Tensor, k: int = 30, count: int = 100) -> Tensor:
    """``(B, N, min(count, N))`` orthonormal eigenvectors of the graph's Laplacian with least eigenvalues."""
    # In single precision an eigenvalue is known to 1e-6 of the largest, too little to tell the lowest apart.
    vectors = torch.linalg.eigh(graph_laplacian(points.double(), k)).eigenvectors
    basis: Tensor = vectors[..., :count].to(points.dtype)
    return basis


@dataclass(frozen=True)
class AOF(Ball):
    """Attack on frequency: changes the low frequencies of a cloud, which carry over to other networks.

    Liu et al., 2022, `arXiv:2201.10937 <https://arxiv.org/abs/2201.10937>`_.

    With V the lowest eigenvectors of the graph's Laplacian, a cloud x is the sum of its low frequencies
    ``V V^T x`` and of what is left. Adam minimises ``(1 - gamma) hinge(x) + gamma hinge(V V^T x)`` over the
    low frequencies; after each step the cloud is brought back into the budget and split anew.

    Of the iterates that fool the classifier, those are preferred whose low frequencies alone do so too, and
    among them the nearest is returned. Differs from the public code, in which an example whose low
    frequencies never succeed alone keeps its last iterate even if others have succeeded; and all clouds of a
    batch start from the same noise.

    Attributes:
        epsilon: largest displacement of a point (published: 0.18).
        kappa: margin of the hinge in logits (published: 30).
        gamma: share of the loss of the low frequencies alone (published: 0.25).
        neighbours: of a point in the graph (published: 30).
        frequencies: eigenvectors that are attacked (published: 100).
        restarts: runs of Adam (published: 2).
        iterations: steps of Adam a run (published: 200).
        rate: learning rate of Adam (published: 1e-2).
        noise: standard deviation of the noise each run starts from (published: 1e-7).

    Raises:
        ValueError: if a number is out of range.
    """

    epsilon: float = 0.18
    kappa: float = 30.0
    gamma: float = 0.25
    neighbours: int = 30
    frequencies: int = 100
    restarts: int = 2
    iterations: int = 200
    rate: float = 1e-2
    noise: float = 1e-7

    def __post_init__(self) -> None:
        if min(self.epsilon, self.kappa, self.noise) < 0 or self.rate <= 0:
            raise ValueError(f"epsilon, kappa, noise and rate must not be negative: {self}")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must lie in 0..1, got {self.gamma}")
        if min(self.neighbours, self.frequencies, self.restarts, self.iterations) < 1:
            raise ValueError(
                f"neighbours, frequencies, restarts and iterations must be at least 1, got {self}"
            )

    @property
    def threat(self) -> ThreatModel:
        """White box, shifts of single points."""
        return ThreatModel("white-box", "both", "shift", "point-l2", self.epsilon)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Descends from every start; the nearest success of all iterates is the result."""
        basis = low_frequencies(points, self.neighbours, self.frequencies)
        loss = functools.partial(hinge, kappa=self.kappa)
        nearest = Nearest(points)
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
                nearest.see(attacked, distances.l2(attacked, points), rank)
                high = attacked - low
                low.grad = gradient
                adam.step()
                attacked = self.constrain(low + high, points)
                low.copy_(basis @ (basis.mT @ attacked))
        steps = self.restarts * self.iterations
        return nearest.result(attacked), torch.full_like(oracle.queries, steps)
