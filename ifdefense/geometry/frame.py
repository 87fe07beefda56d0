"""Normalisation: the unit cube of the pipeline with its exact inverse, and the unit sphere of classifiers."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from ifdefense.devices import in_float64
from ifdefense.geometry.mesh import Mesh
from ifdefense.geometry.points import kth_smallest, lower_median


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """Similarity transform between the caller's frame and the unit cube, in float64; differentiable.

    Its tensors are on the points' device, or on the CPU if that does not support float64.

    Attributes:
        centre: ``(3,)`` centre of the bounding box, caller's frame.
        extent: ``()`` longest side of the bounding box, caller's units.
        host: copy on the CPU for meshes, if available.

    Examples:
        >>> frame = Frame.of(points[0])
        >>> cube = frame.to_cube(points[0])
        >>> torch.allclose(frame.from_cube(cube, torch.float32), points[0], atol=1e-6)
        True
    """

    centre: Tensor
    extent: Tensor
    host: Frame | None = None

    @classmethod
    def of(cls, points: Tensor) -> Frame:
        """Frame that centres the cloud's bounding box on 0 and scales its longest side to 1.

        Centre and scale come from the same box, so every point lies in the cube without clamping.

        Args:
            points: ``(N, 3)``, caller's frame.

        Raises:
            ValueError: if the cloud has zero extent. Not checked on accelerators, to avoid a synchronisation.
        """
        centre, extent = bounding_cubes(in_float64(points))
        if extent.device.type == "cpu" and not extent > 0:
            raise ValueError("the cloud has zero extent: all its points are the same")
        return cls(centre[0], extent[0, 0])

    def to_cube(self, points: Tensor) -> Tensor:
        """Maps points ``(N, 3)`` into the unit cube, float32."""
        return ((in_float64(points) - self.centre) / self.extent).float().to(points.device)

    def from_cube(self, points: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Maps points ``(N, 3)`` back into the caller's frame, on the frame's device."""
        return (points.to(self.centre.device).double() * self.extent + self.centre).to(dtype)

    def mesh_from_cube(self, mesh: Mesh) -> Mesh:
        """Maps a mesh back into the caller's frame."""
        frame = self.host or self
        return mesh.transformed(float(frame.extent.detach()), frame.centre.detach().cpu().numpy())


def bounding_cubes(points: Tensor) -> tuple[Tensor, Tensor]:
    """Centres ``(..., 1, 3)`` and longest sides ``(..., 1, 1)`` of the bounding boxes of ``(..., N, 3)``.

    Examples:
        >>> centres, extents = bounding_cubes(points)
        >>> centres.shape
        torch.Size([2, 1, 3])
    """
    low, high = points.amin(-2, keepdim=True), points.amax(-2, keepdim=True)
    return low / 2 + high / 2, (high - low).amax(-1, keepdim=True)


def to_unit_sphere(points: Tensor) -> Tensor:
    """Centres clouds on their mean and scales them to maximum norm 1, as classifiers are trained.

    Args:
        points: ``(B, N, 3)``, any frame.

    Returns:
        ``(B, N, 3)``; differentiable.

    Examples:
        >>> sphere = to_unit_sphere(points + 5)
        >>> sphere.norm(dim=2).amax(1).allclose(torch.ones(2))
        True
    """
    centred = points - points.mean(-2, keepdim=True)
    radius: Tensor = centred.norm(dim=-1).amax(-1)
    return centred / radius[..., None, None]


def within_reach(points: Tensor, quantile: float = 0.9, factor: float = 6.0) -> Tensor:
    """Masks out extreme outliers, which would otherwise set the scale of the unit cube.

    A point is masked out if its distance from the cloud's median exceeds ``factor`` times the ``quantile`` of
    these distances. This removes no point of ModelNet40's 9,843 training clouds (largest ratio: 4.6).

    Args:
        points: ``(N, 3)``, any frame.
        quantile: quantile of the distances that sets the scale, in (0, 1].
        factor: largest distance, in units of that scale.

    Returns:
        ``(N,)`` mask of kept points; all true if the scale is zero.

    Examples:
        >>> within_reach(torch.cat([points[0], torch.full((1, 3), 99.0)]))[-1]
        tensor(False)
    """
    centred = in_float64(points.detach())
    distance = (centred - lower_median(centred, 0)).norm(dim=1)
    scale = kth_smallest(distance, max(1, int(quantile * len(distance))), 0)
    mask: Tensor = (distance <= factor * scale) | (scale == 0)
    return mask.to(points.device)


def first_occurrences(points: Tensor) -> Tensor:
    """Mask ``(N,)`` of the first occurrence of each distinct point of ``(N, 3)``.

    Examples:
        >>> first_occurrences(torch.cat([points[0], points[0, :2]])).sum()
        tensor(64)
    """
    values = points.detach().cpu()
    values = values.float() if values.dtype == torch.bfloat16 else values  # NumPy has no bfloat16
    rows = np.ascontiguousarray(values.numpy() + 0.0)  # -0.0 is 0.0
    first = np.unique(rows.view(np.dtype((np.void, rows.dtype.itemsize * 3))), return_index=True)[1]
    mask = torch.zeros(len(points), dtype=torch.bool)
    mask[torch.from_numpy(first)] = True
    return mask.to(points.device)
