"""Restoration by mesh extraction, repair and resampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ifdefense.devices import on_host
from ifdefense.geometry.mesh import Mesh
from ifdefense.implicit.base import Calibration, Field
from ifdefense.restorers.base import Restored
from ifdefense.stages.extraction import Extraction
from ifdefense.stages.repair import BulgeRepair, Repair
from ifdefense.stages.resampling import SurfaceSampling
from ifdefense.timing import stage

Extract = Callable[[Field, Sequence[Tensor], Calibration], list[Mesh]]
"""``(field, clouds, calibration)`` → one mesh per cloud, empty if there is no surface."""

RepairMesh = Callable[[Mesh, Tensor, Field, int], Repair]
"""``(mesh, points (K, 3), field, index of the cloud in the field)`` → the repaired mesh."""

Resample = Callable[[Sequence[Mesh], Sequence[Tensor], int, int, float], Tensor]
"""``(meshes, clouds, num_points, seed, inset)`` → ``(B, num_points, 3)`` points."""


@dataclasses.dataclass(frozen=True)
class MeshRestorer:
    """Extracts a mesh, repairs it and samples it.

    Attributes:
        extract: field to mesh.
        repair: removal of anomalous deformation, ``None`` to disable it.
        resample: mesh to points.

    Examples:
        >>> from ifdefense.implicit.base import Calibration
        >>> field = lambda points, cloud: 0.16 - (points**2).sum(1)  # a ball
        >>> restored = MeshRestorer()(field, [points[0]], [32], Calibration(threshold=0.5), 0)
        >>> restored[0].points.shape, restored[0].mesh.is_watertight
        (torch.Size([32, 3]), True)
    """

    differentiable: ClassVar[bool] = False

    extract: Extract = Extraction()
    repair: RepairMesh | None = BulgeRepair()
    resample: Resample = SurfaceSampling()

    def __call__(
        self,
        field: Field,
        clouds: Sequence[Tensor],
        counts: Sequence[int],
        calibration: Calibration,
        seed: int,
    ) -> list[Restored]:
        """See `ifdefense.restorers.base.Restorer`."""
        meshes, repairs, final = self.surfaces(field, clouds, calibration)
        points: list[Tensor | None] = [None] * len(clouds)
        with stage("resampling"):
            for count in set(counts):
                rows = [i for i, mesh in enumerate(final) if counts[i] == count and not mesh.is_empty]
                if rows:
                    sampled = self.resample(
                        [final[i] for i in rows], [clouds[i] for i in rows], count, seed, calibration.offset
                    )
                    for i, cloud_points in zip(rows, torch.unbind(sampled), strict=True):
                        points[i] = cloud_points
        return [Restored(*each) for each in zip(points, meshes, repairs, strict=True)]

    def surfaces(
        self, field: Field, clouds: Sequence[Tensor], calibration: Calibration
    ) -> tuple[list[Mesh], list[Repair | None], list[Mesh]]:
        """Extracted meshes, their repairs, and the meshes to sample, one per cloud."""
        with stage("field to mesh"):
            meshes = self.extract(field, clouds, calibration)
        repairs: list[Repair | None] = [None] * len(clouds)
        if self.repair is not None:
            with stage("mesh repair"):
                repairs = [
                    None if mesh.is_empty else self.repair(mesh, cloud, field, row)
                    for row, (mesh, cloud) in enumerate(zip(meshes, on_host(clouds), strict=True))
                ]
        final = [a if b is None else b.mesh for a, b in zip(meshes, repairs, strict=True)]
        return meshes, repairs, final
