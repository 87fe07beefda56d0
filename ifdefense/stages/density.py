"""Sampling of surfaces at the density of the input points."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ifdefense.geometry.mesh import Mesh
from ifdefense.geometry.points import Neighbours
from ifdefense.implicit.base import random_subset
from ifdefense.stages.resampling import Samples, resample


@dataclasses.dataclass(frozen=True)
class DensitySampling:
    """Samples of a mesh, thinned where the input is sparser than the surface; also a resampling stage.

    Sampling uniformly by area gives sparsely covered or extrapolated surface as much weight as well covered
    surface, and oversamples wires, whose meshes are thickened. Therefore ``oversample`` times as many samples
    are drawn, and the requested number is selected at random, without replacement, with weights ``clip(r / m,
    lowest, 1) ** power``. ``r`` is the density of the input relative to that of the samples: the squared
    ratio of the distances to the k-th nearest sample and to the k'-th nearest input point. ``m`` is its
    median over the input, so it does not depend on the amount of extrapolated surface. Where the input is
    denser than the median, samples stay uniform, so added points attract no samples. At most as many samples
    as there are input points are drawn this way; further ones replace points that the cloud has lost, and are
    uniform.

    Attributes:
        power: exponent of the weights; 0 for uniform samples.
        neighbours: the smaller of k and k'; the other is larger in proportion to the size of its cloud.
        oversample: candidates per sample, at least 1.
        lowest: smallest relative density, in (0, 1].

    Raises:
        ValueError: if a number is out of range.

    Examples:
        >>> mesh = ifdefense.load("onet-mesh").trace(points)[0].mesh
        >>> DensitySampling()([mesh], [points[0]], 32, seed=0, inset=0.0).shape
        torch.Size([1, 32, 3])
    """

    power: float = 1.5
    neighbours: int = 8
    oversample: float = 2.0
    lowest: float = 0.02

    def __post_init__(self) -> None:
        if not 0 <= self.power < math.inf or self.neighbours < 1:
            raise ValueError(
                f"power must not be negative and neighbours at least 1, got {self.power}, {self.neighbours}"
            )
        if not 1 <= self.oversample < math.inf or not 0 < self.lowest <= 1:
            raise ValueError(
                f"oversample must be at least 1 and lowest in (0, 1], got {self.oversample}, {self.lowest}"
            )

    def __call__(
        self, meshes: Sequence[Mesh], evidence: Sequence[Tensor], num_points: int, seed: int, inset: float
    ) -> Tensor:
        """``(B, num_points, 3)`` points, on the device of the evidence."""
        drawn = [
            self.draw(mesh, cloud, num_points, seed, inset)
            for mesh, cloud in zip(meshes, evidence, strict=True)
        ]
        return torch.cat([samples.points for samples in drawn])

    def draw(
        self,
        mesh: Mesh,
        evidence: Tensor,
        num_points: int,
        seed: int = 0,
        inset: float = 0.0,
        *,
        share: float | None = None,
    ) -> Samples:
        """Samples of one mesh, ``(1, num_points, 3)``, in random order.

        Args:
            mesh: the surface.
            evidence: ``(K, 3)`` input points, in the mesh's frame.
            num_points: samples to keep.
            seed: random seed.
            inset: as for `resample`.
            share: share of the samples with the density of the input; by default input points per sample.
        """
        share = len(evidence) / num_points if share is None else share
        size = math.ceil(self.oversample * num_points)
        # On the CPU, where the samples are drawn: an accelerator gets those that are kept.
        drawn = resample([mesh], size, seed=seed, method="uniform", inset=inset)
        weights = self.weights(drawn.points[0], evidence.detach().cpu(), size // num_points, seed)
        order = drawn_without_replacement(weights, size, seed)
        matched = min(round(num_points * share), num_points)
        # Samples are in random order, so the first ones are uniform.
        kept = torch.cat([order[:matched], order[matched:].sort().values])[:num_points]
        shuffled = torch.randperm(num_points, generator=torch.Generator().manual_seed(seed))
        kept = kept[shuffled]
        points, normals = drawn.points[:, kept], drawn.normals[:, kept]
        return Samples(points.to(evidence.device), normals.to(evidence.device))

    @torch.no_grad()
    def weights(self, samples: Tensor, evidence: Tensor, every: int = 1, seed: int = 0) -> Tensor:
        """Weights ``(M,)`` of samples ``(M, 3)``, float64, for input points ``(K, 3)``, all on the CPU.

        Args:
            samples: uniform samples of a surface, in random order.
            evidence: input points. If there are more of them than samples in that subset, a random subset is
                used.
            every: stride of the subset from which the density of the samples is estimated, for speed.
            seed: random seed of the subset.
        """
        some = samples[: max(1, len(samples) // every)]
        evidence = random_subset(evidence.to(samples), len(some), seed)
        own = round(self.neighbours * len(some) / len(evidence))
        ratio = _reach(samples, some, own) / _reach(samples, evidence, self.neighbours)
        # The ratio is the number of input points per sample.
        ascending = ratio.sort().values
        total = ascending.cumsum(0)
        half = int((total < total[-1] / 2).sum())
        return (ratio / ascending[half]).clamp(self.lowest, 1) ** self.power


def drawn_without_replacement(weights: Tensor, count: int, seed: int) -> Tensor:
    """Draws ``count`` indices without replacement, with probabilities proportional to ``(M,)`` weights.

    By the order of exponential variables with these rates (Efraimidis and Spirakis, 2006,
    https://doi.org/10.1016/j.ipl.2005.11.003).

    Examples:
        >>> drawn_without_replacement(torch.tensor([0.1, 0.2, 0.7]), 2, seed=0).shape
        torch.Size([2])
    """
    noise = torch.rand(len(weights), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    waiting = -torch.log1p(-noise) / weights
    return waiting.argsort(stable=True)[:count]


def _reach(query: Tensor, source: Tensor, k: int) -> Tensor:
    """Squared distance ``(M,)`` of each query to its ``k``-th nearest source, or to the farthest; never 0."""
    index = Neighbours(source)(query, min(k, len(source)))[:, -1]
    squared = (query - source[index]).double().square().sum(1)
    return squared.clamp_min(torch.finfo(torch.float32).tiny)
