"""Removal of anomalous deformation from a reconstructed surface.

Attacks leave blobs, spikes, bumps and bridges on the reconstructed surface. A region is anomalous if it both
bulges out of a smoothed surface and has an outlying low density of input points (support). Either criterion
alone also holds on clean shapes: legs bulge, and regions of dropped points lack support.

Both are computed by a random walk on the mesh, a discrete heat flow. It averages positions to a smooth
surface (Taubin, 1995, https://doi.org/10.1145/218380.218473), and diffuses area and input points, whose ratio
is a density *along* the surface, unaffected by other sheets nearby. Anomalous regions are cut off, closed,
and faired with fixed surroundings by minimising the bi-Laplacian energy (Botsch and Kobbelt, 2004,
https://doi.org/10.1145/1015706.1015772). Floating components without support are removed. A watertight mesh
stays watertight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ifdefense.geometry.mesh import Doubles, Floats, Ints, Mesh, norms
from ifdefense.implicit.base import Field

Mask = NDArray[np.bool_]
Graph = Any  # scipy.sparse.csr_array, imported lazily


@dataclass(frozen=True)
class BulgeRepair:
    """Repair stage: options of `repair_mesh`. Lengths are in the unit cube.

    Args:
        radius: scale of an anomaly. The surface is smoothed over this distance, support over half of it.
        height: minimum displacement from the smooth surface.
        min_support: minimum density of input points as a fraction of the shape's median; for floating
            components, the minimum fraction of the expected points.
        outlier: robust standard deviations (1.4826 median absolute deviations) by which the density must also
            fall below its median, for clouds of uneven density.
        max_share: largest share of the surface's area of a bulge. Larger ones are kept: the network restored
            them where points are missing.

    Raises:
        ValueError: a value that is not positive, or a support of 1 or more.
    """

    radius: float = 0.12
    height: float = 0.015
    min_support: float = 0.3
    outlier: float = 2.0
    max_share: float = 0.04

    def __post_init__(self) -> None:
        for name in ("radius", "height", "outlier", "min_support", "max_share"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.radius > 1:  # quadratic time
            raise ValueError(f"radius must be at most 1, the side of the unit cube, got {self.radius}")
        if not math.isfinite(self.height + self.outlier + self.max_share):
            raise ValueError(f"height, outlier and max_share must be finite, got {self}")
        if self.min_support >= 1:
            raise ValueError(f"min_support is a fraction below 1, got {self.min_support}")

    def __call__(self, mesh: Mesh, evidence: ArrayLike, field: Field | None = None, row: int = 0) -> Repair:
        """See `repair_mesh`; the field is not asked."""
        return repair_mesh(mesh, evidence, self)


@dataclass(frozen=True, eq=False)
class Repair:
    """Repaired mesh and what was changed.

    Args:
        mesh: the repaired mesh, in the frame of the input.
        score: (V,) float32 anomaly score per vertex of the *input* mesh; from 1 on both criteria hold.
        mask: (V,) bool, vertices of the input mesh that were removed or moved.
        removed_components: number of floating components removed.
        rebuilt_regions: number of bulges and bridges replaced by smooth patches.
        removed_area: area of the masked part of the input mesh, in squared units.
    """

    mesh: Mesh
    score: Floats
    mask: Mask
    removed_components: int
    rebuilt_regions: int
    removed_area: float


def repair_mesh(mesh: Mesh, evidence: ArrayLike, options: BulgeRepair = BulgeRepair()) -> Repair:
    """Removes bulges and floating components that input points do not support.

    Args:
        mesh: reconstructed surface in the unit-cube frame, not modified.
        evidence: (K, 3) input points in the same frame.
        options: scales and thresholds.

    Returns:
        The repaired mesh, watertight if the input is, with score and mask per vertex of the input. A mesh
        without faces is returned unchanged.

    Raises:
        ValueError: evidence that is not (K, 3), empty, or not finite.
    """
    points = checked_evidence(evidence, np.float64)
    if mesh.is_empty:
        return Repair(mesh, np.zeros(0, np.float32), np.zeros(0, bool), 0, 0, 0.0)
    surface = Surface(mesh)
    counts = _nearest_counts(surface, points, options)
    support = _support(surface, counts, options)
    bulge = _bulge(surface, options)
    score = np.clip(np.minimum(bulge, _lack(support, options)), 0, None)
    floating, removed = _floating(surface, counts, options)
    score[floating] = np.maximum(score[floating], 1)
    core = (score >= 1) & ~floating
    grown = _grown(surface, core, bulge, support < _SOFT, options)
    regions = _regions(surface, core, grown, options)
    free = _dilated(surface.graph, regions >= 0, _RIM)
    mask = floating | free
    return Repair(
        mesh=_rebuilt(mesh, regions, free, floating),
        score=score.astype(np.float32),
        mask=mask,
        removed_components=removed,
        rebuilt_regions=int(regions.max()) + 1,
        removed_area=float(surface.areas[mask].sum()),
    )


def checked_evidence(evidence: ArrayLike, dtype: type[np.floating]) -> NDArray[Any]:
    """Evidence as an array (K, 3).

    Raises:
        ValueError: evidence that is not (K, 3), empty, or not finite.
    """
    points = np.asarray(evidence, dtype=dtype)
    if points.ndim != 2 or points.shape[1] != 3 or not len(points):
        raise ValueError(f"evidence must have shape (K, 3) with K >= 1, got {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError("evidence holds a coordinate that is not finite")
    return points


def cut_out(surface: Surface, marked: Mask, score: Floats, rim: int = 1, whole: float = 0.7) -> Repair:
    """Removes marked parts of a mesh: components vanish, other regions are cut off, closed and faired.

    Args:
        surface: watertight mesh, not modified.
        marked: (V,) vertices to be removed.
        score: (V,) what they were marked by, kept in the result.
        rim: rings of vertices around a region that are faired with it.
        whole: share of a component's area from which on all of it is removed.

    Returns:
        The repaired mesh, watertight if the input is. A mesh that is marked almost entirely is returned
        unchanged.
    """
    from scipy.sparse.csgraph import connected_components

    mesh = surface.mesh
    unchanged = Repair(mesh, score.astype(np.float32), np.zeros(len(marked), bool), 0, 0, 0.0)
    if mesh.is_empty or not marked.any():
        return unchanged
    number, label = connected_components(surface.graph, directed=False)
    areas = np.bincount(label, surface.areas, number)
    gone = np.bincount(label[marked], surface.areas[marked], number) >= whole * np.maximum(areas, 1e-12)
    if areas[gone].sum() > 0.5 * areas.sum():
        return unchanged
    floating = gone[label]
    regions, _ = _pieces(surface, marked & ~floating)
    free = _dilated(surface.graph, regions >= 0, rim) & ~floating
    mask = floating | free
    return Repair(
        mesh=_rebuilt(mesh, regions, free, floating),
        score=score.astype(np.float32),
        mask=mask,
        removed_components=int(gone.sum()),
        rebuilt_regions=int(regions.max(initial=-1)) + 1,
        removed_area=float(surface.areas[mask].sum()),
    )


def marked_pieces(
    surface: Surface, score: Doubles, core: float, grown: float, smallest: float, largest: float
) -> Mask:
    """Connected parts of a mesh of high score, (V,).

    Args:
        surface: the mesh.
        score: (V,).
        core: score that a part reaches.
        grown: lower score to which it extends.
        smallest: area above ``core`` that it has at least, in squared units.
        largest: share of the surface that it has at most.
    """
    inside = score >= grown
    if surface.mesh.is_empty or not (score >= core).any():
        return np.zeros(len(score), bool)
    label, areas = _pieces(surface, inside)
    high = score >= core
    cores = np.bincount(label[high], surface.areas[high], len(areas))
    kept = (cores > 0) & (cores >= smallest) & (areas <= largest * surface.areas.sum())
    return np.asarray(np.append(kept, False)[label])


# Support is an average and fades in around an anomaly; below this threshold most of it is missing.
_SOFT = 0.5
# Steps of the random walk beyond which it would take minutes.
_STEPS = 1_000_000
# Rings of vertices around the cut that are faired with the patch, for a smooth transition.
_RIM = 3


class Surface:
    """Quantities of a mesh that the steps share, each computed when it is first asked for.

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
    def graph(self) -> Graph:
        """Symmetric adjacency of the vertices."""
        return _graph(self.mesh.faces, len(self.mesh.vertices))

    @cached_property
    def walk(self) -> Graph:
        """The random walk on the graph; columns sum to 1, so mass is preserved."""
        degrees = np.maximum(self.graph.sum(axis=0), 1)
        walk = self.graph.copy()
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
        return _walked(self.walk, columns, steps)


