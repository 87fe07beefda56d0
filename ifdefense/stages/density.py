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

    Samples uniform in the area give surface that is seen at a few points, or only guessed, as much weight as
    surface that is well covered, and a wire as much as its thickened mesh. Of ``oversample`` times as many
    samples the number asked for is kept at random, without replacement, with weights
    ``clip(r / m, lowest, 1) ** power``. ``r`` is the density of the input over that of the samples: the
    squared ratio of the distances to the k-th nearest sample and to the k'-th nearest input point. ``m`` is
    its median over the input, so that it does not depend on how much surface is guessed. Where the input is
    denser than that, samples stay uniform: added points attract none. As many samples as there are input
    points are drawn this way. Any more stand for points that the cloud has lost, and are uniform.

    Attributes:
        power: exponent of the weights; 0 for uniform samples.
        neighbours: k or k', the smaller of the two; the other one is larger as its cloud is.
        oversample: samples per sample that is kept, at least 1.
        lowest: smallest relative density, in (0, 1].

    Raises:
        ValueError: if a number is out of range.
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
            share: of the samples whose density is that of the input; by default as many as there are points.
        """
        share = len(evidence) / num_points if share is None else share
        size = math.ceil(self.oversample * num_points)
        # On the CPU, where the samples are drawn: an accelerator gets those that are kept.
        drawn = resample([mesh], size, seed=seed, method="uniform", inset=inset)
        weights = self.weights(drawn.points[0], evidence.detach().cpu(), size // num_points, seed)
        order = drawn_without_replacement(weights, size, seed)
        matched = min(round(num_points * share), num_points)
        # Samples are in random order, so that the first ones are uniform.
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
            evidence: input points. Of more than the samples whose density counts, a random subset is used.
            every: the density of the samples is that of one in so many, which is faster.
            seed: of the subset.
        """
        some = samples[: max(1, len(samples) // every)]
        evidence = random_subset(evidence.to(samples), len(some), seed)
        own = round(self.neighbours * len(some) / len(evidence))
        ratio = _reach(samples, some, own) / _reach(samples, evidence, self.neighbours)
        # A sample stands for as many input points as its ratio says.
        ascending = ratio.sort().values
        total = ascending.cumsum(0)
        half = int((total < total[-1] / 2).sum())
        return (ratio / ascending[half]).clamp(self.lowest, 1) ** self.power


def drawn_without_replacement(weights: Tensor, count: int, seed: int) -> Tensor:
    """``count`` indices drawn one after another with probabilities in proportion to weights ``(M,)``.

    By the order of exponential variables with these rates (Efraimidis and Spirakis, 2006,
    https://doi.org/10.1016/j.ipl.2005.11.003).
    """
    noise = torch.rand(len(weights), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    waiting = -torch.log1p(-noise) / weights
    return waiting.argsort(stable=True)[:count]


def _reach(query: Tensor, source: Tensor, k: int) -> Tensor:
    """Squared distance ``(M,)`` of each query to its ``k``-th nearest source, or to the last; never 0."""
    index = Neighbours(source)(query, min(k, len(source)))[:, -1]
    squared = (query - source[index]).double().square().sum(1)
    return squared.clamp_min(torch.finfo(torch.float32).tiny)
