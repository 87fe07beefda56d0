"""Purifiers without a network: SOR, SRS, local smoothing and randomised input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ifdefense.devices import on_host
from ifdefense.geometry.points import local_mean
from ifdefense.purifiers.base import Outcome, Purifier
from ifdefense.stages.outliers import simple_random_sampling, statistical_outlier_removal
from ifdefense.timing import stage


class StatisticalOutlierRemoval(Purifier):
    """Statistical outlier removal (SOR); see `ifdefense.stages.outliers`.

    Args:
        k: neighbours.
        alpha: threshold in standard deviations above the mean.

    Examples:
        >>> trace = StatisticalOutlierRemoval(k=2, alpha=1.1).trace(points)[0]
        >>> trace.kept_mask.shape
        (64,)
    """

    name = "sor"
    differentiable = True
    normalise = False

    def __init__(self, k: int = 2, alpha: float = 1.1) -> None:
        super().__init__()
        self.k, self.alpha = k, alpha

    def run(self, clouds: list[Tensor], counts: Sequence[int | None], seed: int) -> list[Outcome]:
        """The kept points, resampled to the requested number."""
        with stage("outliers"):
            masks = [self._mask(cloud) for cloud in on_host(clouds)]
        return [chosen(*each, seed) for each in zip(clouds, masks, counts, strict=True)]

    def _mask(self, cloud: Tensor) -> Tensor:
        """Repeats SOR as long as it shrinks the longest side by more than a quarter.

        A single distant outlier increases the variance, and thus the threshold, which hides other outliers.
        """
        kept = torch.arange(len(cloud), device=cloud.device)
        after = _longest_side(cloud)
        while True:
            left = kept[statistical_outlier_removal(cloud[kept][None], self.k, self.alpha)[0]]
            before, after = after, _longest_side(cloud[left])
            if after > 0:  # otherwise a single position would remain
                kept = left
            if not 0 < after <= 0.75 * before:
                break
        mask = torch.zeros(len(cloud), dtype=torch.bool, device=cloud.device)
        mask[kept] = True
        return mask


def _longest_side(points: Tensor) -> Tensor:
    return (points.amax(0) - points.amin(0)).max()


class SimpleRandomSampling(Purifier):
    """Simple random sampling (SRS): drops a fraction ``drop / of`` of the points.

    Args:
        drop: points to drop from a cloud of ``of`` points.
        of: reference size.

    Examples:
        >>> purifier = SimpleRandomSampling(drop=1, of=4)
        >>> int(purifier.trace(points)[0].kept_mask.sum())
        48
    """

    name = "srs"
    differentiable = True
    normalise = False

    def __init__(self, drop: int = 500, of: int = 1024) -> None:
        super().__init__()
        if not 0 <= drop < of:
            raise ValueError(f"cannot drop {drop} of {of} points")
        self.drop, self.of = drop, of

    def run(self, clouds: list[Tensor], counts: Sequence[int | None], seed: int) -> list[Outcome]:
        """The kept points, resampled to the requested number."""
        with stage("outliers"):
            masks = [
                simple_random_sampling(cloud[None], len(cloud) * self.drop // self.of, seed=seed)[0]
                for cloud in clouds
            ]
        return [chosen(*each, seed) for each in zip(clouds, masks, counts, strict=True)]


class LocalSmoothing(Purifier):
    """Replaces each point by the mean of its nearest points.

    Args:
        k: points averaged, including the point itself.

    Examples:
        >>> LocalSmoothing(k=4)(points).shape
        torch.Size([2, 64, 3])
    """

    name = "smooth"
    differentiable = True

    def __init__(self, k: int = 8) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k = k

    def run(self, clouds: list[Tensor], counts: Sequence[int | None], seed: int) -> list[Outcome]:
        """The means, resampled to the requested number."""
        with stage("smoothing"):
            means = [local_mean(cloud[None], self.k)[0] for cloud in clouds]
        return [
            Outcome(mean if count is None else mean[refilled(len(mean), count, seed).to(mean.device)])
            for mean, count in zip(means, counts, strict=True)
        ]


class RandomisedInput(Purifier):
    """Random subset of the points with Gaussian noise, unpredictable for attackers without the seed.

    Args:
        keep: fraction of kept points, in (0, 1].
        jitter: standard deviation of the noise on each coordinate, unit cube.

    Raises:
        ValueError: if an argument is out of range.

    Examples:
        >>> purifier = RandomisedInput(keep=0.5, jitter=0.01)
        >>> torch.equal(purifier(points, seed=0), purifier(points, seed=1))
        False
    """

    name = "randomised"
    differentiable = True

    def __init__(self, keep: float = 0.5, jitter: float = 0.01) -> None:
        super().__init__()
        if not 0 < keep <= 1 or not 0 <= jitter < 1:
            raise ValueError(f"keep must be in (0, 1] and jitter in [0, 1), got {keep} and {jitter}")
        self.keep, self.jitter = keep, jitter

    def run(self, clouds: list[Tensor], counts: Sequence[int | None], seed: int) -> list[Outcome]:
        """The noisy subset, resampled to the requested number."""
        with stage("randomisation"):
            return [self._drawn(*each, seed) for each in zip(clouds, counts, strict=True)]

    def _drawn(self, cloud: Tensor, count: int | None, seed: int) -> Outcome:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(cloud), generator=generator)[: max(1, round(self.keep * len(cloud)))]
        noise = torch.randn(len(order), 3, generator=generator, dtype=torch.float32) * self.jitter
        points = cloud[order.to(cloud.device)] + noise.to(cloud)
        return Outcome(
            points if count is None else points[refilled(len(points), count, seed).to(points.device)]
        )


def chosen(cloud: Tensor, mask: Tensor, count: int | None, seed: int) -> Outcome:
    """Selects the masked points of a cloud, resampled to ``count``."""
    index = mask.nonzero().squeeze(1)
    if count is not None:
        index = index[refilled(len(index), count, seed).to(index.device)]
    return Outcome.choice(cloud, index.to(cloud.device), kept=mask.to(cloud.device))


def refilled(size: int, count: int, seed: int) -> Tensor:
    """Exactly ``count`` indices below ``size``: a random subset, or all of them and random repeats."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(size, generator=generator) for _ in range(-(-count // size))]
    return torch.cat(rounds)[:count]
