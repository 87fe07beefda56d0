"""Transferable perturbations that survive an auto-encoder."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attacks.base import Ball, ThreatModel
from attacks.best_so_far import BestSoFar
from attacks.functional import distances
from attacks.functional.losses import hinge
from attacks.functional.noise import shared_noise
from attacks.oracle import Oracle
from attacks.settings import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from ifdefense.logits import placed
from ifdefense.point_networks.autoencoder import SHIPPED, AutoEncoder


@functools.cache
def pretrained() -> AutoEncoder:
    """The shipped auto-encoder."""
    return AutoEncoder.load(SHIPPED)


@dataclass(frozen=True)
class AdvPC(Ball):
    """Fools a classifier on a cloud and on its reconstruction by an auto-encoder, for transferability.

    Hamdi et al., ECCV 2020, `arXiv:1912.00461 <https://arxiv.org/abs/1912.00461>`_, with the settings of
    IF-Defense, `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_. Adam minimises
    ``(1 - gamma) hinge(x) + gamma hinge(AE(x))``, projected onto the budget after each step.

    Returns the iterate nearest in the Euclidean norm that reaches the goal together with its reconstruction;
    else the nearest one that reaches it alone; else the last one. The authors' code compares by the largest
    change of a coordinate, accepts only iterates whose reconstruction leaves the true class as well, and
    otherwise returns the clean cloud. The PyTorch version with these settings does the same, except that it
    otherwise returns the last iterate and limits the shift of each point instead of each coordinate. Here all
    clouds of a
    batch share their noise.

    Attributes:
        epsilon: largest change of a coordinate (published: 0.18).
        kappa: margin of the hinge in logits (published: 30).
        gamma: weight of the reconstruction (published: 0.25).
        restarts: runs of Adam (published: 2).
        iterations: steps of Adam per run (published: 200).
        rate: learning rate of Adam (published: 1e-2).
        noise: standard deviation of the noise at the start of a run (published: 1e-7).
        autoencoder: differentiable, ``(B, N, 3)`` to ``(B, M, 3)`` clouds; by default the shipped one, which
            works in the dtype and on the device of the points.

    Examples:
        >>> attack = attacks.AdvPC(restarts=1, iterations=2)
        >>> result = attack(classifier, points, labels)
        >>> result.points.shape
        torch.Size([2, 64, 3])
    """

    epsilon: NonNegativeFloat = 0.18
    kappa: NonNegativeFloat = 30.0
    gamma: Fraction = 0.25
    restarts: PositiveInt = 2
    iterations: PositiveInt = 200
    rate: PositiveFloat = 1e-2
    noise: NonNegativeFloat = 1e-7
    autoencoder: Callable[[Tensor], Tensor] = field(default_factory=pretrained, repr=False)

    @property
    def threat(self) -> ThreatModel:
        """White-box shifts of coordinates."""
        return ThreatModel("white-box", "both", "shift", "linf", self.epsilon)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Runs all restarts; returns the iterates described above."""
        encode = self.autoencoder
        if isinstance(encode, AutoEncoder):
            encode = copy.deepcopy(encode).to(points.device, points.dtype)
        loss = functools.partial(hinge, kappa=self.kappa)
        best = BestSoFar(points)
        for _ in range(self.restarts):
            attacked = points + self.noise * shared_noise(points, generator)
            adam = torch.optim.Adam([attacked], lr=self.rate)
            for _ in range(self.iterations):
                logits, gradient = oracle.gradient(attacked, loss)
                rank = oracle.reached(logits).long()
                if self.gamma:
                    rebuilt_logits, routed = _through(encode, oracle, attacked, loss)
                    gradient = (1 - self.gamma) * gradient + self.gamma * routed
                    rank = rank * (1 + oracle.reached(rebuilt_logits).long())
                best.see([attacked], rank, distances.l2(attacked, points))
                attacked.grad = gradient
                adam.step()
                attacked.copy_(self.constrain(attacked, points))
        steps = self.restarts * self.iterations
        return best.clouds(attacked), torch.full_like(oracle.queries, steps)


def _through(
    encode: Callable[[Tensor], Tensor],
    oracle: Oracle,
    points: Tensor,
    loss: Callable[[Tensor, Tensor, bool], Tensor],
) -> tuple[Tensor, Tensor]:
    """Logits of the reconstruction and the ``(B, N, 3)`` gradient of its loss by the points."""
    with torch.enable_grad():
        source = points.detach().requires_grad_()
        rebuilt = encode(placed(encode, source)).to(source)
        if not rebuilt.requires_grad:
            raise ValueError("the auto-encoder passes no gradient")
        logits, gradient = oracle.gradient(rebuilt, loss)
        (routed,) = torch.autograd.grad(rebuilt, source, gradient)
    return logits, routed
