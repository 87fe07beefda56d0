"""From a field to meshes: multi-resolution iso-surface extraction (MISE) of a batch, then marching cubes.

MISE (Mescheder et al., 2019, https://arxiv.org/abs/1812.03828, section 3.3) evaluates a coarse grid, then
only the points inside cells whose corners disagree, level by level. As in the original, the surface is
followed: where a newly evaluated point contradicts cells around it that looked uniform, these are subdivided
as well, until nothing changes. A surface that changes the sign on one edge of the coarse grid is found whole;
one that slips between the coarse points is missed. Unlike the original, clouds share each call of the field.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ifdefense.geometry.mesh import Mesh
from ifdefense.implicit.base import Calibration, Field

# Stands outside the grid's border, far enough below any level that a surface cut by the box closes there.
_OUTSIDE = -1e6
# Stands for a value that equals the level: scikit-image leaves holes around a corner of exactly zero.
_TINY = -1e-12


@dataclass(frozen=True)
class ExtractionOptions:
    """How finely the surface is sampled.

    Args:
        resolution: cells a side at the finest level, ``coarse`` times a power of two.
        coarse: cells a side at the first level, which is evaluated everywhere.
        threshold: probability of occupancy at the surface, in (0, 1).
        box: side of the sampled cube, centred on the origin of the unit-cube frame.

    Raises:
        ValueError: a value outside these ranges.
    """

    resolution: int = 64
    coarse: int = 16
    threshold: float = 0.2
    box: float = 1.1

    def __post_init__(self) -> None:
        ratio, rest = divmod(self.resolution, self.coarse) if self.coarse >= 1 else (0, 0)
        if rest or ratio < 1 or ratio & (ratio - 1):
            raise ValueError(
                f"resolution must be coarse times a power of two, got {self.resolution} and {self.coarse}"
            )
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold is a probability in (0, 1), got {self.threshold}")
        if not self.box > 0:
            raise ValueError(f"box must have a positive side, got {self.box}")

    @property
    def level(self) -> float:
        """The logit of ``threshold``."""
        return math.log(self.threshold / (1 - self.threshold))

    @property
    def spacing(self) -> float:
        """Side of a cell at the finest level, in the unit-cube frame."""
        return self.box / self.resolution


@dataclass(frozen=True, eq=False)
class Grid:
    """Logits on the finest grid of several clouds.

    Args:
        values: (B, R + 1, R + 1, R + 1) logits, axes x, y, z. Where ``known`` is false the field was not
            evaluated: the value is a copy from nearby, on the right side of the level.
        known: bool of the same shape, where the field was evaluated.
        options: the options the grid was made with.
    """

    values: Tensor
    known: Tensor
    options: ExtractionOptions

    @property
    def evaluations(self) -> Tensor:
        """Points at which the field of each cloud was evaluated, (B,) int64; a dense grid has (R + 1)^3."""
        return self.known.flatten(1).sum(dim=1)

    def meshes(self) -> list[Mesh]:
        """Surface of each cloud in the unit-cube frame, watertight and outward oriented; empty if none.

        Marching cubes with the topology of Lewiner et al. (2003) from scikit-image, on the bounding box of
        what lies inside. A solid that reaches the border of the sampled cube is closed there.
        """
        heights = functional.pad(self.values - self.options.level, (1,) * 6, value=_OUTSIDE)
        return [_march(height, self.options) for height in heights.cpu()]


@torch.no_grad()
def mise(
    field: Field,
    num_clouds: int,
    options: ExtractionOptions = ExtractionOptions(),
    *,
    seeds: Sequence[Tensor] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Grid:
    """Evaluate the fields of a batch of clouds near their surfaces, on the grid of the finest level.

    The field is called once a level, and again while the surface leaves the cells subdivided so far (a few
    small calls); each call holds the points of all clouds.

    Args:
        field: the logits, see `Field`.
        num_clouds: clouds in the batch.
        options: resolution, level and box.
        seeds: one tensor (K, 3) per cloud, points near which a surface may lie unseen by the coarse levels:
            the cells that hold them are subdivided down to the finest level.
        device: where the field lives and the bookkeeping is done.
        dtype: of the points given to the field and of the values kept.

    Raises:
        ValueError: the field returned something that is not (M,), or a logit that is not finite.
    """
    sampler = _Sampler(field, options, device, dtype)
    cells = options.coarse
    known = torch.ones((num_clouds, *(cells + 1,) * 3), dtype=torch.bool, device=device)
    values = sampler.evaluate(known)[1].reshape(known.shape)
    while cells < options.resolution:
        fresh = _mixed(values > options.level)
        if seeds is not None:
            fresh |= _occupied(seeds, cells, options.box, fresh)
        active = fresh.clone()
        cells *= 2
        values, known = _refined(values, known)
        while fresh.any():
            index, logits = sampler.evaluate(_corners(fresh) & ~known)
            at = tuple(index.unbind(1))
            flipped = (logits > options.level) != (values[at] > options.level)
            values[at], known[at] = logits, True
            fresh = _cells_around(index[flipped], active) & ~active
            active |= fresh
    return Grid(values, known, options)


def extract_meshes(
    field: Field,
    num_clouds: int,
    options: ExtractionOptions = ExtractionOptions(),
    *,
    seeds: Sequence[Tensor] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Mesh]:
    """Surface of each cloud's field at the options' level: `mise`, then marching cubes.

    Args and errors as `mise`.

    Returns:
        A mesh a cloud in the unit-cube frame, watertight and outward oriented; an empty one where no part of
        a surface is seen.
    """
    return mise(field, num_clouds, options, seeds=seeds, device=device, dtype=dtype).meshes()


@dataclass(frozen=True)
class Extraction:
    """Field to mesh at the level of a network's calibration; the default of the pipeline.

    Args:
        resolution: cells a side at the finest level, ``coarse`` times a power of two.
        coarse: cells a side at the first level.
        seeded: whether cells that hold input points are subdivided in any case: thin parts may lie between
            the points of the coarse grid.

    Raises:
        ValueError: a value outside these ranges.
    """

    resolution: int = 64
    coarse: int = 16
    seeded: bool = True

    def __post_init__(self) -> None:
        ExtractionOptions(self.resolution, self.coarse)

    def __call__(self, field: Field, clouds: Sequence[Tensor], calibration: Calibration) -> list[Mesh]:
        """Surface of each cloud; at the second threshold where the first shows none.

        Args:
            field: logits of the batch, see `Field`.
            clouds: ``(N_i, 3)`` what the network has seen, unit cube.
            calibration: threshold and box.

        Returns:
            One watertight mesh per cloud in the unit-cube frame, empty where there is no surface.
        """
        options = ExtractionOptions(self.resolution, self.coarse, calibration.threshold, calibration.box)
        seeds, device = list(clouds) if self.seeded else None, clouds[0].device
        meshes = extract_meshes(field, len(clouds), options, seeds=seeds, device=device)
        missing = [index for index, mesh in enumerate(meshes) if mesh.is_empty]
        if missing and calibration.second_threshold is not None:
            lower = dataclasses.replace(options, threshold=calibration.second_threshold)
            original = torch.tensor(missing, device=device)
            again = extract_meshes(
                lambda points, cloud: field(points, original[cloud]), len(missing), lower, device=device
            )
            for index, mesh in zip(missing, again, strict=True):
                meshes[index] = mesh
        return meshes


class _Sampler:
    """Calls the field at lattice points of any level."""

    def __init__(
        self, field: Field, options: ExtractionOptions, device: torch.device | str | None, dtype: torch.dtype
    ) -> None:
        self.field, self.options, self.device, self.dtype = field, options, device, dtype

    def evaluate(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Places (M, 4), cloud, x, y, z, where ``wanted`` (B, n + 1, ...) is true, and logits (M,) there."""
        index = wanted.nonzero()
        # Positions come from the index on the finest grid, so that a point is the same number at every level.
        fine = index[:, 1:] * (self.options.resolution // (wanted.shape[1] - 1))
        points = fine.to(self.dtype) * self.options.spacing - self.options.box / 2
        logits = self.field(points, index[:, 0].contiguous())
        if logits.shape != points.shape[:1]:
            raise ValueError(f"the field must return logits {(len(points),)}, got {tuple(logits.shape)}")
        bad = ~logits.isfinite()
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            where = f"cloud {int(index[row, 0])} of the batch at {points[row].tolist()}"
            raise ValueError(f"the field is not finite for {where}: {float(logits[row])}")
        return index, logits.to(self.dtype)


def _mixed(inside: Tensor) -> Tensor:
    """Cells (B, n, n, n) whose eight corners in ``inside`` (B, n + 1, n + 1, n + 1) disagree."""
    some, every = inside, inside
    for dim in (1, 2, 3):
        size = some.shape[dim] - 1
        some = some.narrow(dim, 0, size) | some.narrow(dim, 1, size)
        every = every.narrow(dim, 0, size) & every.narrow(dim, 1, size)
    return some & ~every


def _occupied(seeds: Sequence[Tensor], cells: int, box: float, like: Tensor) -> Tensor:
    """Cells, shaped as ``like`` (B, n, n, n), that hold a seed."""
    marked = torch.zeros_like(like)
    for row, points in enumerate(seeds):
        cell = ((points / box + 0.5) * cells).floor().long()
        x, y, z = cell[((cell >= 0) & (cell < cells)).all(1)].to(like.device).unbind(1)
        marked[row, x, y, z] = True
    return marked


def _refined(values: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """The next finer grid: new points copy the value of the corner below them and are not known.

    That corner belongs to every cell a new point touches, so in a uniform cell the copy has the cell's sign.
    """
    below = torch.arange(2 * values.shape[1] - 1, device=values.device) // 2
    for dim in (1, 2, 3):
        values = values.index_select(dim, below)
    finer = torch.zeros_like(values, dtype=torch.bool)
    finer[:, ::2, ::2, ::2] = known
    return values, finer


def _corners(cells: Tensor) -> Tensor:
    """Points (B, 2n + 1, ...) of the finer grid that touch the marked cells (B, n, n, n) of the coarser."""
    marked = cells
    for dim in (1, 2, 3):
        size = marked.shape[dim]
        shape = list(marked.shape)
        shape[dim] = 2 * size + 1
        spread = marked.new_zeros(shape)
        for first in range(3):
            spread.transpose(1, dim)[:, first : first + 2 * size - 1 : 2] |= marked.transpose(1, dim)
        marked = spread
    return marked


def _cells_around(points: Tensor, like: Tensor) -> Tensor:
    """Marks, shaped as ``like`` (B, n, n, n), the cells touched by ``points`` (K, 4) of the finer grid."""
    marked = torch.zeros_like(like)
    for offset in itertools.product((0, 1), repeat=3):
        x, y, z = ((points[:, 1:] - points.new_tensor(offset)) // 2).clamp(0, like.shape[1] - 1).unbind(1)
        marked[points[:, 0], x, y, z] = True
    return marked


def _march(height: Tensor, options: ExtractionOptions) -> Mesh:
    """Mesh of one cloud from values relative to the level, padded by one point on each side."""
    from skimage.measure import marching_cubes

    inside = height > 0
    height = torch.where(height == 0, _TINY, height)
    if not inside.any():
        return Mesh.empty()
    first, window = [], []
    for axes in ((1, 2), (0, 2), (0, 1)):
        occupied = inside.any(dim=axes[1]).any(dim=axes[0]).nonzero()
        low, high = int(occupied[0]) - 1, int(occupied[-1]) + 2
        first.append(low - 1)  # the padding shifted everything by one
        window.append(slice(low, high))
    volume = height[tuple(window)].float().numpy()
    # By scikit-image's left-handed convention "ascent" makes counter-clockwise faces around larger values.
    vertices, faces, _, _ = marching_cubes(np.ascontiguousarray(volume), 0.0, gradient_direction="ascent")
    positions = (vertices + np.array(first)) * options.spacing - options.box / 2
    return Mesh(positions.astype(np.float32), faces)
