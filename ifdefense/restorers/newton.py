"""Differentiable restoration: points projected onto the level set of the field."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ifdefense.implicit.base import Calibration, Field
from ifdefense.restorers.base import Restored
from ifdefense.restorers.mesh import MeshRestorer
from ifdefense.timing import stage


@dataclasses.dataclass(frozen=True)
class NewtonRestorer:
    """Projects points onto the surface by Newton steps ``x - (f - level) ∇f / |∇f|²``.

    Points start as samples of the mesh of `MeshRestorer`, whose result is then matched up to the grid's
    resolution, or at the input points, which cover only the sampled parts of the surface. Gradients pass
    through the last step with points and normals held fixed. By the implicit function theorem this is the
    exact derivative of the surface along its normals with respect to the field, and thus to the clouds.

    Attributes:
        mesh: extraction, repair and sampling of the starting points; ``None`` starts at the input points.
        steps: Newton steps, at least 1.
        limit: maximum step length, unit cube.
    """

    differentiable: ClassVar[bool] = True

    mesh: MeshRestorer | None = MeshRestorer()
    steps: int = 3
    limit: float = 0.02

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.limit > 0:
            raise ValueError(f"steps must be at least 1 and limit positive, got {self.steps}, {self.limit}")

    def __call__(
        self,
        field: Field,
        clouds: Sequence[Tensor],
        counts: Sequence[int],
        calibration: Calibration,
        seed: int,
    ) -> list[Restored]:
        """See `ifdefense.restorers.base.Restorer`."""
        with torch.no_grad():
            starts = self._starts(field, [cloud.detach() for cloud in clouds], counts, calibration, seed)
        rows = [row for row, start in enumerate(starts) if start.points is not None]
        points = [start.points for start in starts if start.points is not None]
        if not rows:
            return starts
        sizes = [len(part) for part in points]
        owner = torch.tensor(rows, device=points[0].device).repeat_interleave(
            torch.tensor(sizes, device=points[0].device)
        )
        with stage("projection"):
            moved = self._projected(field, torch.cat(points), owner, calibration)
        for row, part in zip(rows, moved.split(sizes), strict=True):
            starts[row] = dataclasses.replace(starts[row], points=part)
        return starts

    def _starts(
        self,
        field: Field,
        clouds: Sequence[Tensor],
        counts: Sequence[int],
        calibration: Calibration,
        seed: int,
    ) -> list[Restored]:
        """Samples of the mesh without the offset, or input points, repeated if there are too few."""
        if self.mesh is not None:
            return self.mesh(field, clouds, counts, dataclasses.replace(calibration, offset=0.0), seed)
        generator = torch.Generator().manual_seed(seed)
        found = []
        for cloud, count in zip(clouds, counts, strict=True):
            order = torch.randperm(len(cloud), generator=generator.manual_seed(seed)).to(cloud.device)
            found.append(Restored(cloud[order[torch.arange(count, device=cloud.device) % len(cloud)]]))
        return found

    def _projected(self, field: Field, points: Tensor, owner: Tensor, calibration: Calibration) -> Tensor:
        """Projects points ``(M, 3)`` onto the level set and moves them inwards by the offset."""
        points = points.detach()
        gradients = torch.is_grad_enabled()
        for last in [False] * (self.steps - 1) + [True]:
            height, slope = height_and_slope(field, points, owner, calibration)
            step = slope / slope.square().sum(1, keepdim=True).clamp_min(1e-12)
            if last and gradients:  # re-evaluate with a graph to the field
                height = field(points, owner) - calibration.level
            move = height[:, None] * step
            length = move.detach().norm(dim=1, keepdim=True)
            points = points - move * (self.limit / length.clamp_min(self.limit))
        inward: Tensor = slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return points + calibration.offset * inward


def height_and_slope(
    field: Field, points: Tensor, owner: Tensor, calibration: Calibration
) -> tuple[Tensor, Tensor]:
    """Logits relative to the level ``(M,)`` and their gradients ``(M, 3)``, both detached."""
    with torch.enable_grad():
        variable = points.detach().requires_grad_()
        height = field(variable, owner) - calibration.level
        (slope,) = torch.autograd.grad(height.sum(), variable)
    return height.detach(), slope
