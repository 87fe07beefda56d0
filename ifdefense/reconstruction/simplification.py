"""Simplification of meshes by quadric error metrics."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from ifdefense.geometry.mesh import Doubles, Floats, Mesh

AGGRESSIVENESS = (5.0, 7.0, 10.0)
"""Of fast-simplification, tried in turn until there are few enough faces; 5 is as near as lower values."""


@dataclasses.dataclass(frozen=True)
class Simplification:
    """Simplification stage: collapses edges of least quadric error, down to a number of faces.

    Garland and Heckbert, 1997, https://doi.org/10.1145/258734.258849, by the package fast-simplification.
    A closed mesh stays closed in general, but that is not guaranteed.

    Attributes:
        faces: largest number of faces of the result, at least 4.

    Raises:
        ValueError: if ``faces`` is less than 4.
    """

    faces: int = 5000

    def __post_init__(self) -> None:
        if not 4 <= self.faces < math.inf:
            raise ValueError(f"a closed mesh has at least 4 faces, got {self.faces}")

    def __call__(self, mesh: Mesh) -> Mesh:
        """The simplified mesh; the mesh itself if it has few enough faces.

        Raises:
            ImportError: if fast-simplification is not installed.
        """
        if len(mesh.faces) <= self.faces:
            return mesh
        try:
            from fast_simplification import simplify
        except ImportError:
            raise ImportError(
                "simplification needs the package fast-simplification: pip install 'ifdefense[simplify]'"
            ) from None
        vertices = mesh.vertices.astype(np.float64)
        faces = mesh.faces.astype(np.int32)
        for aggressiveness in AGGRESSIVENESS:
            vertices, faces = simplify(vertices, faces, target_count=self.faces, agg=aggressiveness)
            if len(faces) <= self.faces:
                break
        result: Floats | Doubles = vertices
        if mesh.vertices.dtype == np.float32:
            result = vertices.astype(np.float32)
        return Mesh(result, faces.astype(np.int64))
