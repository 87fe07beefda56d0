"""Interface of restorers, which turn fields into points."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ifdefense.geometry.mesh import Mesh
from ifdefense.implicit.base import Calibration, Field
from ifdefense.stages.repair import Repair


@dataclasses.dataclass(frozen=True, eq=False)
class Restored:
    """Points on one surface, unit cube.

    Attributes:
        points: ``(M, 3)`` points, ``None`` if the field has no surface.
        mesh: surface, if one was extracted.
        repair: changes made by the mesh repair.

    Examples:
        >>> Restored(None).mesh is None  # no surface was found
        True
    """

    points: Tensor | None
    mesh: Mesh | None = None
    repair: Repair | None = None


class Restorer(Protocol):
    """Turns the fields of a batch into points; usually a frozen dataclass."""

    @property
    def differentiable(self) -> bool:
        """Whether gradients propagate from the points to the fields and the clouds."""
        ...

    def __call__(
        self,
        field: Field,
        clouds: Sequence[Tensor],
        counts: Sequence[int],
        calibration: Calibration,
        seed: int,
    ) -> list[Restored]:
        """Restores points.

        Args:
            field: fields of all clouds.
            clouds: ``(N_i, 3)`` input of the network, unit cube.
            counts: exact number of points per cloud.
            calibration: level, box and offset of the network.
            seed: random seed. The result for a cloud must not depend on the others.
        """
        ...
