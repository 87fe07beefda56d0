"""Restoration of thin shells: moves samples of the mesh to the middle of the shell."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ifdefense.devices import on_device, on_host
from ifdefense.geometry.mesh import Mesh
from ifdefense.implicit.base import Calibration, Field
from ifdefense.restorers.base import Restored
from ifdefense.restorers.mesh import MeshRestorer
from ifdefense.stages.density import DensitySampling
from ifdefense.stages.resampling import Samples, resample
from ifdefense.timing import stage

_SPARE = 1.03  # samples evaluated first, per point of the result
_MORE = 64  # minimum number of further samples, if these do not suffice


@dataclasses.dataclass(frozen=True)
class RidgeRestorer:
    """Moves samples of the mesh to the maximum of the field along their normals.

    For networks trained on a thickened surface: the level set has two sides, and the surface lies between
    them, at the maximum of the field along the normal. The field is evaluated at equal steps into the shell;
    the maximum is that of the parabola through the largest value and its neighbours. The first and the last
    step are evaluated only if they are one of these. Samples with a maximum barely above the level are
    dropped.

    Gradients propagate through the three values of the parabola, with the samples and their normals held
    fixed. This is the exact derivative of the result along the normals with respect to the field, and thus to
    the clouds.

    Attributes:
        mesh: extraction and repair of the mesh; its sampling is not used.
        depth: maximum depth of the search into the shell, unit cube.
        steps: number of steps to that depth, at least 3, with at most one evaluation each.
        margin: minimum logit of a sample above the level.
        oversample: samples per point of the result, at least 1; if too few reach the margin, those with the
            largest logits are used.
        density: sampling at the density of the input; ``None`` for samples uniform in the area.

    Raises:
        ValueError: if a number is out of range.

    Examples:
        >>> from ifdefense.stages.extraction import Tracking
        >>> restorer = RidgeRestorer(steps=3).with_stages(extract=Tracking(20, 5))
        >>> restorer.mesh.extract.resolution
        20
    """

    differentiable: ClassVar[bool] = True

    mesh: MeshRestorer = MeshRestorer()
    depth: float = 0.032
    steps: int = 4
    margin: float = 0.25
    oversample: float = 1.5
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
        """Returns a copy with other mesh stages, given by the names of `MeshRestorer`'s attributes."""
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
        """``(count, 3)`` points for each mesh; ``rows`` are the indices of their clouds."""
        sizes = [math.ceil(self.oversample * count) for count in counts]
        drawn = [
            resample([mesh], size, seed=seed, method="uniform", device=rows.device)
            if self.density is None
            else self.density.draw(mesh, cloud, size, seed, share=len(cloud) / count)
            for mesh, cloud, size, count in zip(meshes, evidence, sizes, counts, strict=True)
        ]
        # Nearly all samples reach the margin, so a few more than needed suffice; more are evaluated if not.
        ends = [min(size, math.ceil(_SPARE * count)) for size, count in zip(sizes, counts, strict=True)]
        found = self._evaluated(field, drawn, [slice(0, end) for end in ends], rows, calibration)
        while True:
            peaks = on_host([peak for _, peak in found])
            missing = [
                count - int((peak >= self.margin).sum()) for peak, count in zip(peaks, counts, strict=True)
            ]
            lacking = [i for i in range(len(counts)) if missing[i] > 0 and ends[i] < sizes[i]]
            if not lacking:
                break
            starts = {i: ends[i] for i in lacking}
            for i in lacking:
                ends[i] = min(sizes[i], ends[i] + 4 * missing[i] + _MORE)
            spans = [slice(starts[i], ends[i]) for i in lacking]
            rest = self._evaluated(field, [drawn[i] for i in lacking], spans, rows[lacking], calibration)
            for i, more in zip(lacking, rest, strict=True):
                found[i] = torch.cat([found[i][0], more[0]]), torch.cat([found[i][1], more[1]])
        taken = [chosen(peak, count, self.margin) for peak, count in zip(peaks, counts, strict=True)]
        indices = on_device(taken, rows.device)
        return [points[index] for (points, _), index in zip(found, indices, strict=True)]

    def _evaluated(
        self,
        field: Field,
        drawn: Sequence[Samples],
        spans: Sequence[slice],
        rows: Tensor,
        calibration: Calibration,
    ) -> list[tuple[Tensor, Tensor]]:
        """Centred points ``(M, 3)`` of a range of each mesh's samples, and their logits above the level."""
        starts = [samples.points[0, span] for samples, span in zip(drawn, spans, strict=True)]
        sizes = [len(part) for part in starts]
        start = torch.cat(starts)
        inward = -torch.cat([samples.normals[0, span] for samples, span in zip(drawn, spans, strict=True)])
        owner = rows.repeat_interleave(torch.tensor(sizes, device=rows.device), output_size=sum(sizes))
        depth, height = self._maxima(field, start, inward, owner, calibration)
        points = start + depth.unsqueeze(1) * inward
        return list(zip(points.split(sizes), height.split(sizes), strict=True))

    def _maxima(
        self, field: Field, starts: Tensor, inward: Tensor, owner: Tensor, calibration: Calibration
    ) -> tuple[Tensor, Tensor]:
        """Depth of the field's maximum below each of M samples, and its logit above the level, ``(M,)``."""
        step = self.depth / self.steps
        values = starts.new_full((len(starts), self.steps), -torch.inf)

        def heights(row: Tensor, number: Tensor) -> Tensor:
            """Logits ``(Q,)`` above the level after steps ``(Q,)`` from the samples of ascending rows."""
            queries = starts[row] + step * (number + 1).to(starts).unsqueeze(1) * inward[row]
            above: Tensor = field(queries, owner[row]) - calibration.level
            return above

        def evaluate(wanted: Tensor) -> None:
            row, number = wanted.nonzero().unbind(1)
            values[row, number] = heights(row, number)

        with torch.no_grad():
            inner = torch.zeros_like(values, dtype=torch.bool)
            inner[:, 1:-1] = True
            evaluate(inner)
            middle = values[:, 1:-1].argmax(1) + 1
            ends = torch.zeros_like(inner)  # only if the parabola needs them
            ends[:, 0], ends[:, -1] = middle == 1, middle == self.steps - 2
            evaluate(ends)
            around = middle.unsqueeze(1) + torch.tensor([-1, 0, 1], device=starts.device)
            three = values.gather(1, around)
        if torch.is_grad_enabled():  # evaluated again with a graph to the field
            row = torch.arange(len(starts), device=starts.device).repeat_interleave(3)
            three = heights(row, around.flatten()).view(-1, 3)
        before, best, after = three.unbind(1)
        bend = (before - 2 * best + after).clamp_max(-1e-6)
        depth = step * (middle + 1 + ((before - after) / (2 * bend)).clamp(-1, 1))
        return depth, values.amax(1)


def chosen(peak: Tensor, count: int, margin: float) -> Tensor:
    """Indices of the first ``count`` of ``(M,)`` samples that reach the margin, else of the largest."""
    sure = (peak >= margin).nonzero().squeeze(1)
    if len(sure) < count:
        sure = peak.topk(count).indices.sort().values
    return sure[:count]
