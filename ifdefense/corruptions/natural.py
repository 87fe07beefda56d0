"""The 15 corruptions of ModelNet40-C at 5 severities, for evaluation.

Sun et al., 2022, `arXiv:2201.12296 <https://arxiv.org/abs/2201.12296>`_, with the parameters of the published
generator. Corruptions for training are in `ifdefense.corruptions.simulated`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ifdefense.devices import in_float64
from ifdefense.geometry import points as operations

Family = Literal["density", "noise", "transformation"]

_GRID = 5  # control points per axis
_RADIUS = 0.5  # of the radial basis functions; the default of PyGeM, which the published generator calls
_LARGEST = 1 << 22  # pairs of points compared at once


class Draw:
    """Uniform random numbers for a batch, cloud by cloud, so that results do not depend on the batch size.

    Args:
        points: ``(B, N, 3)``, the batch.
        count: numbers per cloud.
        generator: source of randomness, on the CPU.
    """

    def __init__(self, points: Tensor, count: int, generator: torch.Generator) -> None:
        # float64 for the same corruption in every precision.
        drawn = torch.rand(len(points), count, generator=generator, dtype=torch.float64)
        self._left = drawn.to(points.device)

    def uniform(self, *shape: int) -> Tensor:
        """``(B, *shape)`` in [0, 1), float64."""
        size = math.prod(shape)
        if size > self._left.shape[1]:
            raise RuntimeError(f"{size} random numbers are requested, {self._left.shape[1]} are left")
        taken, self._left = self._left[:, :size], self._left[:, size:]
        return taken.reshape(len(taken), *shape)

    def normal(self, *shape: int) -> Tensor:
        """``(B, *shape)`` standard normal, float64."""
        normal: Tensor = torch.special.ndtri(self.uniform(*shape).clamp_min(1e-12))
        return normal

    def signs(self, *shape: int) -> Tensor:
        """``(B, *shape)`` of -1 and 1."""
        return torch.where(self.uniform(*shape) < 0.5, -1.0, 1.0).double()

    def index(self, num: int, *shape: int) -> Tensor:
        """``(B, *shape)`` indices below ``num``, with replacement."""
        return (self.uniform(*shape) * num).long()

    def subset(self, num: int, size: int) -> Tensor:
        """``(B, size)`` indices below ``num``, without replacement; takes ``num`` numbers."""
        return self.uniform(num).argsort(1)[:, :size]

    def directions(self, count: int) -> Tensor:
        """``(B, count, 3)`` unit vectors by two uniform angles as published, denser towards the poles."""
        turn, tilt = (2 * math.pi * self.uniform(2, count) - math.pi).unbind(1)
        return torch.stack([turn.cos() * tilt.sin(), turn.sin() * tilt.sin(), tilt.cos()], 2)


@dataclass(frozen=True)
class Corruption:
    """A corruption.

    Attributes:
        family: one of the three families.
        run: ``(points (B, N, 3) float64 with z up, severity, generator) -> (B, M, 3)``.
        size: ``(N, severity) -> M``.
        normalised: whether the published generator normalises the bounding box of the result.
        least: fewest points of a cloud.
    """

    family: Family
    run: Callable[[Tensor, int, torch.Generator], Tensor]
    size: Callable[[int, int], int]
    normalised: bool
    least: int = 2


def corrupt(
    points: Tensor,
    name: str,
    severity: int,
    generator: torch.Generator | None = None,
    *,
    up: Literal["x", "y", "z"] = "z",
    normalise: bool = True,
) -> Tensor:
    """Corrupts clouds, each with its own random numbers.

    ============== ============================================ =====================================
    name           what, at severities 1 to 5                   points of 1,024
    ============== ============================================ =====================================
    occlusion      what a camera sees                           1,024, drawn from those seen
    lidar          what a scanner's beams see                   768, drawn from those seen
    density_inc    1 to 5 regions denser than the rest          half: 1,024 of 2,048, as published
    density_dec    3/4 of 1 to 5 regions of 100 points lost     949, 874, 799, 724, 649
    cutout         2, 3, 5, 7, 10 regions of 30 points lost     964, 934, 874, 814, 724
    uniform        noise in +-0.01, 0.02, 0.03, 0.04, 0.05      1,024
    gaussian       sigma 0.01, 0.015, 0.02, 0.025, 0.03         1,024
    impulse        N/30, /25, /20, /15, /10 points by +-0.1     1,024
    upsampling     N/5, /4, /3, /2, /1 copies, noise +-0.05     1,228, 1,280, 1,365, 1,536, 2,048
    background     N/45, /40, /35, /30, /20 in the cube         1,046, 1,049, 1,053, 1,058, 1,075
    rotation       2.5, 5, 7.5, 10, 15 degrees about each axis  1,024
    shear          0.05, 0.1, 0.15, 0.2, 0.25                   1,024
    ffd            free-form, 5 x 5 x 5 points by 0.1 to 0.5    1,024
    rbf            multiquadric, by 0.025 to 0.125              1,024
    inv_rbf        inverse multiquadric, by 0.025 to 0.125      1,024
    ============== ============================================ =====================================

    Numbers of points are those for 1,024 and scale with N. For occlusion and LiDAR the severity selects the
    visible side rather than a strength, as published. Calls with one generator on consecutive batches give
    the same results as one call on all of them.

    Args:
        points: ``(B, N, 3)`` clean clouds, centred, in the unit sphere.
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        generator: source of randomness on the CPU; by default a new one with seed 0.
        up: vertical axis.
        normalise: whether to centre the bounding box and scale its longest side to 2 where the published
            generator does, which enlarges clouds by up to sqrt(3); otherwise the input frame is kept.

    Returns:
        ``(B, M, 3)`` corrupted clouds, M as in the table.

    Raises:
        ValueError: for clouds that are not finite ``(B, N, 3)``, too small or without extent, or an unknown
            name, severity or axis.

    Examples:
        >>> corrupt(points, "cutout", severity=1, generator=torch.Generator().manual_seed(0)).shape[::2]
        torch.Size([2, 3])
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"there is no corruption {name!r}; there are: {', '.join(CORRUPTIONS)}")
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"severity must be 1, 2, 3, 4 or 5, got {severity}")
    if up not in ("x", "y", "z"):
        raise ValueError(f"up must be x, y or z, got {up!r}")
    _check(points, name)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    corruption, turn = CORRUPTIONS[name], {"x": 2, "y": 1, "z": 0}[up]
    # A cyclic permutation of the axes is a rotation, not a reflection.
    upright = in_float64(points.detach()).roll(turn, 2)
    if name in _SEEN:
        upright, centre, scale = _normalised(upright)
    corrupted = corruption.run(upright, severity, generator)
    if corruption.normalised and normalise:
        corrupted = _normalised(corrupted)[0]
    elif name in _SEEN and not normalise:
        corrupted = corrupted / scale + centre
    return corrupted.roll(-turn, 2).to(points)