def _graph(faces: Ints, size: int) -> Graph:
    """Symmetric adjacency of the vertices, weighted by the number of faces per edge."""
    from scipy.sparse import csr_array

    start, stop = faces.T.ravel(), faces[:, [1, 2, 0]].T.ravel()
    rows, columns = np.concatenate([start, stop]), np.concatenate([stop, start])
    return csr_array((np.ones(len(rows)), (rows, columns)), shape=(size, size))


def _walked(walk: Graph, columns: Doubles, steps: int) -> Doubles:
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


def _nearest_counts(surface: Surface, points: Doubles, options: BulgeRepair) -> Doubles:
    """Number of points nearest to each vertex, (V,); points beyond the radius are ignored."""
    from scipy.spatial import cKDTree

    size = len(surface.positions)
    # Points beyond the bound have index `size`, an extra bin that is dropped.
    _, index = cKDTree(surface.positions).query(points, distance_upper_bound=options.radius)
    return np.bincount(index, minlength=size + 1)[:size].astype(np.float64)


def _support(surface: Surface, counts: Doubles, options: BulgeRepair) -> Doubles:
    """Density of input points along the surface, relative to the shape's median, (V,)."""
    near, wide = options.radius / 8, options.radius / 2
    density = counts.sum() / surface.areas.sum()
    mass = surface.spread(np.stack([counts, surface.areas], axis=1), near)
    # A cluster supports its own vertices, not the empty surface around it.
    mass[:, 0] = np.minimum(mass[:, 0], density * mass[:, 1])
    mass = surface.spread(mass, math.sqrt(wide**2 - near**2))
    ratio = mass[:, 0] / mass[:, 1]
    median = np.median(ratio)
    return np.asarray(ratio / median) if median > 0 else np.ones(len(ratio))  # else too few points


