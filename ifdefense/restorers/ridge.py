"""Restoration of thin shells: samples of the mesh, moved to the middle of the shell."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from ifdefense.geometry.mesh import Mesh
from ifdefense.implicit.base import Calibration, Field
from ifdefense.restorers.base import Restored
from ifdefense.restorers.mesh import MeshRestorer
from ifdefense.stages.density import DensitySampling
from ifdefense.stages.resampling import resample
from ifdefense.timing import stage


@dataclasses.dataclass(frozen=True)
class RidgeRestorer:
    """Samples of the mesh, moved along their normals to the maximum of the field.

    For networks that have learnt a thickened surface. Its two sides are only where the network becomes sure;
    the surface is where it is surest. The field is evaluated at equal steps into the shell, and the maximum
    is that of the parabola through the largest value and its neighbours. Samples at which the network is
    hardly surer than at the level are left out.

    Attributes:
        mesh: extraction and repair of the mesh; its sampling is not used.
        depth: how far into the shell the maximum is sought, unit cube.
        steps: evaluations per sample, at least 3.
        margin: logit above the level that a sample must reach.
        oversample: samples per point of the result, at least 1; where fewer than the points asked for reach
            the margin, the surest are taken.
        differentiable: pass gradients, through the three values of the parabola with the samples and their
            normals held fixed. This is the exact derivative of the result along the normals with respect to
            the field, and thus to the clouds. The result is the same.
        density: sampling at the density of the input; ``None`` for samples uniform in the area.

    Raises:
        ValueError: if a number is out of range.
    """

    mesh: MeshRestorer = MeshRestorer()
    depth: float = 0.032
    steps: int = 4
    margin: float = 0.25
    oversample: float = 1.5
    differentiable: bool = False
    density: DensitySampling | None = None

    def __post_init__(self) -> None:
        if self.steps < 3 or not 0 < self.depth < math.inf or not 1 <= self.oversample < math.inf:
            raise ValueError(
                "steps must be at least 3, depth positive and oversample at least 1, "
                f"got {self.steps}, {self.depth} and {self.oversample}"
            )
        if not math.isfinite(self.margin):
            raise ValueError(f"margin must be finite, got {self.margin}")

    def with_stages(self, **stages: Any) -> Self:
        """The same with other stages of the mesh; names are those of `MeshRestorer`'s attributes."""
        return dataclasses.replace(self, mesh=dataclasses.replace(self.mesh, **stages))

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
            given = [cloud.detach() for cloud in clouds]
            meshes, repairs, final = self.mesh.surfaces(field, given, calibration)
        points: list[Tensor | None] = [None] * len(clouds)
        rows = [row for row, mesh in enumerate(final) if not mesh.is_empty]
        if rows:
            with stage("resampling"):
                found = self._centred(
                    field,
                    [final[row] for row in rows],
                    [given[row] for row in rows],
                    [counts[row] for row in rows],
                    torch.tensor(rows, device=clouds[0].device),
                    calibration,
                    seed,
                )
            for row, part in zip(rows, found, strict=True):
                points[row] = part
        return [Restored(*each) for each in zip(points, meshes, repairs, strict=True)]

    def _centred(
        self,
        field: Field,
        meshes: Sequence[Mesh],
        evidence: Sequence[Tensor],
        counts: Sequence[int],
        rows: Tensor,
        calibration: Calibration,
        seed: int,
    ) -> list[Tensor]:
        """``(count, 3)`` points for each mesh, whose cloud is that of ``rows``."""
        sizes = [math.ceil(self.oversample * count) for count in counts]
        drawn = [
            resample([mesh], size, seed=seed, method="uniform", device=rows.device)
            if self.density is None
            else self.density.draw(mesh, cloud, size, seed, share=len(cloud) / count)
            for mesh, cloud, size, count in zip(meshes, evidence, sizes, counts, strict=True)
        ]
        starts = torch.cat([samples.points[0] for samples in drawn])
        inward = -torch.cat([samples.normals[0] for samples in drawn])
        owner = rows.repeat_interleave(torch.tensor(sizes, device=rows.device))
        depth, height = self._maxima(field, starts, inward, owner, calibration)
        points = starts + depth.unsqueeze(1) * inward
        return [
            part[chosen(peak, count, self.margin)]
            for part, peak, count in zip(points.split(sizes), height.split(sizes), counts, strict=True)
        ]

    def _maxima(
        self, field: Field, starts: Tensor, inward: Tensor, owner: Tensor, calibration: Calibration
    ) -> tuple[Tensor, Tensor]:
        """Depth of the field's maximum below each of M samples, and its logit above the level, ``(M,)``."""
        step = self.depth / self.steps

        def heights(steps: Tensor) -> Tensor:
            """``(M, K)`` logits above the level after ``(M, K)`` steps from the samples."""
            queries = starts.unsqueeze(1) + (step * steps).unsqueeze(2) * inward.unsqueeze(1)
            logits = field(queries.flatten(0, 1), owner.repeat_interleave(steps.shape[1]))
            above: Tensor = logits.unflatten(0, steps.shape) - calibration.level
            return above

        with torch.no_grad():
            along = torch.arange(1, self.steps + 1, device=starts.device, dtype=starts.dtype)
            values = heights(along.expand(len(starts), -1))
            middle = values.argmax(1).clamp(1, self.steps - 2)
            around = middle.unsqueeze(1) + torch.tensor([-1, 0, 1], device=starts.device)
            three = values.gather(1, around)
        gradients = torch.is_grad_enabled() and self.differentiable
        with contextlib.nullcontext() if gradients else torch.no_grad():
            if gradients:  # evaluated again with a graph to the field
                three = heights(along[around])
            before, best, after = three.unbind(1)
            bend = (before - 2 * best + after).clamp_max(-1e-6)
            depth = step * (along[middle] + ((before - after) / (2 * bend)).clamp(-1, 1))
        return depth, values.amax(1)


def chosen(peak: Tensor, count: int, margin: float) -> Tensor:
    """Indices of the first ``count`` of ``(M,)`` samples that reach the margin, else of the surest."""
    sure = (peak >= margin).nonzero().squeeze(1)
    if len(sure) < count:
        sure = peak.topk(count).indices.sort().values
    return sure[:count]
