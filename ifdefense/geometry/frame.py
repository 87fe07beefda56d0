"""The first step: from the caller's frame to the unit cube, and exactly back. Also the classifiers' frame."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """A similarity between the caller's frame and the unit cube, in float64.

    Attributes:
        centre: ``(3,)`` centre of the bounding box, caller's frame.
        extent: longest side of the bounding box, caller's units.
    """

    centre: Tensor
    extent: float

    @classmethod
    def of(cls, points: Tensor) -> Frame:
        """The frame in which a cloud's bounding box is centred on 0 and its longest side is 1.

        Centre and scale come from the same box, so no point leaves the cube and none is clamped onto it,
        however asymmetric the cloud.

        Args:
            points: ``(N, 3)``, caller's frame.

        Raises:
            ValueError: if the cloud has no extent.
        """
        low, high = points.double().amin(0), points.double().amax(0)
        extent = float((high - low).max())
        if extent <= 0:
            raise ValueError("the cloud has zero extent: all its points are the same")
        return cls(low / 2 + high / 2, extent)

    def to_cube(self, points: Tensor) -> Tensor:
        """Points ``(N, 3)`` of the caller's frame in the unit cube, float32."""
        return ((points.double() - self.centre) / self.extent).float()

    def from_cube(self, points: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Points ``(N, 3)`` of the unit cube in the caller's frame."""
        return (points.double() * self.extent + self.centre.to(points.device)).to(dtype)


def to_unit_sphere(points: Tensor) -> Tensor:
    """Centres clouds on their mean and scales them to largest norm 1, the frame classifiers are trained in.

    Args:
        points: ``(B, N, 3)``, any frame.

    Returns:
        ``(B, N, 3)``; differentiable.
    """
    centred = points - points.mean(-2, keepdim=True)
    radius: Tensor = centred.norm(dim=-1).amax(-1)
    return centred / radius[..., None, None]
