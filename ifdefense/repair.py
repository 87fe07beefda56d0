"""Removal of anomalous deformation from a reconstructed surface.

An attack leaves blobs, spikes, bumps and bridges on the surface that a network reconstructs. Two signs together
tell them from legs, wings, handles and edges: they bulge out of a smooth version of the surface, and the input
points hardly support them. Either sign alone is common on clean shapes: legs bulge as well, and where points were
dropped nothing is supported.

Both signs come from a random walk on the mesh, a discrete heat flow (Crane et al., 2013,
https://arxiv.org/abs/1204.6216): the walk averages positions into a smooth surface, and it spreads area and input
points alike, which makes their ratio a density of points *along* the surface, undisturbed by other sheets nearby.
What is found is cut off where it bridges two parts, and laid into a smooth patch with its surroundings fixed, the
minimum of the bi-Laplacian energy (Botsch and Kobbelt, 2004, https://doi.org/10.1145/1015706.1015772). Components
that float without support are removed. A watertight mesh stays watertight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ifdefense.mesh import Doubles, Floats, Ints, Mesh

Mask = NDArray[np.bool_]
Graph = Any  # scipy.sparse.csr_array, imported where it is needed


@dataclass(frozen=True)
class RepairOptions:
    """What counts as an anomaly. Lengths are in the unit-cube frame.

    Args:
        radius: scale of an anomaly: the surface is smoothed over this distance to see what bulges out of it, and
            points support the surface within half of it.
        height: least displacement from the smooth surface that can be an anomaly.
        outlier: least displacement in robust standard deviations (1.4826 median absolute deviations) of the shape.
        min_support: least density of input points, as a fraction of the shape's median, that keeps a bulge.
        max_area: a larger region is left alone: it is a part that the network restored, not an anomaly.

    Raises:
        ValueError: a value that is not positive, or a support above 1.
    """

    radius: float = 0.08
    height: float = 0.02
    outlier: float = 2.0
    min_support: float = 0.3
    max_area: float = 0.15

    def __post_init__(self) -> None:
        for name in ("radius", "height", "outlier", "min_support", "max_area"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.min_support > 1:
            raise ValueError(f"min_support is a fraction of the median, at most 1, got {self.min_support}")


@dataclass(frozen=True, eq=False)
class Repair:
    """A repaired mesh and what was done to it.

    Args:
        mesh: the repaired mesh, in the frame of the input.
        score: (V,) float32 anomaly of each vertex of the *input* mesh; from 1 on both signs are present.
        mask: (V,) bool, vertices of the input mesh that were removed or moved.
        removed_components: floating components taken away.
        rebuilt_regions: bulges laid flat, bridges included.
        removed_area: area of the masked part of the input mesh, in squared units of its frame.
    """

    mesh: Mesh
    score: Floats
    mask: Mask
    removed_components: int
    rebuilt_regions: int
    removed_area: float


def repair_mesh(mesh: Mesh, evidence: ArrayLike, options: RepairOptions = RepairOptions()) -> Repair:
    """Remove what bulges out of a surface, or floats, without support by input points.

    Args:
        mesh: the reconstructed surface in the unit-cube frame. It is not modified.
        evidence: (K, 3) input points in the same frame.
        options: scales and thresholds.

    Returns:
        The repaired mesh, watertight if the input is, with a score and mask over the vertices of the input. A mesh
        without faces comes back as it is.

    Raises:
        ValueError: evidence that is not (K, 3), empty, or not finite.
    """
    points = np.asarray(evidence, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3 or not len(points):
        raise ValueError(f"evidence must have shape (K, 3) with K >= 1, got {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError("evidence holds a coordinate that is not finite")
    if mesh.is_empty:
        return Repair(mesh, np.zeros(0, np.float32), np.zeros(0, bool), 0, 0, 0.0)
    surface = _Surface(mesh)
    support = _support(surface, points, options)
    bulge = _bulge(surface, options)
    lack = (1 - support) / (1 - options.min_support)
    score = np.clip(np.minimum(bulge, lack), 0, None)
    floating, removed = _floating(surface, points, options)
    score[floating] = np.maximum(score[floating], 1)
    regions = _regions(surface, (score >= 1) & ~floating, (support < _SOFT) & ~floating, options)
    rebuilt = _rebuilt(mesh, regions, floating)
    mask = floating | (regions >= 0)
    area = float(mesh.face_areas()[mask[mesh.faces].any(axis=1)].sum())
    return Repair(rebuilt, score.astype(np.float32), mask, removed, int(regions.max(initial=-1)) + 1, area)


# Beside a region without support, support fades in over its averaging distance: about half where the region ends.
_SOFT = 0.6


class _Surface:
    """The quantities of a mesh that the stages share."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.positions = mesh.vertices.astype(np.float64)
        size = len(self.positions)
        self.areas = np.bincount(mesh.faces.T.ravel(), np.tile(mesh.face_areas() / 3, 3), size)
        self.graph = _graph(mesh)
        degrees = np.maximum(self.graph.sum(axis=0), 1)
        self.walk = self.graph.copy()  # columns sum to 1: mass at a vertex goes to its neighbours in equal parts
        self.walk.data = self.walk.data / degrees[self.walk.indices]
        ends = self.positions[mesh.faces]
        self.step = float(np.sqrt(((ends - ends[:, [1, 2, 0]]) ** 2).sum(axis=-1).mean()))

    def spread(self, columns: Doubles, distance: float) -> Doubles:
        """Mass (V, C) after a random walk whose standard deviation in each tangent direction is ``distance``."""
        return _walked(self.walk, columns, max(1, round(2 * (distance / self.step) ** 2)))


