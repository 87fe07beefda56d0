"""Smooth deformations, hidden where a surface is rough."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.base import Ball, Oracle, ThreatModel
from attacks.functional import distances
from attacks.functional.losses import cross_entropy, hinge
from attacks.nearest import Nearest
from ifdefense.geometry.normals import estimated_normals
from ifdefense.geometry.points import farthest_point_sampling, gather, knn, squared_distances


def roughness(points: Tensor, k: int = 16) -> tuple[Tensor, Tensor]:
    """How curved a surface is at every point, and how much that varies around it.

    The curvature is the mean of ``|<n, (q - p) / |q - p|>|`` over the ``k`` neighbours q of a point p with
    normal n; its standard deviation is taken over the same neighbours.

    Args:
        points: ``(B, N, 3)``.
        k: neighbours, at least 2.

    Returns:
        ``(B, N)`` curvature and ``(B, N)`` standard deviation.
    """
    k = min(k, points.shape[1] - 1)
    curvature = distances.curvature(points, estimated_normals(points, k + 1), k)
    around = gather(curvature.unsqueeze(2), knn(points, points, k + 1)[1][..., 1:]).squeeze(3)
    return curvature, around.std(2)


def deformed(points: Tensor, centres: Tensor, shift: Tensor, sigma: Tensor) -> Tensor:
    """Moves every point by the mean shift of the centres, weighted by a Gaussian of their distance.

    ``x + sum_j w_j(x) p_j / sum_j w_j(x)`` with ``w_j(x) = exp(-|x - c_j|^2 / (2 sigma_j^2))``.

    Args:
        points: ``(B, N, 3)``.
        centres: ``(B, C, 3)``, same frame.
        shift: ``(B, C, 3)`` shift p of each centre.
        sigma: ``(B, C)`` width of its Gaussian, in units of the points.

    Returns:
        ``(B, N, 3)``; no coordinate moves by more than the largest of the shifts.
    """
    exponent = -squared_distances(points, centres) / (2 * sigma * sigma).unsqueeze(1)
    return points + exponent.softmax(2) @ shift


def _unit_range(values: Tensor) -> Tensor:
    """``(B, N)`` rows scaled to [0, 1]."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    return (values - low) / (high - low + 1e-7)


