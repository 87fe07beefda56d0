"""Restores points by moving them onto the level set of the field: the differentiable twin of the mesh."""

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
    """Moves points onto the surface by Newton steps ``x - (f - level) ∇f / |∇f|²``.

    Points start on the mesh that `MeshRestorer` extracts, so the result is that of the mesh up to the cells
    of the grid, or at the input points, which follow the surface only where there are some. Gradients pass
    the last step, with the points and their normals held: by the implicit function theorem that is the exact
    derivative of the surface along its normals with respect to the field, and through it to the clouds.

    Attributes:
        mesh: extraction, repair and sampling of the starting points; ``None`` starts at the input points.
        steps: Newton steps, at least 1.
        limit: longest step, unit cube.
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
        """Points on the mesh, not yet moved back by the offset, or input points, repeated where too few."""
        if self.mesh is not None:
            return self.mesh(field, clouds, counts, dataclasses.replace(calibration, offset=0.0), seed)
        generator = torch.Generator().manual_seed(seed)
        found = []
        for cloud, count in zip(clouds, counts, strict=True):
            order = torch.randperm(len(cloud), generator=generator.manual_seed(seed)).to(cloud.device)
            found.append(Restored(cloud[order[torch.arange(count, device=cloud.device) % len(cloud)]]))
        return found

    def _projected(self, field: Field, points: Tensor, owner: Tensor, calibration: Calibration) -> Tensor:
        """Points ``(M, 3)`` on the level set, moved inwards by the offset; see `Field` for ``owner``."""
        points = points.detach()
        gradients = torch.is_grad_enabled()
        for last in [False] * (self.steps - 1) + [True]:
            height, slope = _height(field, points, owner, calibration)
            step = slope / slope.square().sum(1, keepdim=True).clamp_min(1e-12)
            if last and gradients:  # again, now with the graph to the field
                height = field(points, owner) - calibration.level
            move = height[:, None] * step
            length = move.detach().norm(dim=1, keepdim=True)
            points = points - move * (self.limit / length.clamp_min(self.limit))
        inward: Tensor = slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return points + calibration.offset * inward


def _height(field: Field, points: Tensor, owner: Tensor, calibration: Calibration) -> tuple[Tensor, Tensor]:
    """Logits relative to the level ``(M,)`` and their gradients ``(M, 3)``, both without a graph."""
    with torch.enable_grad():
        variable = points.detach().requires_grad_()
        height = field(variable, owner) - calibration.level
        (slope,) = torch.autograd.grad(height.sum(), variable)
    return height.detach(), slope