def _check(points: Tensor, name: str) -> None:
    if points.ndim != 3 or points.shape[2] != 3 or 0 in points.shape or not points.is_floating_point():
        raise ValueError(
            f"expected floating-point clouds of shape (B, N, 3), got {tuple(points.shape)} {points.dtype}"
        )
    if not points.isfinite().all():
        example = int((~points.isfinite().flatten(1).all(1)).nonzero()[0])
        raise ValueError(f"example {example} has NaN or infinite coordinates")
    least = CORRUPTIONS[name].least
    if points.shape[1] < least:
        raise ValueError(f"{name} needs clouds of at least {least} points, got {points.shape[1]}")
    flat = (points.amax(1) == points.amin(1)).all(1)
    if flat.any():
        raise ValueError(f"example {int(flat.nonzero()[0])} has no extent: all its points are the same")


def _normalised(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Clouds with bounding box centred and longest side 2, the ``(B, 1, 3)`` centre and the scale."""
    low, high = points.amin(1, keepdim=True), points.amax(1, keepdim=True)
    centre, scale = (low + high) / 2, 2 / (high - low).amax(2, keepdim=True)
    return (points - centre) * scale, centre, scale


# Density


def occlusion(points: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Points seen by a camera at a distance of 3, elevation of 30 to 60 and azimuth of 72 c +- 36 degrees.

    Published: 1,024 pixels of a depth image of the mesh. Here: N draws from the `visible` points, repeated
        only once all are drawn, so the density is that of the cloud.
    """
    draw = Draw(points, 2 + points.shape[1], generator)
    elevation = math.pi / 6 * (1 + draw.uniform(1))
    camera = 3 * _viewpoint(severity, elevation, draw.uniform(1))
    return _resampled(points, visible(points, camera), draw.uniform(points.shape[1]), points.shape[1])


def lidar(points: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Points seen by a scanner at a distance of 5, elevation of 22.5 and azimuth of 72 c +- 36 degrees.

    Points within a quarter of a degree of one of the beams, 1 degree apart, are moved onto it, others are
    dropped; 3/4 N are drawn. Published: pixels of a depth image of the mesh. Here: `visible` points, all of
    them if none is near a beam.
    """
    num = 3 * points.shape[1] // 4
    draw = Draw(points, 1 + points.shape[1], generator)
    elevation = torch.full_like(points[:, :1, 0], math.pi / 8)
    scanner = 5 * _viewpoint(severity, elevation, draw.uniform(1))
    seen = visible(points, scanner)
    offset = points - scanner
    distance, flat = offset.norm(dim=2), offset[..., :2].norm(dim=2)
    polar = torch.atan2(flat, offset[..., 2])
    first = polar.masked_fill(~seen, torch.inf).amin(1, keepdim=True)
    width = math.pi / 180
    beam = first + ((polar - first) / width).floor() * width + width / 2
    near = seen & ((polar - beam).abs() <= width / 4)
    near = torch.where(near.any(1, keepdim=True), near, seen)
    level = (distance * beam.sin() / flat.clamp_min(1e-12))[..., None] * offset[..., :2]
    snapped = scanner + torch.cat([level, (distance * beam.cos())[..., None]], 2)
    return _resampled(snapped, near, draw.uniform(points.shape[1]), num)


def density_inc(points: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Halves the points, keeping 1 to 5 neighbourhoods of 100 points; others are drawn with replacement."""
    num, size = points.shape[1] // 2, _scaled(100, points.shape[1] // 2)
    draw = Draw(points, severity + num - severity * size, generator)
    rest, kept = points, []
    for _ in range(severity):
        inside, rest = operations.split_neighbourhood(rest, draw.index(rest.shape[1], 1).squeeze(1), size)
        kept.append(inside)
    drawn = operations.gather(rest, draw.index(rest.shape[1], num - severity * size))
    return torch.cat([*kept, drawn], 1)


def density_dec(points: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Drops three quarters of 1 to 5 neighbourhoods of 100 points, one after the other."""
    size = _scaled(100, points.shape[1])
    draw = Draw(points, severity * (1 + size), generator)
    for _ in range(severity):
        inside, rest = operations.split_neighbourhood(points, draw.index(points.shape[1], 1).squeeze(1), size)
        left = draw.subset(size, size - 3 * size // 4)
        points = torch.cat([rest, operations.gather(inside, left)], 1)
    return points


def cutout(points: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Drops 2, 3, 5, 7 or 10 neighbourhoods of 30 points."""
    count, size = _CUTS[severity - 1], _scaled(30, points.shape[1])
    draw = Draw(points, count, generator)
    for _ in range(count):
        points = operations.split_neighbourhood(points, draw.index(points.shape[1], 1).squeeze(1), size)[1]
    return points


# Noise


def uniform(points: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Uniform noise of +-0.01 to +-0.05."""
    noise = 2 * Draw(points, 3 * points.shape[1], generator).uniform(points.shape[1], 3) - 1
    return points + 0.01 * severity * noise


def gaussian(points: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Gaussian noise of standard deviation 0.01 to 0.03, clipped to [-1, 1]."""
    noise = Draw(points, 3 * points.shape[1], generator).normal(points.shape[1], 3)
    return (points + (0.005 + 0.005 * severity) * noise).clamp(-1, 1)


def impulse(points: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Moves a thirtieth to a tenth of the points by +-0.1 along each axis."""
    num = points.shape[1]
    count = num // (30, 25, 20, 15, 10)[severity - 1]
    draw = Draw(points, num + 3 * count, generator)
    index = draw.subset(num, count).unsqueeze(2).expand(-1, -1, 3)
    return points.scatter_add(1, index, 0.1 * draw.signs(count, 3))


def upsampling(points: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Adds copies of a fifth to all of the points with uniform noise of +-0.05."""
    num, count = points.shape[1], upsampled(points.shape[1], severity)
    draw = Draw(points, num + 3 * count, generator)
    copies = operations.gather(points, draw.subset(num, count))
    return torch.cat([points, copies + 0.05 * (2 * draw.uniform(count, 3) - 1)], 1)


def upsampled(num: int, severity: int) -> int:
    """Number of points added by `upsampling`."""
    return num // (5, 4, 3, 2, 1)[severity - 1]


def background(points: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Adds a forty-fifth to a twentieth as many points, uniform in [-1, 1]^3."""
    count = scattered(points.shape[1], severity)
    return torch.cat([points, 2 * Draw(points, 3 * count, generator).uniform(count, 3) - 1], 1)


def scattered(num: int, severity: int) -> int:
    """Number of points added by `background`."""
    return num // (45, 40, 35, 30, 20)[severity - 1]


# Transformation


def rotation(points: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Rotates by +-(c +- 2.5) degrees about each axis, c = 2.5, 5, 7.5, 10 or 15."""
    draw = Draw(points, 6, generator)
    degrees = (2.5, 5.0, 7.5, 10.0, 15.0)[severity - 1] + 2.5 * (2 * draw.uniform(3) - 1)
    angle = torch.deg2rad(degrees * draw.signs(3))
    cos, sin = angle.cos(), angle.sin()
    for axis in range(3):
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn = torch.eye(3, dtype=points.dtype, device=points.device).repeat(len(points), 1, 1)
        turn[:, first, first] = turn[:, second, second] = cos[:, axis]
        turn[:, second, first], turn[:, first, second] = sin[:, axis], -sin[:, axis]
        points = points @ turn
    return points


def shear(points: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Adds +-(c +- 0.05) times each other coordinate to the horizontal ones, c = 0.05 to 0.25."""
    draw = Draw(points, 8, generator)
    by = (0.05 * severity + 0.05 * (2 * draw.uniform(4) - 1)) * draw.signs(4)
    x, y, z = points.unbind(2)
    level = [x + by[:, :1] * y + by[:, 1:2] * z, y + by[:, 2:3] * x + by[:, 3:] * z]
    return torch.stack([*level, z], 2)


def ffd(points: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Free-form deformation with 5 x 5 x 5 control points of [-1, 1]^3 (Sederberg & Parry, 1986).

    ``x + sum_ijk b_i(x) b_j(y) b_k(z) m_ijk`` with Bernstein polynomials b of degree 4 and moves m uniform in
    +-0.1 to +-0.5 of the box's side. Points outside the box are unchanged.
    """
    draw = Draw(points, 3 * _GRID**3, generator)
    moves = 2 * (0.1 * severity) * (2 * draw.uniform(_GRID, _GRID, _GRID, 3) - 1)
    inside = (points.abs() <= 1).all(2, keepdim=True)
    share = ((points.clamp(-1, 1) + 1) / 2).unsqueeze(3)  # (B, N, 3, 1)
    power = torch.arange(_GRID, dtype=points.dtype, device=points.device)
    binomial = torch.tensor([math.comb(_GRID - 1, i) for i in range(_GRID)]).to(power)
    basis = binomial * share**power * (1 - share) ** (_GRID - 1 - power)  # (B, N, 3, 5)
    shift = torch.einsum("bni,bnj,bnk,bijkc->bnc", *basis.unbind(2), moves)
    return points + inside * shift


def rbf(points: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Moves 5 x 5 x 5 control points by 0.025 to 0.125; multiquadrics ``sqrt(r^2 + 0.25)``."""
    return _interpolated(points, severity, generator, lambda squared: (squared + _RADIUS**2).sqrt())


def inv_rbf(points: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """As `rbf`; inverse multiquadrics ``1 / sqrt(r^2 + 0.25)``."""
    return _interpolated(points, severity, generator, lambda squared: (squared + _RADIUS**2).rsqrt())


def _interpolated(
    points: Tensor, severity: int, generator: torch.Generator, basis: Callable[[Tensor], Tensor]
) -> Tensor:
    """Interpolates moves of the control points by radial basis functions and an affine map."""
    line = torch.linspace(-1, 1, _GRID, dtype=points.dtype, device=points.device)
    control = torch.cartesian_prod(line, line, line).unsqueeze(0)  # (1, 125, 3)
    moves = 0.025 * severity * Draw(points, 2 * _GRID**3, generator).directions(_GRID**3)
    affine = torch.cat([torch.ones_like(control[..., :1]), control], 2)
    corner = affine.new_zeros(1, 4, 4)
    system = torch.cat(
        [
            torch.cat([basis(operations.squared_distances(control, control)), affine], 2),
            torch.cat([affine.mT, corner], 2),
        ],
        1,
    )
    wanted = torch.cat([moves, moves.new_zeros(len(points), 4, 3)], 1)
    weights: Tensor = torch.linalg.solve(system, wanted)
    values = basis(operations.squared_distances(points, control.expand(len(points), -1, -1)))
    return points + torch.cat([values, torch.ones_like(points[..., :1]), points], 2) @ weights


# Visibility


def visible(points: Tensor, viewpoint: Tensor) -> Tensor:
    """Points of a cloud, as samples of a surface, that are visible from outside.

    A point is hidden by another point within a distance r of its line of sight, the mean distance to the
    fourth neighbour, that is nearer to the viewer by more than 2 r and more than 4 times its distance to that
    line. Surfaces therefore do not hide themselves at angles of up to 76 degrees.

    Args:
        points: ``(B, N, 3)`` clouds, N > 4.
        viewpoint: ``(B, 1, 3)`` viewpoints.

    Returns:
        ``(B, N)`` mask, not empty.
    """
    radius = operations.knn(points, points, 5)[0][..., 4].sqrt().mean(1)[:, None, None]
    offset = points - viewpoint
    distance = offset.norm(dim=2, keepdim=True)
    sight = offset / distance
    rows = max(1, _LARGEST // (len(points) * points.shape[1]))
    parts = []
    for start in range(0, points.shape[1], rows):
        some = slice(start, start + rows)
        cosine = sight[:, some] @ sight.mT
        aside = distance.mT**2 * (1 - cosine**2)  # squared, (B, rows, N)
        nearer = distance[:, some] - distance.mT
        in_front = (aside < radius**2) & (nearer > 2 * radius) & (nearer**2 > 16 * aside)
        parts.append(~in_front.any(2))
    return torch.cat(parts, 1)


def _viewpoint(severity: int, elevation: Tensor, share: Tensor) -> Tensor:
    """``(B, 1, 3)`` unit vectors at an elevation ``(B, 1)`` within a fifth of the horizon."""
    azimuth = 2 * math.pi * severity / 5 + math.pi / 5 * (2 * share - 1)
    flat = elevation.cos()
    # The published camera turns from the y axis.
    return torch.stack([-flat * azimuth.sin(), flat * azimuth.cos(), elevation.sin()], 2)


def _resampled(points: Tensor, mask: Tensor, key: Tensor, num: int) -> Tensor:
    """``(B, num, 3)`` masked points in the order of their keys, repeated from the first."""
    order = key.masked_fill(~mask, torch.inf).argsort(1)
    slot = torch.arange(num, device=points.device) % mask.sum(1, keepdim=True)
    return operations.gather(points, order.gather(1, slot))


def _scaled(count: int, num: int) -> int:
    """A count for 1,024 points scaled to ``num``, at least 1."""
    return max(1, round(count * num / 1024))


_CUTS = (2, 3, 5, 7, 10)
_SEEN = ("occlusion", "lidar")


def _same(num: int, severity: int) -> int:
    return num


CORRUPTIONS: dict[str, Corruption] = {
    "occlusion": Corruption("density", occlusion, _same, True, 16),
    "lidar": Corruption("density", lidar, lambda num, severity: 3 * num // 4, False, 16),
    "density_inc": Corruption("density", density_inc, lambda num, severity: num // 2, False, 32),
    "density_dec": Corruption(
        "density",
        density_dec,
        lambda num, severity: num - severity * (3 * _scaled(100, num) // 4),
        False,
        16,
    ),
    "cutout": Corruption(
        "density", cutout, lambda num, severity: num - _CUTS[severity - 1] * _scaled(30, num), False, 16
    ),
    "uniform": Corruption("noise", uniform, _same, True),
    "gaussian": Corruption("noise", gaussian, _same, False),
    "impulse": Corruption("noise", impulse, _same, True),
    "upsampling": Corruption("noise", upsampling, lambda num, severity: num + upsampled(num, severity), True),
    "background": Corruption("noise", background, lambda num, severity: num + scattered(num, severity), True),
    "rotation": Corruption("transformation", rotation, _same, True),
    "shear": Corruption("transformation", shear, _same, True),
    "ffd": Corruption("transformation", ffd, _same, True),
    "rbf": Corruption("transformation", rbf, _same, True),
    "inv_rbf": Corruption("transformation", inv_rbf, _same, True),
}
"""The corruptions by name, family by family in the order of the paper."""
