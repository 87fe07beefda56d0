"""Resampling of meshes to an exact number of points."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ifdefense.devices import in_float64
from ifdefense.geometry.frame import first_occurrences
from ifdefense.geometry.mesh import Floats, Ints, Mesh
from ifdefense.geometry.points import gather, knn, local_mean, spread_sampling, stacked
from ifdefense.geometry.sampling import sample_surface

SamplingMethod = Literal["farthest", "uniform", "poisson"]
SAMPLING_METHODS: tuple[SamplingMethod, ...] = get_args(SamplingMethod)


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Points sampled from surfaces, in the meshes' frame.

    Attributes:
        points: ``(B, N, 3)`` float32.
        normals: ``(B, N, 3)`` outward unit normals of their faces.

    Examples:
        >>> mesh = ifdefense.Mesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]])
        >>> samples = resample([mesh], 10)
        >>> samples.normals[0, 0]
        tensor([0., 0., 1.])
    """

    points: Tensor
    normals: Tensor


def resample(
    meshes: Sequence[Mesh],
    num_points: int,
    *,
    seed: int = 0,
    method: SamplingMethod = "farthest",
    oversample: int = 4,
    inset: float = 0.0,
    device: torch.device | str | None = None,
) -> Samples:
    """Samples exactly ``num_points`` points from each mesh.

    Args:
        meshes: B surfaces.
        num_points: points per mesh.
        seed: random seed, applied per mesh, so results do not depend on the batch.
        method: ``"uniform"`` draws independent points. ``"farthest"`` and ``"poisson"`` subsample
            ``oversample * num_points`` of them, by farthest-point sampling or to a Poisson-disk set whose
            radius is maximised by bisection.
        oversample: candidates per sample, at least 1.
        inset: distance by which samples are moved against their normals, in the meshes' unit, to undo the
            thickening of a solid.
        device: device of the subsampling and of the result.

    Raises:
        ValueError: a mesh is empty or has no area (the message names it), or an argument is out of range.

    Examples:
        >>> mesh = ifdefense.Mesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]])
        >>> resample([mesh], 10).points.shape
        torch.Size([1, 10, 3])
    """
    if num_points < 1 or oversample < 1:
        raise ValueError(f"num_points and oversample must be at least 1, got {num_points} and {oversample}")
    if method not in SAMPLING_METHODS:
        raise ValueError(f"method must be one of {', '.join(SAMPLING_METHODS)}, got {method!r}")
    count = num_points * (1 if method == "uniform" else oversample)
    points = np.empty((len(meshes), count, 3), np.float32)
    normals = np.empty_like(points)
    for i, mesh in enumerate(meshes):
        try:
            points[i], face = sample_surface(mesh, count, generator=np.random.default_rng(seed))
        except ValueError as error:
            raise ValueError(f"mesh {i} of {len(meshes)} cannot be resampled: {error}") from error
        normals[i] = mesh.face_normals(face)
    points -= np.float32(inset) * normals
    samples = Samples(torch.from_numpy(points).to(device), torch.from_numpy(normals).to(device))
    if method == "uniform" or not len(meshes):
        return samples
    if method == "farthest":
        kept = spread_sampling(samples.points, num_points)
    else:
        thinned = [_poisson_disk(p, num_points, m.area) for p, m in zip(points, meshes, strict=True)]
        kept = torch.from_numpy(np.stack(thinned)).to(device)
    return Samples(gather(samples.points, kept), gather(samples.normals, kept))