def _lack(support: Doubles, options: BulgeRepair) -> Doubles:
    """Missing support, (V,); from 1 on it is both below the minimum and an outlier."""
    deviation = 1.4826 * float(np.median(np.abs(support - 1)))
    return (1 - support) / max(1 - options.min_support, options.outlier * deviation)


def _bulge(surface: Surface, options: BulgeRepair) -> Doubles:
    """Outward displacement from the smooth surface, in units of the minimum height, (V,)."""
    moments = surface.areas[:, None] * np.insert(surface.positions, 0, 1, axis=1)
    mass = surface.spread(moments, options.radius)
    offset = surface.positions - mass[:, 1:] / mass[:, :1]
    displacement = np.einsum("ij,ij->i", offset, surface.mesh.vertex_normals())
    return np.asarray(displacement / options.height)


def _floating(surface: Surface, counts: Doubles, options: BulgeRepair) -> tuple[Mask, int]:
    """Mask (V,) of components without support, and their number."""
    from scipy.sparse.csgraph import connected_components

    number, label = connected_components(surface.graph, directed=False)
    found = np.bincount(label, counts, number)
    areas = np.bincount(label, surface.areas, number)
    expected = found.sum() * areas / areas.sum()
    # Plus one, so that a tiny component needs at least one point.
    unsupported = found < options.min_support * (expected + 1)
    unsupported[np.lexsort((areas, found))[-1]] = False  # keep at least one component
    return unsupported[label], int(unsupported.sum())


def _grown(surface: Surface, core: Mask, bulge: Doubles, soft: Mask, options: BulgeRepair) -> Mask:
    """Grows the core to the foot of its anomaly, (V,).

    The region grows, by the radius at most, over poorly supported vertices and downhill, to neighbours that
    bulge less. On a spike this stops in the hollow around its foot; the side of a leg is level and supported
    and stops it at once. Small islands inside are included.
    """
    graph = surface.graph
    start, stop = np.repeat(np.arange(len(core)), np.diff(graph.indptr)), graph.indices
    leads = soft[stop] | (bulge[stop] < bulge[start])
    start, stop = start[leads], stop[leads]
    region = core.copy()
    for _ in range(math.ceil(options.radius / surface.step) if core.any() else 0):
        region[stop[region[start]]] = True
    islands, areas = _pieces(surface, ~region)
    beside = np.unique(islands[_dilated(graph, region, 1) & ~region])
    small = beside[areas[beside] < math.pi * (options.radius / 2) ** 2]
    return region | np.isin(islands, small)


def _regions(surface: Surface, core: Mask, grown: Mask, options: BulgeRepair) -> Ints:
    """Region label per vertex, (V,), -1 for none.

    Regions with too large a core and whole components are excluded.
    """
    pieces, areas = _pieces(surface, grown)
    cores = np.bincount(pieces[core], surface.areas[core], len(areas))
    kept = cores <= options.max_share * surface.areas.sum()
    border = pieces[grown & _dilated(surface.graph, ~grown, 1)]
    kept &= np.bincount(border, minlength=len(areas)) > 0
    numbered = np.append(np.where(kept, np.cumsum(kept) - 1, -1), -1)
    return np.asarray(numbered[pieces])


def _dilated(graph: Graph, mask: Mask, rings: int) -> Mask:
    """Dilates a vertex mask by a number of rings."""
    for _ in range(rings):
        mask = mask | (graph @ mask > 0)
    return mask


