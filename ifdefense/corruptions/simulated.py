"""Simulated attacks as data augmentation for training implicit networks.

Shifting attacks (CW, PGD) move a few points far and many slightly, adding attacks place outliers and
clusters, dropping attacks remove salient regions, mostly far from the centre (Zheng et al., *PointCloud
Saliency Maps*, https://arxiv.org/abs/1812.01687). Corruptions and severities are drawn per cloud.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ifdefense.geometry.points import lower_median


@dataclass(frozen=True)
class SimulationOptions:
    """Probabilities and maximum severities of the corruptions.

    Each corruption is applied to a cloud with its probability, at a severity drawn uniformly up to the
    maximum. Lengths are in the unit cube; shares are fractions of the points.

    Attributes:
        clean: probability that a cloud is resampled without corruption.
        noise: probability of Gaussian noise on every point.
        noise_sigma: largest standard deviation of the noise.
        displace: probability of large displacements of a subset of points.
        displace_share: largest share of points moved.
        displace_length: largest displacement; most are much shorter.
        outliers: probability of outliers, uniform in the cube.
        outlier_share: largest share of outliers.
        clusters: probability of added clusters near or off the surface.
        cluster_count: largest number of clusters.
        cluster_share: largest total share of points in clusters.
        cluster_radius: largest radius of a cluster.
        cluster_offset: standard deviation of a cluster's centre about a point of the cloud.
        holes: probability that balls of points are removed.
        hole_count: largest number of balls.
        hole_share: largest total share of points in the balls.
        salient: probability that points far from the centre are dropped, in a few directions.
        salient_share: largest share of these points.
        cut: probability that a half space is removed.
        cut_share: largest share of points in the half space.
        uneven: probability that the density decays exponentially from a random point of the cloud.
        uneven_rate: largest decay rate, per unit of length.

    Raises:
        ValueError: if a probability or a share is outside [0, 1], a length is negative, a count is 0, or the
            dropped shares sum to 1 or more.

    Examples:
        >>> options = SimulationOptions(clean=1.0)
        >>> simulate_attack(points, options=options).shape
        torch.Size([2, 64, 3])
    """

    clean: float = 0.1
    noise: float = 0.6
    noise_sigma: float = 0.02
    displace: float = 0.5
    displace_share: float = 0.4
    displace_length: float = 0.15
    outliers: float = 0.3
    outlier_share: float = 0.1
    clusters: float = 0.3
    cluster_count: int = 4
    cluster_share: float = 0.2
    cluster_radius: float = 0.06
    cluster_offset: float = 0.1
    holes: float = 0.4
    hole_count: int = 3
    hole_share: float = 0.25
    salient: float = 0.4
    salient_share: float = 0.25
    cut: float = 0.15
    cut_share: float = 0.25
    uneven: float = 0.3
    uneven_rate: float = 6.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.endswith("_count"):
                if value < 1:
                    raise ValueError(f"{name} is {value}, it must be at least 1")
                continue
            highest = math.inf if name.endswith(("_sigma", "_length", "_radius", "_offset", "_rate")) else 1
            if not 0 <= value <= highest:
                raise ValueError(f"{name} is {value}, outside {'[0, inf)' if highest > 1 else '[0, 1]'}")
        if self.hole_share + self.salient_share + self.cut_share >= 1:
            raise ValueError("hole_share, salient_share and cut_share together must stay below 1")


def simulate_attack(
    points: Tensor,
    num_out: int | None = None,
    generator: torch.Generator | None = None,
    options: SimulationOptions | None = None,
) -> Tensor:
    """Corrupts a batch, with a mix of corruptions drawn per cloud.

    Args:
        points: ``(B, N, 3)`` clean points, unit-cube frame.
        num_out: points per corrupted cloud, by default ``N``. They are drawn without replacement; if too few
            are left, all are repeated equally often.
        generator: source of randomness, on any device; by default PyTorch's global one.
        options: by default `SimulationOptions()`.

    Returns:
        ``(B, num_out, 3)`` points in the same frame. Displaced points may leave the cube.

    Raises:
        ValueError: if the points are empty or not ``(B, N, 3)``, or ``num_out`` is less than 1.

    Examples:
        >>> simulate_attack(points, 48, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 48, 3])
    """
    if points.ndim != 3 or points.shape[2] != 3 or points.shape[1] == 0:
        raise ValueError(f"points must be (B, N, 3) with N > 0, got {tuple(points.shape)}")
    num_out = points.shape[1] if num_out is None else num_out
    if num_out < 1:
        raise ValueError(f"num_out must be at least 1, got {num_out}")
    options = options or SimulationOptions()
    draw = _Draw(points, options.clean, generator)
    log_weight = -draw.severity(options.uneven, options.uneven_rate) * _distance(points, draw.member(points))
    for score, share in _drops(points, draw, options):
        log_weight = log_weight.masked_fill(_highest(score, share), -torch.inf)

    sigma = draw.severity(options.noise, options.noise_sigma)
    moved = (
        points + sigma[..., None] * draw.normal(points.shape[1], 3) + _moves(points.shape[1], draw, options)
    )
    out = _resample(moved, log_weight, num_out, draw)
    in_cluster = draw.uniform(num_out) < draw.severity(options.clusters, options.cluster_share)
    out = torch.where(in_cluster[..., None], _clusters(points, num_out, draw, options), out)
    is_outlier = draw.uniform(num_out) < draw.severity(options.outliers, options.outlier_share)
    return torch.where(is_outlier[..., None], draw.uniform(num_out, 3) - 0.5, out)


class _Draw:
    """Random tensors for a batch, in its dtype and on its device, independent of the generator's.

    Args:
        points: ``(B, N, 3)``, the batch.
        clean: probability that all severities of a cloud are 0.
        generator: source of randomness.
    """

    def __init__(self, points: Tensor, clean: float, generator: torch.Generator | None) -> None:
        self._like, self._generator = points, generator
        self._device = points.device if generator is None else generator.device
        self._corrupted = self.uniform(1) >= clean

    def uniform(self, *shape: int) -> Tensor:
        """``(B, *shape)`` in [0, 1)."""
        drawn = torch.rand((len(self._like), *shape), generator=self._generator, device=self._device)
        return drawn.to(self._like)

    def normal(self, *shape: int) -> Tensor:
        """``(B, *shape)`` standard normal."""
        drawn = torch.randn((len(self._like), *shape), generator=self._generator, device=self._device)
        return drawn.to(self._like)

    def severity(self, probability: float, largest: float) -> Tensor:
        """``(B, 1)`` severities: uniform up to ``largest`` with the given probability, else 0."""
        active = self._corrupted & (self.uniform(1) < probability)
        return active * largest * self.uniform(1)

    def count(self, largest: int) -> Tensor:
        """``(B, 1)`` integers from 1 to ``largest``."""
        return (self.uniform(1) * largest).long() + 1

    def member(self, points: Tensor) -> Tensor:
        """``(B, 1, 3)``, a random point of each cloud."""
        index = (self.uniform(1) * points.shape[1]).long()
        return points.gather(1, index[..., None].expand(-1, -1, 3))


def _drops(points: Tensor, draw: _Draw, options: SimulationOptions) -> list[tuple[Tensor, Tensor]]:
    """Scores ``(B, N)`` of each dropping corruption, and the share ``(B, 1)`` of top scores to drop."""
    losses = []
    share, count = draw.severity(options.holes, options.hole_share), draw.count(options.hole_count)
    for hole in range(options.hole_count):
        losses.append((-_distance(points, draw.member(points)), share / count * (hole < count)))

    # Saliency attacks drop the ends of a few limbs: scored by the distance from the centre, weighted by
    # direction.
    offset = points - lower_median(points, 1)
    towards = _unit(offset) @ _unit(draw.normal(3, 3)).mT  # (B, N, 3) cosines to three directions
    focus = 4 * draw.uniform(1)
    score = offset.norm(dim=2) * torch.exp(focus * towards.amax(dim=2))
    losses.append((score, draw.severity(options.salient, options.salient_share)))

    plane = (points @ draw.normal(3, 1)).squeeze(2)
    losses.append((plane, draw.severity(options.cut, options.cut_share)))
    return losses


def _moves(num: int, draw: _Draw, options: SimulationOptions) -> Tensor:
    """``(B, num, 3)`` displacements of a few points, isotropic in some clouds, mostly parallel in others."""
    chosen = draw.uniform(num) < draw.severity(options.displace, options.displace_share)
    length = options.displace_length * draw.uniform(1) * draw.uniform(num) ** 2
    direction = _unit(draw.normal(num, 3) + 2 * draw.uniform(1, 1) * draw.normal(1, 3))
    return (chosen * length)[..., None] * direction


def _clusters(points: Tensor, num: int, draw: _Draw, options: SimulationOptions) -> Tensor:
    """``(B, num, 3)`` points in a few balls on or near the cloud."""
    centres = torch.cat([draw.member(points) for _ in range(options.cluster_count)], dim=1)
    centres = centres + options.cluster_offset * draw.uniform(1, 1) * draw.normal(options.cluster_count, 3)
    which = (draw.uniform(num) * draw.count(options.cluster_count)).long()
    radius = options.cluster_radius * draw.uniform(options.cluster_count)
    inside = _unit(draw.normal(num, 3)) * draw.uniform(num, 1) ** (1 / 3)
    return centres.gather(1, which[..., None].expand(-1, -1, 3)) + radius.gather(1, which)[..., None] * inside


def _resample(points: Tensor, log_weight: Tensor, num: int, draw: _Draw) -> Tensor:
    """Draws ``num`` weighted points without replacement (Gumbel keys), repeating if too few are left."""
    keys = log_weight - torch.log(-torch.log(draw.uniform(points.shape[1]).clamp(1e-12, 1 - 1e-7)))
    order = keys.argsort(dim=1, descending=True)
    left = torch.isfinite(log_weight).sum(dim=1, keepdim=True)
    slot = torch.arange(num, device=points.device) % left  # (B, num)
    return points.gather(1, order.gather(1, slot)[..., None].expand(-1, -1, 3))


def _highest(score: Tensor, share: Tensor) -> Tensor:
    """Mask of the share ``(B, 1)`` with the highest scores ``(B, N)`` per row, rounded down."""
    number = (share * score.shape[1]).long().clamp(max=score.shape[1] - 1)
    return score > score.sort(dim=1, descending=True).values.gather(1, number)


def _distance(points: Tensor, centre: Tensor) -> Tensor:
    distance: Tensor = (points - centre).norm(dim=2)
    return distance


def _unit(vectors: Tensor) -> Tensor:
    length: Tensor = vectors.norm(dim=-1, keepdim=True)
    return vectors / length.clamp(min=1e-12)