def fill(
    meshes: Sequence[Mesh],
    evidence: Sequence[Tensor],
    num_points: int,
    *,
    tolerance: float,
    seed: int = 0,
    smoothing: int = 1,
    oversample: int = 4,
    inset: float = 0.0,
) -> Tensor:
    """Combines input points near the surface with samples of the mesh where there are none.

    Input points within ``tolerance`` of the surface are kept; samples of the surface farther than
    ``tolerance`` from every kept point are added. Farthest-point sampling reduces the union to
    ``num_points``. Kept points are averaged over ``smoothing`` neighbours, which attenuates per-point noise.

    Args:
        meshes: B surfaces.
        evidence: B tensors (K, 3) of input points, in the meshes' frame.
        num_points: points per cloud.
        tolerance: largest distance of a kept point from the surface, in the meshes' unit.
        seed: as for `resample`.
        smoothing: neighbours averaged per input point, itself included; 1 for no smoothing.
        oversample: samples of the surface per point of the result, at least 1.
        inset: as for `resample`.

    Returns:
        (B, num_points, 3) float32 points in the meshes' frame, on the device of the evidence.

    Raises:
        ValueError: as `resample`, or a tolerance or smoothing that is not positive.

    Examples:
        >>> mesh = ifdefense.load("onet-mesh").trace(points)[0].mesh
        >>> fill([mesh], [points[0]], 80, tolerance=0.3).shape
        torch.Size([1, 80, 3])
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    samples = resample(meshes, oversample * num_points, seed=seed, method="uniform", inset=inset)
    unions = [
        _union(points.to(given.device), local_mean(given[None], smoothing)[0], num_points, tolerance)
        for points, given in zip(samples.points, evidence, strict=True)
    ]
    if not unions:
        return samples.points
    padded = stacked(unions)
    return gather(padded, spread_sampling(padded, num_points))


def _union(samples: Tensor, evidence: Tensor, count: int, tolerance: float) -> Tensor:
    """Evidence near the samples, and samples far from that evidence; at least ``count`` points."""
    # Points with the same neighbours have the same mean, so duplicates are removed.
    evidence = evidence[first_occurrences(evidence)]
    confirmed = evidence[_distances(evidence, samples) <= tolerance]
    if not len(confirmed):
        return samples
    gap = _distances(samples, confirmed)
    order = gap.argsort(descending=True, stable=True)
    take = max(int((gap > tolerance).sum()), count - len(confirmed))
    return torch.cat([confirmed.float(), samples[order[:take]]])


def _distances(query: Tensor, source: Tensor) -> Tensor:
    """Distance of each query to the nearest source, (n,) float64."""
    return knn(in_float64(query[None]), in_float64(source[None]), 1)[0][0, :, 0].sqrt()


@dataclasses.dataclass(frozen=True)
class SurfaceSampling:
    """Resampling stage: samples of the mesh only; see `resample`.

    Examples:
        >>> mesh = ifdefense.Mesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]])
        >>> SurfaceSampling("uniform")([mesh], [points[0]], 10, seed=0, inset=0.0).shape
        torch.Size([1, 10, 3])
    """

    method: SamplingMethod = "farthest"
    oversample: int = 4

    def __post_init__(self) -> None:
        if self.method not in SAMPLING_METHODS or self.oversample < 1:
            raise ValueError(
                f"method must be one of {', '.join(SAMPLING_METHODS)} and oversample at least 1, "
                f"got {self.method!r} and {self.oversample}"
            )

    def __call__(
        self, meshes: Sequence[Mesh], evidence: Sequence[Tensor], num_points: int, seed: int, inset: float
    ) -> Tensor:
        """``(B, num_points, 3)`` points, on the device of the evidence."""
        return resample(
            meshes,
            num_points,
            seed=seed,
            method=self.method,
            oversample=self.oversample,
            inset=inset,
            device=evidence[0].device,
        ).points


@dataclasses.dataclass(frozen=True)
class FillSampling:
    """Resampling stage: smoothed input points, and samples of the mesh where there are none; see `fill`.

    Examples:
        >>> mesh = ifdefense.Mesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]])
        >>> FillSampling(smoothing=4)([mesh], [points[0]], 10, seed=0, inset=0.0).shape
        torch.Size([1, 10, 3])
    """

    tolerance: float = 0.3
    smoothing: int = 8
    oversample: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < math.inf or self.smoothing < 1 or self.oversample < 1:
            raise ValueError(
                "tolerance must be positive, smoothing and oversample at least 1, "
                f"got {self.tolerance}, {self.smoothing} and {self.oversample}"
            )

    def __call__(
        self, meshes: Sequence[Mesh], evidence: Sequence[Tensor], num_points: int, seed: int, inset: float
    ) -> Tensor:
        """``(B, num_points, 3)`` points."""
        return fill(
            meshes,
            evidence,
            num_points,
            tolerance=self.tolerance,
            smoothing=self.smoothing,
            oversample=self.oversample,
            seed=seed,
            inset=inset,
        )


def _poisson_disk(candidates: Floats, count: int, area: float) -> Ints:
    """Poisson-disk subset: indices of ``count`` of the (M, 3) candidates, radius maximised by bisection.

    Dart throwing (Cook, 1986) in the order of the candidates, which is random.
    """
    from scipy.spatial import cKDTree

    # Spacing of the hexagonal packing: an upper bound that dart throwing never reaches.
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
    """Greedy acceptance in order: a candidate is accepted unless it conflicts with an accepted one.

    Equals the sequential result in a few parallel rounds: a candidate is decided once all earlier conflicting
    ones are.
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
