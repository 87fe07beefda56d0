"""Purification by an implicit surface: encode, field, restore."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ifdefense.implicit.base import ImplicitNetwork, field_of
from ifdefense.purifiers.base import Outcome, Purifier
from ifdefense.purifiers.filters import refilled
from ifdefense.restorers.base import Restored, Restorer
from ifdefense.timing import stage


class SurfacePurifier(Purifier):
    """Reconstructs the surface as an implicit function and restores points from it.

    Combine it with an outlier filter by `Compose`. If the field has no surface, input points are resampled
    and `Outcome.fallback` is set.

    Args:
        network: implicit network, see `ifdefense.implicit.base`.
        restorer: field to points, see `ifdefense.restorers`.
        name: name of the method.

    Examples:
        >>> from ifdefense.implicit.base import load_network
        >>> from ifdefense.restorers.mesh import MeshRestorer
        >>> purifier = SurfacePurifier(load_network("onet"), MeshRestorer())
        >>> purifier(points).shape
        torch.Size([2, 64, 3])
    """

    def __init__(self, network: ImplicitNetwork, restorer: Restorer, name: str = "surface") -> None:
        super().__init__()
        self.network = network
        self.restorer = restorer
        self.name = name
        self.differentiable = restorer.differentiable
        self.eval()

    def run(self, clouds: list[Tensor], counts: Sequence[int | None], seed: int) -> list[Outcome]:
        """Encodes the clouds and restores points from their fields."""
        sizes = [len(cloud) if count is None else count for cloud, count in zip(clouds, counts, strict=True)]
        with stage("implicit function"):
            field = field_of(self.network, clouds, seed)
        restored = self.restorer(field, clouds, sizes, self.network.calibration, seed)
        return [_outcome(*each, seed) for each in zip(restored, clouds, sizes, strict=True)]


def _outcome(restored: Restored, cloud: Tensor, count: int, seed: int) -> Outcome:
    """The restored points, or resampled input points if there is no surface."""
    if restored.points is not None:
        return Outcome(restored.points, mesh=restored.mesh, repair=restored.repair)
    index = refilled(len(cloud), count, seed).to(cloud.device)
    return Outcome.choice(cloud, index, mesh=restored.mesh, repair=restored.repair, fallback="no surface")
