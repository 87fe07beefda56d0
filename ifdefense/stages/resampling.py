"""From meshes to clouds of exactly as many points as asked for, spread evenly over the surface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from ifdefense.geometry.mesh import Floats, Ints, Mesh
from ifdefense.geometry.points import farthest_point_sampling

Method = Literal["farthest", "uniform", "poisson"]


def sample_surface(mesh: Mesh, count: int, *, generator: np.random.Generator) -> tuple[Floats, Ints]:
    """Points drawn independently and uniformly by area.

    A face is chosen by its area, then a point in it by uniform barycentric coordinates (Osada et al., 2002).

    Args:
        mesh: the surface.
        count: points to draw.
        generator: source of randomness.

    Returns:
        (count, 3) float32 points in the mesh's frame, and (count,) int64 the face each lies on.

    Raises:
        ValueError: the mesh has no face, or no area.
    """
    if mesh.is_empty:
        raise ValueError("the mesh is empty: there is no surface to sample")
    edges = np.cumsum(mesh.face_areas())
    if not edges[-1] > 0:
        raise ValueError(f"the mesh has no area: all of its {len(mesh.faces)} faces are degenerate")
    # `right` steps over faces without area; rounding may land on the end, which is the last that has some.
    face = np.searchsorted(edges, generator.random(count) * edges[-1], side="right")
    face = np.minimum(face, np.searchsorted(edges, edges[-1], side="left"))
    u, v = generator.random((2, count))
    outside = u + v > 1  # the other half of the parallelogram, folded back
    u[outside], v[outside] = 1 - u[outside], 1 - v[outside]
    a, b, c = mesh.vertices.astype(np.float64)[mesh.faces[face]].transpose(1, 0, 2)
    points = a + u[:, None] * (b - a) + v[:, None] * (c - a)
    return points.astype(np.float32), face


def resample(
    meshes: Sequence[Mesh],
    num_points: int,
    *,
    seed: int = 0,
    method: Method = "farthest",
    oversample: int = 4,
    inset: float = 0.0,
) -> Floats:
    """Exactly ``num_points`` points from each mesh.

    Args:
        meshes: B surfaces.
        num_points: points a mesh.
        seed: every mesh is sampled with a generator of this seed, so its points do not depend on its batch.
        method: ``"uniform"`` draws independent points; the others thin ``oversample * num_points`` of those:
            ``"farthest"`` by farthest-point sampling, ``"poisson"`` to a Poisson-disk set, whose points keep
            the largest common distance found by bisection.
        oversample: candidates a point kept, at least 1.
        inset: candidates are moved by this against their normal, in the meshes' unit: takes back the
            thickening of a solid whose sheets have two sides.

    Returns:
        (B, num_points, 3) float32 points in the meshes' frame.

    Raises:
        ValueError: a mesh is empty or without area (the message names it), or an argument is out of range.
    """
    return resample_with_normals(
        meshes, num_points, seed=seed, method=method, oversample=oversample, inset=inset
    )[0]


def resample_with_normals(
    meshes: Sequence[Mesh],
    num_points: int,
    *,
    seed: int = 0,
    method: Method = "farthest",
    oversample: int = 4,
    inset: float = 0.0,
) -> tuple[Floats, Floats]:
    """As `resample`, with the outward unit normal of the face each point lies on, both (B, num_points, 3)."""
    if num_points < 1 or oversample < 1:
        raise ValueError(f"num_points and oversample must be at least 1, got {num_points} and {oversample}")
    if method not in ("farthest", "uniform", "poisson"):
        raise ValueError(f"method must be farthest, uniform or poisson, got {method!r}")
    count = num_points * (1 if method == "uniform" else oversample)
    points = np.empty((len(meshes), count, 3), np.float32)
    normals = np.empty_like(points)
    for i, mesh in enumerate(meshes):
        try:
            points[i], face = sample_surface(mesh, count, generator=np.random.default_rng(seed))
        except ValueError as error:
            raise ValueError(f"mesh {i} of {len(meshes)} cannot be resampled: {error}") from error
        normals[i] = mesh.face_normals()[face]
    points -= np.float32(inset) * normals
    if method == "uniform" or not len(meshes):
        return points, normals
    if method == "farthest":
        kept = farthest_point_sampling(torch.from_numpy(points), num_points).numpy()
    else:
        kept = np.stack([_poisson_disk(p, num_points, m.area) for p, m in zip(points, meshes, strict=True)])
    return np.take_along_axis(points, kept[..., None], 1), np.take_along_axis(normals, kept[..., None], 1)


def resample_with_evidence(
    meshes: Sequence[Mesh],
    evidence: Sequence[Floats],
    num_points: int,
    *,
    tolerance: float,
    seed: int = 0,
    smoothing: int = 1,
    oversample: int = 4,
    inset: float = 0.0,
) -> Floats:
    """Exactly ``num_points`` points a mesh: input points that it confirms, and samples where there are none.

    A network with one code for a whole cloud rebuilds its shape and loses its details. Input points within
    ``tolerance`` of the surface carry those details and are kept; those farther away contradict the shape and
    are left out; samples of the surface that lie farther than ``tolerance`` from every point kept restore
    what is missing. Farthest-point sampling of the two together gives an even cloud.

    What is kept is kept smoothed: neighbours on a surface agree with each other, and the shifts of an attack,
    made point by point, do not.

    Args:
        meshes: B surfaces.
        evidence: B arrays (K, 3) of input points, in the meshes' frame.
        num_points: points a cloud.
        tolerance: distance from the surface up to which a point is confirmed, in the meshes' unit.
        seed: as for `resample`.
        smoothing: input points are moved to the mean of this many points nearest to them, themselves
            included, before they are compared with the surface; 1 leaves them where they are.
        oversample: samples of the surface a point kept, at least 1.
        inset: as for `resample`.

    Returns:
        (B, num_points, 3) float32 points in the meshes' frame.

    Raises:
        ValueError: as `resample`, or a tolerance or smoothing that is not positive.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    if smoothing < 1:
        raise ValueError(f"smoothing must be at least 1, got {smoothing}")
    samples = resample(meshes, oversample * num_points, seed=seed, method="uniform", inset=inset)
    unions = [
        _union(points, _smoothed(given, smoothing), num_points, tolerance)
        for points, given in zip(samples, evidence, strict=True)
    ]
    size = max(len(union) for union in unions)
    # Copies of the first point are at distance 0 from what is chosen: they fill the batch, never taken.
    padded = np.stack([np.concatenate([u, np.broadcast_to(u[:1], (size - len(u), 3))]) for u in unions])
    kept = farthest_point_sampling(torch.from_numpy(padded), num_points).numpy()
    return np.take_along_axis(padded, kept[..., None], 1)


