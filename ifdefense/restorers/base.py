"""What turns a field into points."""

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
    """Points of one surface, unit cube.

    Attributes:
        points: ``(M, 3)`` the points, ``None`` if the field has no surface.
        mesh: the surface, where one was extracted.
        repair: what was done to it.
    """

    points: Tensor | None
    mesh: Mesh | None = None
    repair: Repair | None = None


class Restorer(Protocol):
    """From the fields of a batch to exactly as many points as wanted; a frozen dataclass serves well."""

    @property
    def differentiable(self) -> bool:
        """Whether gradients pass from the points to the field and the clouds."""
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
            field: the fields of all clouds.
            clouds: ``(N_i, 3)`` what the network has seen, unit cube.
            counts: points wanted of each.
            calibration: level, box and offset of the network.
            seed: seed of every draw. What is made of one cloud must not depend on the others.
        """
        ...