def _graph(mesh: Mesh) -> Graph:
    """Adjacency of the vertices, symmetric; the weight is the number of faces at the edge."""
    from scipy.sparse import csr_array

    start, stop = mesh.faces.T.ravel(), mesh.faces[:, [1, 2, 0]].T.ravel()
    rows, columns = np.concatenate([start, stop]), np.concatenate([stop, start])
    return csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(mesh.vertices),) * 2)


def _walked(walk: Graph, columns: Doubles, steps: int) -> Doubles:
    """``walk ** steps @ columns`` in about ``2.5 * sqrt(steps)`` products.

    The power is expanded in Chebyshev polynomials, whose weights are binomial and soon vanish (Sachdeva and
    Vishnoi, 2014, https://doi.org/10.1561/0400000065, theorem 3.3); the weights kept sum to 1, so mass is kept.
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
    share = math.comb(power, (power - degree) // 2) / 2**power
    return share if degree == 0 else 2 * share


def _nearest_vertices(surface: _Surface, points: Doubles, options: RepairOptions) -> Doubles:
    """Points that each vertex is the nearest one of, (V,); points farther than the radius support nothing."""
    from scipy.spatial import cKDTree

    distance, index = cKDTree(surface.positions).query(points)
    return np.bincount(index[distance < options.radius], minlength=len(surface.positions)).astype(np.float64)


def _support(surface: _Surface, points: Doubles, options: RepairOptions) -> Doubles:
    """Density of input points along the surface around each vertex, 1 at the shape's median, (V,)."""
    counts = _nearest_vertices(surface, points, options)
    mass = np.stack([counts, surface.areas], axis=1)
    mass = surface.spread(mass, options.radius / 4)
    density = np.median(mass[:, 0] / mass[:, 1])
    if not density > 0:
        return np.ones(len(mass))  # too few points to say anything
    # A cluster supports the place where it lies, not the empty surface around it.
    mass[:, 0] = np.minimum(mass[:, 0], density * mass[:, 1])
    mass = surface.spread(mass, options.radius * math.sqrt(1 / 4 - 1 / 16))
    ratio = mass[:, 0] / mass[:, 1]
    return np.asarray(ratio / np.median(ratio))


def _bulge(surface: _Surface, options: RepairOptions) -> Doubles:
    """Outward displacement of each vertex from the smooth surface, 1 at the least that is an outlier, (V,)."""
    mass = surface.spread(surface.areas[:, None] * np.insert(surface.positions, 0, 1, axis=1), options.radius)
    offset = surface.positions - mass[:, 1:] / mass[:, :1]
    displacement = np.einsum("ij,ij->i", offset, surface.mesh.vertex_normals())
    middle = np.median(displacement)
    deviation = 1.4826 * np.median(np.abs(displacement - middle))
    return np.asarray(displacement / max(options.height, middle + options.outlier * deviation))


def _floating(surface: _Surface, points: Doubles, options: RepairOptions) -> tuple[Mask, int]:
    """Vertices of components without support, (V,), and the number of these components."""
    from scipy.sparse.csgraph import connected_components

    number, label = connected_components(surface.graph, directed=False)
    counts = np.bincount(label, _nearest_vertices(surface, points, options), number)
    areas = np.bincount(label, surface.areas, number)
    expected = counts.sum() * areas / areas.sum()
    # One more than expected in the denominator: a speck has to show a point before it is believed.
    unsupported = counts / (expected + 1) < options.min_support
    unsupported[np.argmax(counts)] = False
    return unsupported[label], int(unsupported.sum())


def _regions(surface: _Surface, core: Mask, soft: Mask, options: RepairOptions) -> Ints:
    """Label of the region each vertex belongs to, -1 for none, (V,).

    A region grows from its core through softly supported surface, as far as the radius; it takes in small islands
    that it surrounds (the few points an anomaly is made of) and a margin to lay the patch smoothly.
    """
    labels = np.full(len(core), -1, dtype=np.int64)
    if not core.any():
        return labels
    region = core
    for _ in range(math.ceil(options.radius / surface.step)):
        region = region | (soft & (surface.graph @ region > 0))
    islands, areas = _pieces(surface, ~region)
    region = region | ((islands >= 0) & (areas[islands] < math.pi * options.radius**2))
    for _ in range(2):
        region = region | (surface.graph @ region > 0)
    pieces, areas = _pieces(surface, region)
    kept = areas <= options.max_area
    numbered = np.append(np.where(kept, np.cumsum(kept) - 1, -1), -1)
    return np.asarray(numbered[pieces])