def _pieces(surface: Surface, mask: Mask) -> tuple[Ints, Doubles]:
    """Connected components of a vertex mask: labels (V,), -1 outside, and their areas."""
    from scipy.sparse.csgraph import connected_components

    inside = np.flatnonzero(mask)
    number, label = connected_components(surface.graph[inside][:, inside], directed=False)
    labels = np.full(len(mask), -1, dtype=np.int64)
    labels[inside] = label
    return labels, np.bincount(label, surface.areas[inside], number).astype(np.float64)


def _rebuilt(mesh: Mesh, regions: Ints, free: Mask, floating: Mask) -> Mesh:
    """Removes floating components; cuts off, closes and fairs each region."""
    vertices, faces = mesh.vertices.astype(np.float64), mesh.faces[~floating[mesh.faces[:, 0]]]
    if free.any():
        step = float(np.median(norms(vertices[faces[:, 0]] - vertices[faces[:, 1]])))
        vertices, faces = _cut_off(vertices, faces, regions, step)
        free = np.append(free, np.ones(len(vertices) - len(free), bool))
        vertices = _faired(vertices, faces, free)
    used = np.zeros(len(vertices), bool)
    used[faces] = True
    return Mesh(vertices[used].astype(np.float32), (np.cumsum(used) - 1)[faces])


def _cut_off(vertices: Doubles, faces: Ints, regions: Ints, step: float) -> tuple[Doubles, Ints]:
    """Replaces the faces inside each region by caps on its boundary loops."""
    label = regions[faces]
    within = np.where((label == label[:, :1]).all(axis=1), label[:, 0], -1)  # (F,) region of each face
    for region in range(int(regions.max()) + 1):
        loops = _boundary_loops(faces[within == region])
        faces, within = faces[within != region], within[within != region]
        for loop in loops:
            added, cap = _cap(vertices[loop], loop, len(vertices), step)
            vertices, faces = np.concatenate([vertices, added]), np.concatenate([faces, cap])
            within = np.append(within, np.full(len(cap), -1))
    return vertices, faces


def _cap(corners: Doubles, loop: Ints, first: int, step: float) -> tuple[Doubles, Ints]:
    """Closes a loop by rings about ``step`` apart: new vertices, numbered from ``first``, and faces."""
    size, centre = len(loop), corners.mean(axis=0)
    rings = max(1, round(float(norms(corners - centre).mean()) / step))
    shares = np.arange(1, rings)[:, None, None] / rings
    added = np.concatenate([(corners + shares * (centre - corners)).reshape(-1, 3), centre[None]])
    rows = np.concatenate([loop, first + np.arange((rings - 1) * size)]).reshape(rings, size)
    turned = np.roll(rows, -1, axis=1)
    last = np.full(size, first + len(added) - 1)
    quads = [rows[:-1], turned[:-1], turned[1:], rows[:-1], turned[1:], rows[1:]]
    sides = np.stack([part.ravel() for part in quads], axis=1).reshape(-1, 3)
    return added, np.concatenate([sides, np.stack([rows[-1], turned[-1], last], axis=1)])


def _boundary_loops(faces: Ints) -> list[Ints]:
    """Simple closed loops of boundary edges, oriented as their faces."""
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
            if stop in path:  # closes a loop; the path before it remains open
                first = path.index(stop)
                loops.append(np.array(path[first:]))
                del path[first + 1 :]
            else:
                path.append(stop)
    return loops


def _faired(vertices: Doubles, faces: Ints, free: Mask) -> Doubles:
    """Moves the free vertices to the minimum of the bi-Laplacian energy, with the others fixed."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components
    from scipy.sparse.linalg import splu

    graph = _graph(faces, len(vertices))
    degrees = graph.sum(axis=1)
    # Components without fixed vertices have no unique minimum: cut-off parts, or parts within the rim.
    component = connected_components(graph, directed=False)[1]
    free = free & (np.bincount(component, ~free) > 0)[component]
    rows = np.flatnonzero(_dilated(graph, free, 1))
    neighbours = graph[rows]
    neighbours.data = neighbours.data / np.repeat(degrees[rows], np.diff(neighbours.indptr))
    selection = csr_array((np.ones(len(rows)), (np.arange(len(rows)), rows)), shape=neighbours.shape)
    laplacian = (selection - neighbours).tocsc()  # uniform weights, robust to the slivers of marching cubes
    moving = laplacian[:, np.flatnonzero(free)]
    constant = laplacian @ np.where(free[:, None], 0.0, vertices)
    solver = splu((moving.T @ moving).tocsc(), permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True})
    result = vertices.copy()
    result[free] = solver.solve(-(moving.T @ constant))
    return result
