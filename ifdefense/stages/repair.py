"""Removal of anomalous deformation from a reconstructed surface.

Attacks leave blobs, spikes, bumps and bridges on the reconstructed surface. A region is anomalous if it both
bulges out of a smoothed surface and has an outlying low density of input points (support). Either criterion
alone also holds on clean shapes: legs bulge, and regions of dropped points lack support.

Both are computed by a random walk on the mesh, a discrete heat flow. It averages positions to a smooth
surface (Taubin, 1995, https://doi.org/10.1145/218380.218473), and diffuses area and input points, whose ratio
is a density *along* the surface, unaffected by other sheets nearby. Anomalous regions are cut out
(`ifdefense.stages.cutting`). Floating components without support are removed. A watertight mesh stays
watertight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ifdefense.geometry.mesh import Doubles, Floats, Ints, Mesh
from ifdefense.geometry.mesh_graph import Mask, MeshGraph, dilated, pieces
from ifdefense.implicit.base import Field
from ifdefense.stages.cutting import rebuilt


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
        max_share: largest share of the surface's area of a bulge. Larger ones are kept, as they are restored
            parts with missing points.

    Raises:
        ValueError: a value is not positive, or ``min_support`` is 1 or more.

    Examples:
        >>> mesh = ifdefense.load("onet-mesh").trace(points)[0].mesh
        >>> BulgeRepair()(mesh, points[0].numpy()).mesh.is_watertight
        True
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
        """See `repair_mesh`; the field is not used."""
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

    Examples:
        >>> mesh = ifdefense.load("onet-mesh").trace(points)[0].mesh
        >>> repair = repair_mesh(mesh, points[0].numpy())
        >>> bool(repair.mask.any()), repair.removed_area
        (False, 0.0)
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

    Examples:
        >>> mesh = ifdefense.load("onet-mesh").trace(points)[0].mesh
        >>> repair_mesh(mesh, points[0].numpy()).score.shape == (len(mesh.vertices),)
        True
    """
    points = checked_evidence(evidence, np.float64)
    if mesh.is_empty:
        return Repair(mesh, np.zeros(0, np.float32), np.zeros(0, bool), 0, 0, 0.0)
    graph = MeshGraph(mesh)
    counts = _nearest_counts(graph, points, options)
    support = _support(graph, counts, options)
    bulge = _bulge(graph, options)
    score = np.clip(np.minimum(bulge, _lack(support, options)), 0, None)
    floating, removed = _floating(graph, counts, options)
    score[floating] = np.maximum(score[floating], 1)
    core = (score >= 1) & ~floating
    grown = _grown(graph, core, bulge, support < _SOFT, options)
    regions = _regions(graph, core, grown, options)
    free = dilated(graph.adjacency, regions >= 0, _RIM)
    mask = floating | free
    return Repair(
        mesh=rebuilt(mesh, regions, free, floating),
        score=score.astype(np.float32),
        mask=mask,
        removed_components=removed,
        rebuilt_regions=int(regions.max()) + 1,
        removed_area=float(graph.areas[mask].sum()),
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


def cut_out(graph: MeshGraph, marked: Mask, score: Floats, rim: int = 1, whole: float = 0.7) -> Repair:
    """Removes marked parts of a mesh: whole components, or regions, whose holes are closed and faired.

    Args:
        graph: graph of a watertight mesh, not modified.
        marked: (V,) vertices to be removed.
        score: (V,) score of each vertex, passed on to the result.
        rim: rings of vertices around a region that are faired with it.
        whole: minimum marked share of a component's area for which the whole component is removed.

    Returns:
        The repaired mesh, watertight if the input is. A mesh marked almost entirely is returned unchanged.
    """
    from scipy.sparse.csgraph import connected_components

    mesh = graph.mesh
    unchanged = Repair(mesh, score.astype(np.float32), np.zeros(len(marked), bool), 0, 0, 0.0)
    if mesh.is_empty or not marked.any():
        return unchanged
    number, label = connected_components(graph.adjacency, directed=False)
    areas = np.bincount(label, graph.areas, number)
    gone = np.bincount(label[marked], graph.areas[marked], number) >= whole * np.maximum(areas, 1e-12)
    if areas[gone].sum() > 0.5 * areas.sum():
        return unchanged
    floating = gone[label]
    regions, _ = pieces(graph, marked & ~floating)
    free = dilated(graph.adjacency, regions >= 0, rim) & ~floating
    mask = floating | free
    return Repair(
        mesh=rebuilt(mesh, regions, free, floating),
        score=score.astype(np.float32),
        mask=mask,
        removed_components=int(gone.sum()),
        rebuilt_regions=int(regions.max(initial=-1)) + 1,
        removed_area=float(graph.areas[mask].sum()),
    )


def marked_pieces(
    graph: MeshGraph, score: Doubles, core: float, grown: float, smallest: float, largest: float
) -> Mask:
    """Labels of connected parts with high scores, (V,).

    Args:
        graph: graph of the mesh.
        score: (V,).
        core: minimum peak score of a part.
        grown: lower score to which parts extend.
        smallest: minimum area of a part above ``core``, in squared units.
        largest: maximum share of the surface of a part.
    """
    inside = score >= grown
    if graph.mesh.is_empty or not (score >= core).any():
        return np.zeros(len(score), bool)
    label, areas = pieces(graph, inside)
    high = score >= core
    cores = np.bincount(label[high], graph.areas[high], len(areas))
    kept = (cores > 0) & (cores >= smallest) & (areas <= largest * graph.areas.sum())
    return np.asarray(np.append(kept, False)[label])


# Support is an average that increases gradually around an anomaly; below this threshold most is missing.
_SOFT = 0.5
# Rings of vertices around the cut that are faired with the patch, for a smooth transition.
_RIM = 3


def _nearest_counts(graph: MeshGraph, points: Doubles, options: BulgeRepair) -> Doubles:
    """Number of points nearest to each vertex, (V,); points beyond the radius are ignored."""
    from scipy.spatial import cKDTree

    size = len(graph.positions)
    # Points beyond the bound have index `size`, an extra bin that is dropped.
    _, index = cKDTree(graph.positions).query(points, distance_upper_bound=options.radius)
    return np.bincount(index, minlength=size + 1)[:size].astype(np.float64)


def _support(graph: MeshGraph, counts: Doubles, options: BulgeRepair) -> Doubles:
    """Density of input points along the surface, relative to the shape's median, (V,)."""
    near, wide = options.radius / 8, options.radius / 2
    density = counts.sum() / graph.areas.sum()
    mass = graph.spread(np.stack([counts, graph.areas], axis=1), near)
    # Clusters support only their own vertices, not the empty surface around them.
    mass[:, 0] = np.minimum(mass[:, 0], density * mass[:, 1])
    mass = graph.spread(mass, math.sqrt(wide**2 - near**2))
    ratio = mass[:, 0] / mass[:, 1]
    median = np.median(ratio)
    return np.asarray(ratio / median) if median > 0 else np.ones(len(ratio))  # else too few points


def _lack(support: Doubles, options: BulgeRepair) -> Doubles:
    """Missing support, (V,); at 1 and above it is both below the minimum and an outlier."""
    deviation = 1.4826 * float(np.median(np.abs(support - 1)))
    return (1 - support) / max(1 - options.min_support, options.outlier * deviation)


def _bulge(graph: MeshGraph, options: BulgeRepair) -> Doubles:
    """Outward displacement from the smooth surface, in units of the minimum height, (V,)."""
    moments = graph.areas[:, None] * np.insert(graph.positions, 0, 1, axis=1)
    mass = graph.spread(moments, options.radius)
    offset = graph.positions - mass[:, 1:] / mass[:, :1]
    displacement = np.einsum("ij,ij->i", offset, graph.mesh.vertex_normals())
    return np.asarray(displacement / options.height)


def _floating(graph: MeshGraph, counts: Doubles, options: BulgeRepair) -> tuple[Mask, int]:
    """Mask (V,) of components without support, and their number."""
    from scipy.sparse.csgraph import connected_components

    number, label = connected_components(graph.adjacency, directed=False)
    found = np.bincount(label, counts, number)
    areas = np.bincount(label, graph.areas, number)
    expected = found.sum() * areas / areas.sum()
    # Plus one, so that a tiny component needs at least one point.
    unsupported = found < options.min_support * (expected + 1)
    unsupported[np.lexsort((areas, found))[-1]] = False  # keep at least one component
    return unsupported[label], int(unsupported.sum())


def _grown(graph: MeshGraph, core: Mask, bulge: Doubles, soft: Mask, options: BulgeRepair) -> Mask:
    """Grows the core to the foot of its anomaly, (V,).

    The region grows, by the radius at most, over poorly supported vertices and downhill, to neighbours that
    bulge less. On a spike, growth stops in the hollow around its foot; on the level, supported side of a leg
    it stops at once. Small islands inside are included.
    """
    adjacency = graph.adjacency
    start, stop = np.repeat(np.arange(len(core)), np.diff(adjacency.indptr)), adjacency.indices
    leads = soft[stop] | (bulge[stop] < bulge[start])
    start, stop = start[leads], stop[leads]
    region = core.copy()
    for _ in range(math.ceil(options.radius / graph.step) if core.any() else 0):
        region[stop[region[start]]] = True
    islands, areas = pieces(graph, ~region)
    beside = np.unique(islands[dilated(adjacency, region, 1) & ~region])
    small = beside[areas[beside] < math.pi * (options.radius / 2) ** 2]
    return region | np.isin(islands, small)


def _regions(graph: MeshGraph, core: Mask, grown: Mask, options: BulgeRepair) -> Ints:
    """Region label per vertex, (V,), -1 for none.

    Whole components and regions with too large a core are excluded.
    """
    label, areas = pieces(graph, grown)
    cores = np.bincount(label[core], graph.areas[core], len(areas))
    kept = cores <= options.max_share * graph.areas.sum()
    border = label[grown & dilated(graph.adjacency, ~grown, 1)]
    kept &= np.bincount(border, minlength=len(areas)) > 0
    numbered = np.append(np.where(kept, np.cumsum(kept) - 1, -1), -1)
    return np.asarray(numbered[label])