@dataclass(frozen=True)
class HiTADV(Ball):
    """Hide in thicket: deforms a cloud smoothly around centres in its rough, salient parts.

    Lou et al., CVPR 2024, `arXiv:2403.05247 <https://arxiv.org/abs/2403.05247>`_.

    Farthest-point sampling gives ``candidates`` regions; in the neighbourhood of each the point of highest
    score is a centre, and of these the ``centres`` best stay. The score is how much the curvature varies, and
    a little of the saliency of `SaliencyDrop`. Each centre has a shift and the width of a
    Gaussian, and a point moves by the weighted mean of the shifts. Adam minimises the hinge plus a weight
    times the size of the deformation: ``(|shifts| + |1 - widths|) / centres``, the cosine between the widths
    and the curvature at the centres (wide kernels belong where it is flat), and a one-sided Chamfer distance.
    The weight is bisected as in `Perturb`. The success of smallest ``(|shifts| + |1 - widths|)``
    is returned.

    Differs from the public code in that the Gaussian falls with the *squared* distance; that scores, and the
    size of the deformation, are taken for each cloud, not over the batch; that normals are estimated; and
    that all clouds of a batch start from the same shifts and widths, and farthest-point sampling from their
    first point.

    Attributes:
        epsilon: largest shift of a coordinate of a centre, and so of a point (published: 0.55).
        kappa: margin of the hinge in logits (published: 30).
        centres: centres of the deformation (published: 192).
        candidates: regions they are chosen from (published: 256). Clouds of fewer points have fewer of both.
        smallest: least width of a Gaussian (published: 0.1).
        largest: greatest width (published: 1.2).
        neighbours: of a point, for the curvature and the regions (published: 16).
        first_weight: weight of the deformation's size in the first search (published: 10).
        largest_weight: upper end of the bisection (published: 80).
        chamfer: weight of the Chamfer distance in that size (published: 1e-4).
        searches: steps of the bisection (published: 10).
        iterations: steps of Adam a search (published: 100).
        rate: learning rate of Adam, times 5 for shifts and times 3 for widths (published: 1e-2).

    Raises:
        ValueError: if a number is out of range.
    """

    epsilon: float = 0.55
    kappa: float = 30.0
    centres: int = 192
    candidates: int = 256
    smallest: float = 0.1
    largest: float = 1.2
    neighbours: int = 16
    first_weight: float = 10.0
    largest_weight: float = 80.0
    chamfer: float = 1e-4
    searches: int = 10
    iterations: int = 100
    rate: float = 1e-2

    def __post_init__(self) -> None:
        if min(self.epsilon, self.kappa, self.chamfer) < 0 or self.rate <= 0:
            raise ValueError(f"epsilon, kappa, chamfer and rate must not be negative: {self}")
        if not 1 <= self.centres <= self.candidates:
            raise ValueError(
                f"1 <= centres <= candidates must hold, got {self.centres} and {self.candidates}"
            )
        if not 0 < self.smallest <= self.largest:
            raise ValueError(
                f"widths must satisfy 0 < smallest <= largest, got {self.smallest} and {self.largest}"
            )
        if not 0 < self.first_weight <= self.largest_weight:
            raise ValueError(
                "weights must satisfy 0 < first_weight <= largest_weight, "
                f"got {self.first_weight} and {self.largest_weight}"
            )
        if self.searches < 1 or self.iterations < 1 or self.neighbours < 2:
            raise ValueError(f"searches and iterations must be at least 1, neighbours 2: {self}")

    @property
    def threat(self) -> ThreatModel:
        """White box, untargeted, a smooth shift of limited coordinates."""
        return ThreatModel("white-box", "untargeted", "shift", "linf", self.epsilon)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Bisects the weight of every example at once."""
        centres, curvature = self._centres(oracle, points)
        lower = points.new_zeros(len(points))
        upper = torch.full_like(lower, self.largest_weight)
        weight = torch.full_like(lower, self.first_weight)
        nearest = Nearest(points)
        for _ in range(self.searches):
            before = nearest.size.clone()
            found, last = self._search(oracle, points, centres, curvature, weight, generator)
            nearest.see(found.points, found.size, found.rank)
            succeeded = (found.rank > 0) & (found.size <= before)
            lower, upper = torch.where(succeeded, weight, lower), torch.where(succeeded, upper, weight)
            weight = (lower + upper) / 2
        steps = self.searches * self.iterations
        return nearest.result(last), torch.full_like(oracle.queries, steps)

    def _centres(self, oracle: Oracle, points: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, C, 3)`` centres, and ``(B, C)`` the curvature there."""
        candidates = min(self.candidates, points.shape[1])
        _, gradient = oracle.gradient(points, cross_entropy)
        offset = points - points.median(1, keepdim=True).values
        # The attacker's loss is minus the cross-entropy, so this is the saliency itself.
        saliency = offset.norm(dim=2) * (offset * gradient).sum(2)
        curvature, spread = roughness(points, self.neighbours)
        score = 0.001 * _unit_range(saliency) + _unit_range(spread)
        regions = gather(points, farthest_point_sampling(points, candidates))
        members = knn(regions, points, min(self.neighbours + 1, points.shape[1]))[1]  # (B, regions, k)
        top = gather(score.unsqueeze(2), members).squeeze(3).max(2)
        index = members.gather(2, top.indices.unsqueeze(2)).squeeze(2)
        chosen = index.gather(1, top.values.topk(min(self.centres, candidates), 1).indices)
        return gather(points, chosen), curvature.gather(1, chosen)

    def _search(
        self,
        oracle: Oracle,
        points: Tensor,
        centres: Tensor,
        curvature: Tensor,
        weight: Tensor,
        generator: torch.Generator,
    ) -> tuple[Nearest, Tensor]:
        """One run of Adam: the smallest success of each example, and the last iterate."""
        count = centres.shape[1]
        draw = torch.rand(count, 4, generator=generator, dtype=points.dtype).to(points.device)
        shift = (self.epsilon * draw[:, :3]).repeat(len(points), 1, 1)
        sigma = (self.smallest + (self.largest - self.smallest) * draw[:, 3]).repeat(len(points), 1)
        adam = torch.optim.Adam(
            [{"params": [shift], "lr": 5 * self.rate}, {"params": [sigma], "lr": 3 * self.rate}]
        )
        loss = functools.partial(hinge, kappa=self.kappa)
        rough = _unit_range(curvature)
        nearest = Nearest(points)
        for _ in range(self.iterations):
            with torch.enable_grad():
                shift.requires_grad_()
                sigma.requires_grad_()
                attacked = deformed(points, centres, shift, sigma)
                logits, gradient = oracle.gradient(attacked, loss)
                size = _size(shift, 0) + _size(sigma, 1)
                width = (sigma - self.smallest) / (self.largest - self.smallest + 1e-7)
                price = size + torch.cosine_similarity(rough, width, dim=1)
                if self.chamfer:
                    price = price + self.chamfer * knn(attacked, points, 1)[0].mean((1, 2))
                total = (attacked * gradient).sum() + (weight * price).sum()
                shift.grad, sigma.grad = torch.autograd.grad(total, (shift, sigma))
            shift.requires_grad_(False)
            sigma.requires_grad_(False)
            nearest.see(attacked.detach(), size.detach(), oracle.reached(logits).long())
            adam.step()
            shift.clamp_(-self.epsilon, self.epsilon)
            sigma.clamp_(self.smallest, self.largest)
        return nearest, attacked.detach()


def _size(values: Tensor, rest: float) -> Tensor:
    """``(B,)`` distance of each example's parameters from ``rest``, by the number of centres.

    Its gradient is 0, not NaN, where the distance is.
    """
    squared = (values - rest).flatten(1).square().sum(1)
    return squared.clamp_min(torch.finfo(values.dtype).tiny).sqrt() / values.shape[1]