def _pieces(surface: _Surface, mask: Mask) -> tuple[Ints, Doubles]:
    """Connected pieces of the masked vertices: label (V,), -1 outside, and area of each."""
    from scipy.sparse.csgraph import connected_components

    inside = np.flatnonzero(mask)
    number, label = connected_components(surface.graph[inside][:, inside], directed=False)
    labels = np.full(len(mask), -1, dtype=np.int64)
    labels[inside] = label
    return labels, np.bincount(label, surface.areas[inside], number)


def _rebuilt(mesh: Mesh, regions: Ints, floating: Mask) -> Mesh:
    """The mesh without floating components, bridges cut, every region laid into a smooth patch."""
    faces = mesh.faces[~floating[mesh.faces[:, 0]]]
    vertices, free = mesh.vertices.astype(np.float64), regions >= 0
    if free.any():
        vertices, faces, free = _bridges_cut(vertices, faces, regions)
        vertices = _faired(Mesh(vertices.astype(np.float32), faces), free)
    return _compacted(vertices, faces)


def _bridges_cut(vertices: Doubles, faces: Ints, regions: Ints) -> tuple[Doubles, Ints, Mask]:
    """Cut off the regions that have several boundary loops, and close each loop by a fan.

    Returns:
        Vertices, faces and the vertices that are free to move: all of a region.
    """
    label = regions[faces]
    within = np.where((label == label[:, :1]).all(axis=1), label[:, 0], -1)  # (F,) region a face lies in
    keep = np.ones(len(faces), bool)
    fans, centres = [], []
    for region in range(int(regions.max()) + 1):
        loops = _boundary_loops(faces[within == region])
        if len(loops) < 2:
            continue
        keep[within == region] = False
        for loop in loops:
            centre = np.full(len(loop), len(vertices) + len(centres))
            fans.append(np.stack([loop, np.roll(loop, -1), centre], axis=1))
            centres.append(vertices[loop].mean(axis=0))
    vertices = np.concatenate([vertices, np.reshape(centres, (-1, 3))])
    free = np.append(regions >= 0, np.ones(len(centres), bool))
    return vertices, np.concatenate([faces[keep], *fans]), free


def _boundary_loops(faces: Ints) -> list[Ints]:
    """Simple closed loops of the edges that have a face on one side only, each in the direction of that face."""
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    base = int(faces.max(initial=0)) + 1
    lone = ~np.isin(edges[:, 0] * base + edges[:, 1], edges[:, 1] * base + edges[:, 0])
    following: dict[int, list[int]] = {}
    for start, stop in edges[lone].tolist():
        following.setdefault(start, []).append(stop)
    loops: list[Ints] = []
    while following:
        path = [next(iter(following))]
        while path:
            stops = following.get(path[-1])
            if not stops:
                break
            stop = stops.pop()
            if not stops:
                del following[path[-1]]
            if stop in path:  # closes a loop; what led to it waits for its own closing
                first = path.index(stop)
                loops.append(np.array(path[first:]))
                del path[first + 1 :]
            else:
                path.append(stop)
    return loops


def _faired(mesh: Mesh, free: Mask) -> Doubles:
    """Positions with the free vertices at the minimum of the bi-Laplacian energy, the others fixed."""
    from scipy.sparse import csr_array
    from scipy.sparse.linalg import splu

    positions = mesh.vertices.astype(np.float64)
    graph = _graph(mesh)
    degrees = graph.sum(axis=1)
    free = free & (degrees > 0)  # a vertex of what was cut off has no face any more
    rows = np.flatnonzero(free | (graph @ free > 0))
    neighbours = graph[rows]
    neighbours.data = neighbours.data / np.repeat(degrees[rows], np.diff(neighbours.indptr))
    selection = csr_array((np.ones(len(rows)), (np.arange(len(rows)), rows)), shape=neighbours.shape)
    laplacian = (selection - neighbours).tocsc()  # uniform weights: the slivers of marching cubes do no harm
    moving = laplacian[:, np.flatnonzero(free)]
    constant = laplacian @ np.where(free[:, None], 0.0, positions)
    solver = splu((moving.T @ moving).tocsc(), permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True})
    positions[free] = solver.solve(-(moving.T @ constant))
    return positions


def _compacted(vertices: Doubles, faces: Ints) -> Mesh:
    """A mesh of the vertices that some face uses."""
    used = np.zeros(len(vertices), bool)
    used[faces] = True
    return Mesh(vertices[used].astype(np.float32), (np.cumsum(used) - 1)[faces])