def _smoothed(points: Floats, neighbours: int) -> Floats:
    """Each of (K, 3) points moved to the mean of its nearest, itself included."""
    from scipy.spatial import cKDTree

    if min(neighbours, len(points)) < 2:
        return points
    _, index = cKDTree(points).query(points, min(neighbours, len(points)))
    means: Floats = points[index].mean(1, dtype=np.float64).astype(np.float32)
    return means


def _union(samples: Floats, evidence: Floats, count: int, tolerance: float) -> Floats:
    """Confirmed evidence, and the samples that are far from it; at least ``count`` points."""
    from scipy.spatial import cKDTree

    confirmed = evidence[cKDTree(samples).query(evidence)[0] <= tolerance]
    if not len(confirmed):
        return samples
    gap = cKDTree(confirmed).query(samples)[0]
    order = np.argsort(-gap, kind="stable")
    take = max(int(np.count_nonzero(gap > tolerance)), count - len(confirmed))
    return np.concatenate([confirmed.astype(np.float32), samples[order[:take]]])


def _poisson_disk(candidates: Floats, count: int, area: float) -> Ints:
    """Indices of ``count`` of the (M, 3) candidates, no two nearer than a radius as large as bisection finds.

    Dart throwing (Cook, 1986) in the order of the candidates, which is random already.
    """
    from scipy.spatial import cKDTree

    # Discs of this diameter would tile the plane as hexagons: darts thrown at random never pack as densely.
    largest = np.sqrt(2 * area / (np.sqrt(3) * count))
    pairs = cKDTree(candidates).query_pairs(largest, output_type="ndarray")  # (P, 2), first index the smaller
    distances = np.linalg.norm(candidates[pairs[:, 0]] - candidates[pairs[:, 1]], axis=1)
    low, high = 0.0, float(largest)
    kept = np.arange(count)
    for _ in range(12):
        radius = (low + high) / 2
        accepted = _throw_darts(pairs[distances < radius], len(candidates))
        if len(accepted) >= count:
            low, kept = radius, accepted[:count]
        else:
            high = radius
    return kept


def _throw_darts(conflicts: Ints, size: int) -> Ints:
    """Candidates accepted one after another unless they conflict with one accepted before, ascending.

    The sequential answer, found in a few parallel rounds: a candidate is certain as soon as all earlier ones
    it conflicts with are decided.
    """
    undecided = np.ones(size, bool)
    accepted = np.zeros(size, bool)
    while undecided.any():
        blocked = np.zeros(size, bool)
        blocked[conflicts[:, 1]] = True
        new = undecided & ~blocked
        accepted |= new
        rejected = np.zeros(size, bool)
        rejected[conflicts[new[conflicts[:, 0]], 1]] = True
        undecided &= ~(new | rejected)
        conflicts = conflicts[undecided[conflicts].all(axis=1)]
    return np.flatnonzero(accepted)
