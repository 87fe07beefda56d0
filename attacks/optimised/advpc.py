"""Perturbations that survive an auto-encoder, and so carry over to other networks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.base import Ball, Oracle, ThreatModel
from attacks.functional import distances
from attacks.functional.losses import hinge
from attacks.nearest import Nearest
from attacks.optimised import autoencoder
from attacks.optimised.carlini_wagner import shared_noise


@dataclass(frozen=True)
class AdvPC(Ball):
    """Fools a classifier on a cloud and on what an auto-encoder makes of it.

    Hamdi et al., ECCV 2020, `arXiv:1912.00461 <https://arxiv.org/abs/1912.00461>`_, with the settings of
    IF-Defense, `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_.

    Adam minimises ``(1 - gamma) hinge(x) + gamma hinge(AE(x))``, and each step is clipped to the budget. Of
    the iterates that fool the classifier, those are preferred whose reconstruction does so too, and among
    them the nearest is returned.

    Differs from the public code, in which an example whose reconstruction never succeeds keeps its last
    iterate even if others have succeeded; in that the budget is one of coordinates, as in the paper, not of
    the lengths of points, as in IF-Defense's code; and in that all clouds of a batch start from the same
    noise.

    Attributes:
        epsilon: largest change of a coordinate (published: 0.18).
        kappa: margin of the hinge in logits (published: 30).
        gamma: share of the loss of the reconstruction (published: 0.25).
        restarts: runs of Adam (published: 2).
        iterations: steps of Adam a run (published: 200).
        rate: learning rate of Adam (published: 1e-2).
        noise: standard deviation of the noise each run starts from (published: 1e-7).
        autoencoder: differentiable, ``(B, N, 3)`` clouds to ``(B, M, 3)``; by default the one that travels
            with the package.

    Raises:
        ValueError: if a number is out of range.
    """

    epsilon: float = 0.18
    kappa: float = 30.0
    gamma: float = 0.25
    restarts: int = 2
    iterations: int = 200
    rate: float = 1e-2
    noise: float = 1e-7
    autoencoder: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if min(self.epsilon, self.kappa, self.noise) < 0 or self.rate <= 0:
            raise ValueError(f"epsilon, kappa, noise and rate must not be negative: {self}")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must lie in 0..1, got {self.gamma}")
        if self.restarts < 1 or self.iterations < 1:
            raise ValueError(
                f"restarts and iterations must be at least 1, got {self.restarts} and {self.iterations}"
            )

    @property
    def threat(self) -> ThreatModel:
        """White box, shifts of coordinates."""
        return ThreatModel("white-box", "both", "shift", "linf", self.epsilon)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Descends from every start; the nearest success of all iterates is the result."""
        encode = self.autoencoder
        if encode is None and self.gamma:
            encode = autoencoder.pretrained(points.device, points.dtype)
        loss = functools.partial(hinge, kappa=self.kappa)
        nearest = Nearest(points)
        for _ in range(self.restarts):
            attacked = points + self.noise * shared_noise(points, generator)
            adam = torch.optim.Adam([attacked], lr=self.rate)
            for _ in range(self.iterations):
                logits, gradient = oracle.gradient(attacked, loss)
                rank = oracle.reached(logits).long()
                if encode is not None and self.gamma:
                    rebuilt_logits, routed = _through(encode, oracle, attacked, loss)
                    gradient = (1 - self.gamma) * gradient + self.gamma * routed
                    rank = rank * (1 + oracle.reached(rebuilt_logits).long())
                nearest.see(attacked, distances.l2(attacked, points), rank)
                attacked.grad = gradient
                adam.step()
                attacked.copy_(self.constrain(attacked, points))
        steps = self.restarts * self.iterations
        return nearest.result(attacked), torch.full_like(oracle.queries, steps)


def _through(
    encode: Callable[[Tensor], Tensor],
    oracle: Oracle,
    points: Tensor,
    loss: Callable[[Tensor, Tensor, bool], Tensor],
) -> tuple[Tensor, Tensor]:
    """Logits of the reconstruction, and the ``(B, N, 3)`` gradient of the loss there by the points."""
    with torch.enable_grad():
        source = points.detach().requires_grad_()
        rebuilt = encode(source)
        if not rebuilt.requires_grad:
            raise ValueError("the auto-encoder passes no gradient")
        logits, gradient = oracle.gradient(rebuilt, loss)
        (routed,) = torch.autograd.grad(rebuilt, source, gradient)
    return logits, routed
