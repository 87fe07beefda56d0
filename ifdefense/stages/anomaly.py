"""Removal of surface reconstructed from anomalous points.

Points are scored by an anomaly network (`ifdefense.implicit.anomaly`): anomalies are occupied in the local
network but not in the global one, and have unusual support. Scores are averaged over neighbours; a vertex has
the score of its nearest point. Lengths are in the unit cube.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import ArrayLike

from ifdefense.devices import in_float64
from ifdefense.geometry.mesh import Mesh
from ifdefense.geometry.mesh_graph import MeshGraph
from ifdefense.implicit.anomaly import AnomalyNetwork
from ifdefense.implicit.base import Field
from ifdefense.stages.repair import Repair, checked_evidence, cut_out, marked_pieces


@dataclasses.dataclass(frozen=True)
class AnomalyRepair:
    """Repair stage: cuts out the surface near anomalous points and closes the holes.

    Args:
        network: scores the points, see `AnomalyNetwork.load`.
        core: minimum peak of the mean probability in a removed part.
        grown: lower probability to which removed parts extend.
        smoothing: nearest points whose probabilities are averaged at each point.
        smallest: minimum area above ``core`` of a removed part, in squared units of the cube.
        largest: maximum share of the surface of a removed part. Larger parts are kept, as high scores of half
            of a shape indicate that the network does not know the shape.

    Raises:
        ValueError: a number out of range.

    Examples:
        >>> repair = AnomalyRepair(AnomalyNetwork.load(), core=0.5)
        >>> trace = ifdefense.load("onet-mesh").trace(points)[0]
        >>> repair(trace.mesh, points[0]).mesh.is_watertight
        True
    """

    network: AnomalyNetwork
    core: float = 0.42
    grown: float = 0.34
    smoothing: int = 8
    smallest: float = 0.0
    largest: float = 0.35

    def __post_init__(self) -> None:
        if not 0 < self.grown <= self.core < 1:
            raise ValueError(f"grown and core must rise in (0, 1), got {self.grown} and {self.core}")
        if self.smoothing < 1:
            raise ValueError(f"smoothing must be at least 1, got {self.smoothing}")
        if not self.smallest >= 0 or not 0 < self.largest <= 1:
            raise ValueError(
                f"smallest must not be negative and largest a share in (0, 1], got {self.smallest} and "
                f"{self.largest}"
            )

    def __call__(self, mesh: Mesh, evidence: ArrayLike, field: Field | None = None, row: int = 0) -> Repair:
        """Repairs a mesh.

        Args:
            mesh: watertight surface, unit cube, not modified.
            evidence: ``(K, 3)`` points of its reconstruction.
            field: field of its extraction, see `AnomalyNetwork.features`.
            row: index of the cloud in the field.

        Returns:
            The repaired mesh; ``score`` is the probability over ``core``.

        Raises:
            ValueError: evidence that is not ``(K, 3)``, empty, or not finite.
        """
        given = checked_evidence(evidence, np.float32)
        if mesh.is_empty:
            return Repair(mesh, np.zeros(0, np.float32), np.zeros(0, bool), 0, 0, 0.0)
        neighbours, logits = self.network(torch.from_numpy(given), field, row)
        points = neighbours.source
        odd = in_float64(logits).sigmoid()
        odd = odd[neighbours.own(min(self.smoothing, len(points))).to(odd.device)].mean(1)
        vertices = torch.tensor(mesh.vertices, device=points.device)
        score = odd[neighbours(vertices, 1).squeeze(1).to(odd.device)].cpu().numpy()
        graph = MeshGraph(mesh)
        marked = marked_pieces(graph, score, self.core, self.grown, self.smallest, self.largest)
        return cut_out(graph, marked, (score / self.core).astype(np.float32))
