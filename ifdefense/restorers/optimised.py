"""Restoration by optimisation: attracts points to the surface and spreads them, without a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ifdefense.geometry.gathering import add_rows
from ifdefense.geometry.points import Neighbours
from ifdefense.implicit.base import Calibration, Field
from ifdefense.restorers.base import Restored
from ifdefense.timing import stage

NEAR = 0.5
"""Tolerance, in logits: a field has a surface if results lie on both sides of the level, or within it."""


@dataclasses.dataclass(frozen=True)
class Repulsion:
    """Mean over points and their nearest neighbours of ``(radius - d) exp(-(d / width)²)``.

    From PU-Net (Yu et al., CVPR 2018, https://arxiv.org/abs/1801.06761) in the form of IF-Defense. Lengths
    are in the unit cube.

    Attributes:
        neighbours: neighbours of each point.
        radius: distance at which the term changes its sign.
        width: reach of the term.

    Raises:
        ValueError: if an attribute is not positive.

    Examples:
        >>> Repulsion(neighbours=8).radius
        0.07
    """

    neighbours: int = 5
    radius: float = 0.07
    width: float = 0.03

    def __post_init__(self) -> None:
        if self.neighbours < 1 or not (self.radius > 0 and self.width > 0):
            raise ValueError(f"neighbours, radius and width of {self} must be positive")

    def near(self, points: Tensor, sizes: Sequence[int]) -> Tensor:
        """Indices ``(M, k)`` of the nearest points in the same cloud, without the point itself.

        Args:
            points: ``(M, 3)`` concatenated clouds.
            sizes: points of each cloud; if a cloud has too few, the last neighbour is repeated.
        """
        found, start = [], 0
        for part in points.split(list(sizes)):
            take = torch.arange(1, self.neighbours + 1, device=points.device).clamp(max=len(part) - 1)
            index = Neighbours(part)(part, min(self.neighbours + 1, len(part)))
            found.append(index[:, take] + start)
            start += len(part)
        return torch.cat(found)

    def gradient(self, points: Tensor, near: Tensor) -> Tensor:
        """Gradient ``(M, 3)`` of the sum over points of the mean over their neighbours.

        In closed form, which takes a third of the time of automatic differentiation.

        Args:
            points: ``(M, 3)``.
            near: ``(M, k)`` their neighbours, held fixed.
        """
        index = near.flatten()
        apart = points[:, None] - points.index_select(0, index).view(*near.shape, 3)
        squared = apart.square().sum(-1)
        distance = squared.clamp_min(1e-12).sqrt()
        inner = 1 + 2 / self.width**2 * distance * (self.radius - distance)
        slope = -(squared * (-1 / self.width**2)).exp() * inner / (distance * near.shape[1])
        pushes = apart * slope[..., None]  # (M, k, 3)
        return add_rows(pushes.sum(1), index, -pushes.flatten(0, 1))


class Problem(NamedTuple):
    """Problem of a solver: moves points of several clouds onto the level sets of their fields.

    Attributes:
        field: fields of all clouds.
        owner: ``(M,)`` cloud of each point, ascending.
        sizes: points of each cloud.
        calibration: level and threshold of the fields.
        repulsion: repulsion between the points.
    """

    field: Field
    owner: Tensor
    sizes: Sequence[int]
    calibration: Calibration
    repulsion: Repulsion

    def evaluate(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Logits relative to the level ``(M,)`` and their gradients ``(M, 3)``, both detached."""
        with torch.enable_grad():
            variable = points.detach().requires_grad_()
            height = self.field(variable, self.owner) - self.calibration.level
            (slope,) = torch.autograd.grad(height.sum(), variable)
        return height.detach(), slope

    def near(self, points: Tensor) -> Tensor:
        """Neighbours ``(M, k)`` of the points in the repulsion."""
        return self.repulsion.near(points, self.sizes)


class Solver(Protocol):
    """Moves points; usually a frozen dataclass."""

    def __call__(self, points: Tensor, problem: Problem) -> Tensor:
        """The moved points ``(M, 3)``. The points of a cloud must not depend on other clouds."""
        ...


@dataclasses.dataclass(frozen=True)
class Adam:
    """Descends ``attraction · mean BCE(logit, threshold) + spreading · repulsion`` by Adam.

    The defaults are those of IF-Defense (Wu et al. 2020, https://arxiv.org/abs/2010.05272), where the field
    is evaluated at each step.

    Attributes:
        steps: steps.
        rate: learning rate, unit cube.
        attraction: weight of the binary cross-entropy, averaged over the points of a cloud.
        spreading: weight of the repulsion.
        every: steps between evaluations of the field and searches of neighbours. In between, neighbours are
            held fixed and the logit is linearised.

    Raises:
        ValueError: if an attribute is out of range.

    Examples:
        >>> Adam(steps=50, every=4).rate
        0.001
    """

    steps: int = 201
    rate: float = 1e-3
    attraction: float = 1024.0
    spreading: float = 500.0
    every: int = 1

    def __post_init__(self) -> None:
        if min(self.steps, self.every) < 1 or not self.rate > 0 or min(self.attraction, self.spreading) < 0:
            raise ValueError(f"steps, every and rate of {self} must be positive, the weights not negative")

    def __call__(self, points: Tensor, problem: Problem) -> Tensor:
        """See `Solver`."""
        threshold, level = problem.calibration.threshold, problem.calibration.level
        sizes = torch.tensor(problem.sizes, device=points.device)
        share = (1 / sizes.to(points.dtype)).repeat_interleave(sizes)[:, None]  # of a point in its mean
        mean, variance = torch.zeros_like(points), torch.zeros_like(points)
        for step in range(self.steps):
            if step % self.every == 0:
                start = points
                height, slope = problem.evaluate(points)
                near = problem.near(points)
            logit = height + ((points - start) * slope).sum(1) + level
            pull = (logit.sigmoid() - threshold)[:, None] * slope
            push = problem.repulsion.gradient(points, near)
            gradient = (self.attraction * pull + self.spreading * push) * share
            mean = torch.lerp(mean, gradient, 0.1)
            variance = torch.addcmul(0.999 * variance, gradient, gradient, value=0.001)
            size = (variance / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            points = points - self.rate / (1 - 0.9 ** (step + 1)) * mean / size
        return points


@dataclasses.dataclass(frozen=True)
class Newton:
    """Newton steps ``x - (f - level) ∇f / |∇f|²`` onto the surface, alternating with repulsion along it.

    Attributes:
        steps: Newton steps, one evaluation of the field each.
        limit: maximum length of a Newton step, unit cube.
        spreads: steps of repulsion in the tangent planes, after each Newton step but the last.
        rate: factor from the gradient of the repulsion to a step.

    Raises:
        ValueError: if an attribute is out of range.

    Examples:
        >>> Newton(steps=5).limit
        0.05
    """

    steps: int = 10
    limit: float = 0.05
    spreads: int = 5
    rate: float = 0.005

    def __post_init__(self) -> None:
        if self.steps < 1 or self.spreads < 0 or not (self.limit > 0 and self.rate > 0):
            raise ValueError(f"steps, limit and rate of {self} must be positive, spreads not negative")

    def __call__(self, points: Tensor, problem: Problem) -> Tensor:
        """See `Solver`."""
        for step in range(self.steps):
            height, slope = problem.evaluate(points)
            steepness = slope.norm(dim=1, keepdim=True).clamp_min(1e-6)
            normal = slope / steepness
            points = points - (height[:, None] / steepness).clamp(-self.limit, self.limit) * normal
            if step == self.steps - 1 or self.spreads == 0:
                continue
            near = problem.near(points)
            for _ in range(self.spreads):
                push = problem.repulsion.gradient(points, near)
                push = push - (push * normal).sum(1, keepdim=True) * normal
                points = points - self.rate * push
        return points


@dataclasses.dataclass(frozen=True)
class OptimisedRestorer:
    """Moves noisy input points onto the surface and spreads them over it: "-Opt" of IF-Defense.

    Wu et al., "IF-Defense: 3D Adversarial Point Cloud Defense via Implicit Function based Restoration", 2020
    (https://arxiv.org/abs/2010.05272). The initial points are drawn from the input, each as equally often as
    possible, with noise. Results are moved inwards by the offset of the calibration, if any.

    Attributes:
        solver: how points move: `Adam` as published, or `Newton`.
        noise: standard deviation of the noise at the start, unit cube.
        repulsion: what spreads the points.

    Raises:
        ValueError: if ``noise`` is negative.

    Examples:
        >>> restorer = OptimisedRestorer(Newton(steps=5))
        >>> restorer.repulsion.neighbours
        5
    """

    differentiable: ClassVar[bool] = False

    solver: Solver = Adam()
    noise: float = 0.01
    repulsion: Repulsion = Repulsion()

    def __post_init__(self) -> None:
        if not self.noise >= 0:
            raise ValueError(f"noise must not be negative, got {self.noise}")

    def __call__(
        self,
        field: Field,
        clouds: Sequence[Tensor],
        counts: Sequence[int],
        calibration: Calibration,
        seed: int,
    ) -> list[Restored]:
        """See `ifdefense.restorers.base.Restorer`."""
        with stage("optimisation"), torch.no_grad():
            points = torch.cat([self._start(*each, seed) for each in zip(clouds, counts, strict=True)])
            sizes = torch.tensor(counts, device=points.device)
            owner = torch.arange(len(counts), device=points.device).repeat_interleave(sizes)
            problem = Problem(field, owner, counts, calibration, self.repulsion)
            points = self.solver(points, problem)
            height, slope = problem.evaluate(points)
            inward = slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-12)
            points = points + calibration.offset * inward
        parts = zip(points.split(list(counts)), height.split(list(counts)), strict=True)
        return [Restored(part if _crossed(heights) else None) for part, heights in parts]

    def _start(self, cloud: Tensor, count: int, seed: int) -> Tensor:
        """``(count, 3)`` points of a cloud with noise."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(cloud), generator=generator)[torch.arange(count) % len(cloud)]
        noise = self.noise * torch.randn(count, 3, generator=generator, dtype=torch.float32)
        return cloud.detach()[order.to(cloud.device)] + noise.to(cloud)


def _crossed(height: Tensor) -> bool:
    """Whether heights ``(N,)`` show a surface; a field that is the same everywhere has none."""
    return bool(height.min() <= NEAR) and bool(height.max() >= -NEAR)
