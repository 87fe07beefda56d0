"""The vertices of a mesh as a graph: random walks, neighbourhoods and connected parts."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ifdefense.geometry.mesh import Doubles, Ints, Mesh

Mask = NDArray[np.bool_]
Graph = Any  # scipy.sparse.csr_array, imported lazily

# Maximum number of steps of the random walk; more would take minutes.
_STEPS = 1_000_000


class MeshGraph:
    """A mesh with its graph, areas and random walk, each computed on first access.

    Args:
        mesh: the surface.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    @cached_property
    def positions(self) -> Doubles:
        """(V, 3) vertices."""
        return self.mesh.vertices.astype(np.float64)

    @cached_property
    def areas(self) -> Doubles:
        """(V,) thirds of the areas of the faces around each vertex."""
        corners, shares = self.mesh.faces.T.ravel(), np.tile(self.mesh.face_areas() / 3, 3)
        return np.bincount(corners, shares, len(self.mesh.vertices)).astype(np.float64)

    @cached_property
    def adjacency(self) -> Graph:
        """Symmetric adjacency of the vertices, weighted by the number of faces per edge."""
        return adjacency(self.mesh.faces, len(self.mesh.vertices))

    @cached_property
    def walk(self) -> Graph:
        """The random walk on the graph; columns sum to 1, so mass is preserved."""
        degrees = np.maximum(self.adjacency.sum(axis=0), 1)
        walk = self.adjacency.copy()
        walk.data = walk.data / degrees[walk.indices]
        return walk

    @cached_property
    def step(self) -> float:
        """Root mean square of the lengths of edges."""
        ends = self.positions[self.mesh.faces]
        return float(np.sqrt(((ends - ends[:, [1, 2, 0]]) ** 2).sum(axis=-1).mean()))

    def spread(self, columns: Doubles, distance: float) -> Doubles:
        """Mass (V, C) after a random walk of standard deviation ``distance`` per tangent direction."""
        steps = max(1, round(2 * (distance / self.step) ** 2))
        if steps > _STEPS:
            raise ValueError(
                f"edges of {self.step:.2g} are too short for a radius of {distance:.2g}: is the mesh in the "
                "unit cube?"
            )
        return walked(self.walk, columns, steps)


def adjacency(faces: Ints, size: int) -> Graph:
    """Symmetric adjacency of the vertices, weighted by the number of faces per edge."""
    from scipy.sparse import csr_array

    start, stop = faces.T.ravel(), faces[:, [1, 2, 0]].T.ravel()
    rows, columns = np.concatenate([start, stop]), np.concatenate([stop, start])
    return csr_array((np.ones(len(rows)), (rows, columns)), shape=(size, size))


def walked(walk: Graph, columns: Doubles, steps: int) -> Doubles:
    """``walk ** steps @ columns`` in about ``2.5 * sqrt(steps)`` products.

    Truncated Chebyshev expansion with binomial weights (Sachdeva and Vishnoi, 2014,
    https://doi.org/10.1561/0400000065, chapter 3), normalised to preserve mass.
    """
    degree = min(steps, math.ceil(2.5 * math.sqrt(steps)))
    weights = np.array([_chebyshev_weight(steps, j) for j in range(degree + 1)])
    weights /= weights.sum()
    before, current = columns, walk @ columns
    total = weights[0] * before + weights[1] * current
    for weight in weights[2:]:
        before, current = current, 2 * (walk @ current) - before
        total += weight * current
    return np.asarray(total)


def _chebyshev_weight(power: int, degree: int) -> float:
    """Coefficient of the Chebyshev polynomial of ``degree`` in the monomial of ``power``."""
    if (power - degree) % 2:
        return 0.0
    paths = math.comb(power, (power - degree) // 2) * (1 if degree == 0 else 2)
    return float(paths / 2**power)


def dilated(adjacency: Graph, mask: Mask, rings: int) -> Mask:
    """Dilates a vertex mask by a number of rings."""
    for _ in range(rings):
        mask = mask | (adjacency @ mask > 0)
    return mask


def pieces(graph: MeshGraph, mask: Mask) -> tuple[Ints, Doubles]:
    """Connected components of a vertex mask: labels (V,), -1 outside, and their areas."""
    from scipy.sparse.csgraph import connected_components

    inside = np.flatnonzero(mask)
    number, label = connected_components(graph.adjacency[inside][:, inside], directed=False)
    labels = np.full(len(mask), -1, dtype=np.int64)
    labels[inside] = label
    return labels, np.bincount(label, graph.areas[inside], number).astype(np.float64)
