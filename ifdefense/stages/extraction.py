"""Batched multi-resolution iso-surface extraction (MISE), then marching cubes.

MISE (Mescheder et al., 2019, https://arxiv.org/abs/1812.03828, section 3.3) evaluates a coarse grid and
subdivides the cells whose corners have different signs, level by level. If the sign of a new point differs
from that of an adjacent uniform cell, that cell is subdivided too, until nothing changes. Surfaces that cross
an edge of the coarse grid are therefore found completely; those between the coarse points are missed, unless
they contain seeds. Unlike in the original, all clouds share each call of the field.

Tracking (`track`) starts at the finest level, around points known to be near the surface, and follows the
surface from neighbour to neighbour, as continuation methods (Bloomenthal, 1988,
https://doi.org/10.1016/0167-8396(88)90013-1). It evaluates only the inside and its neighbours: half of the
points, if the inside is a thin shell.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ifdefense.geometry.mesh import Mesh
from ifdefense.implicit.base import Calibration, Field

# Padding value far below any level, so that a surface cut by the box is closed at its border.
_OUTSIDE = -1e6
# Replaces values equal to the level: scikit-image leaves holes around corners of exactly zero.
_TINY = -1e-12


@dataclass(frozen=True)
class ExtractionOptions:
    """Resolution, level and box of the extraction.

    Args:
        resolution: cells per side at the finest level, a multiple of ``coarse``.
        coarse: cells per side at the first level, which is evaluated densely.
        threshold: occupancy probability at the surface, in (0, 1).
        box: side of the evaluated cube, centred on 0, in the unit-cube frame.

    Raises:
        ValueError: a value outside these ranges.

    Examples:
        >>> ExtractionOptions(resolution=32, coarse=8).box
        1.1
    """

    resolution: int = 64
    coarse: int = 16
    threshold: float = 0.2
    box: float = 1.1

    def __post_init__(self) -> None:
        if self.coarse < 1 or self.resolution < self.coarse or self.resolution % self.coarse:
            raise ValueError(
                f"resolution must be a multiple of coarse, got {self.resolution} and {self.coarse}"
            )
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold is a probability in (0, 1), got {self.threshold}")
        if not self.box > 0:
            raise ValueError(f"box must have a positive side, got {self.box}")

    def check_halving(self) -> None:
        """Checks that the resolution is ``coarse`` times a power of two.

        Raises:
            ValueError: if it does not.
        """
        ratio = self.resolution // self.coarse
        if ratio & (ratio - 1):
            raise ValueError(
                f"resolution must be coarse times a power of two, got {self.resolution} and {self.coarse}"
            )

    @property
    def level(self) -> float:
        """The logit of ``threshold``."""
        return math.log(self.threshold / (1 - self.threshold))

    @property
    def spacing(self) -> float:
        """Cell size at the finest level, in the unit-cube frame."""
        return self.box / self.resolution


@dataclass(frozen=True, eq=False)
class Grid:
    """Logits of a batch of clouds on the finest grid.

    Args:
        values: (B, R + 1, R + 1, R + 1) logits, axes x, y, z. Where ``known`` is false, the value is a copy
            from nearby, on the right side of the level.
        known: bool of the same shape, where the field was evaluated.
        options: options of the extraction.

    Examples:
        >>> field = lambda points, cloud: 0.16 - (points**2).sum(1)  # a ball
        >>> grid = mise(field, 1, ExtractionOptions(resolution=16, coarse=8, threshold=0.5))
        >>> grid.values.shape
        torch.Size([1, 17, 17, 17])
    """

    values: Tensor
    known: Tensor
    options: ExtractionOptions

    @property
    def evaluations(self) -> Tensor:
        """Field evaluations per cloud, (B,) int64; a dense grid has (R + 1)^3."""
        return self.known.flatten(1).sum(dim=1)

    def meshes(self) -> list[Mesh]:
        """Surfaces in the unit-cube frame, watertight and oriented outwards; empty if there is none.

        Marching cubes of scikit-image (Lewiner et al., 2003) on the bounding box of the inside. A solid that
        reaches the border of the box is closed there.
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
    """Evaluates the fields of a batch near their surfaces, on the finest grid.

    The field is called once per level for all clouds, plus a few small calls where the surface leaves the
    cells subdivided so far.

    Args:
        field: the logits, see `Field`.
        num_clouds: batch size.
        options: resolution, level and box.
        seeds: one tensor (K, 3) per cloud of points near the surface. Cells that contain them are subdivided
            down to the finest level, which finds parts that the coarse levels miss.
        device: device of the field and of the grid.
        dtype: type of the query points and of the values.

    Raises:
        ValueError: the field returned a wrong shape or a logit that is not finite, or the resolution is not
            ``coarse`` times a power of two.

    Examples:
        >>> field = lambda points, cloud: 0.16 - (points**2).sum(1)  # a ball
        >>> grid = mise(field, 1, ExtractionOptions(resolution=16, coarse=8, threshold=0.5))
        >>> bool(grid.known.all())
        False
    """
    options.check_halving()
    sampler = _Sampler(field, options, device, dtype)
    cells = options.coarse
    known = torch.ones((num_clouds, *(cells + 1,) * 3), dtype=torch.bool, device=device)
    values = sampler.evaluate(*_at(known), cells).reshape(known.shape)
    while cells < options.resolution:
        fresh = _mixed(values > options.level)
        if seeds is not None:
            fresh |= _occupied(seeds, cells, options.box, fresh)
        active = fresh.clone()
        cells *= 2
        values, known = _refined(values, known)
        while fresh.any():
            owner, axes = _at(_corners(fresh) & ~known)
            logits = sampler.evaluate(owner, axes, cells)
            at = (owner, *axes)
            flipped = (logits > options.level) != (values[at] > options.level)
            values[at], known[at] = logits, True
            fresh = _cells_around([part[flipped] for part in at], active) & ~active
            active |= fresh
    return Grid(values, known, options)


@torch.no_grad()
def track(
    field: Field,
    num_clouds: int,
    options: ExtractionOptions = ExtractionOptions(),
    *,
    seeds: Sequence[Tensor],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Grid:
    """Evaluates the fields of a batch at the points inside and at their six neighbours, on the finest grid.

    Starts at the coarse grid and at the corners of the fine cells that contain seeds, and continues at the
    neighbours of each inside point. Thus all points around each surface found are known, and parts are missed
    only if no start point is inside. The whole inside is evaluated, so it should be thin.

    Args:
        field: the logits, see `Field`.
        num_clouds: batch size.
        options: resolution, level and box.
        seeds: one tensor (K, 3) per cloud of points near the surface.
        device: device of the field and of the grid.
        dtype: type of the query points and of the values.

    Raises:
        ValueError: as `mise`.

    Examples:
        >>> field = lambda points, cloud: 0.16 - (points**2).sum(1)  # a ball
        >>> options = ExtractionOptions(resolution=20, coarse=5, threshold=0.5)
        >>> track(field, 1, options, seeds=[points[0]]).values.shape
        torch.Size([1, 21, 21, 21])
    """
    sampler = _Sampler(field, options, device, dtype)
    size, step = options.resolution, options.resolution // options.coarse
    # Border of known points, so that neighbours need no bounds check.
    grid = torch.ones((num_clouds, *(size + 3,) * 3), dtype=torch.bool, device=device)
    known = grid[:, 1:-1, 1:-1, 1:-1].fill_(False)
    values = torch.full(grid.shape, options.level - 1, dtype=dtype, device=device)
    wanted = torch.zeros_like(grid)
    wanted[:, 1:-1:step, 1:-1:step, 1:-1:step] = True
    cells = _occupied(seeds, size, options.box, known[:, 1:, 1:, 1:])
    for corner in itertools.product((0, 1), repeat=3):
        wanted[(slice(None), *(slice(1 + first, 1 + first + size) for first in corner))] |= cells
    strides = grid.stride()
    sides = torch.tensor([sign * stride for stride in strides[1:] for sign in (1, -1)], device=device)
    flat_known, flat_values = grid.view(-1), values.view(-1)
    place = wanted.view(-1).nonzero().squeeze(1)
    while len(place):
        owner, rest = place.div(strides[0], rounding_mode="floor"), place % strides[0]
        axes = (rest.div(stride, rounding_mode="floor") % (size + 3) - 1 for stride in strides[1:])
        logits = sampler.evaluate(owner, list(axes), size)
        flat_values[place], flat_known[place] = logits, True
        beside = (place[logits > options.level].unsqueeze(1) + sides).flatten()
        place = beside[~flat_known[beside]].unique()
    return Grid(values[:, 1:-1, 1:-1, 1:-1], known, options)


def extract_meshes(
    field: Field,
    num_clouds: int,
    options: ExtractionOptions = ExtractionOptions(),
    *,
    seeds: Sequence[Tensor] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Mesh]:
    """Surfaces of the fields of a batch: `mise`, then marching cubes. Arguments and errors as `mise`.

    Returns:
        One mesh per cloud in the unit-cube frame, watertight and oriented outwards; empty if no surface is
        found.

    Examples:
        >>> field = lambda points, cloud: 0.16 - (points**2).sum(1)  # a ball
        >>> (mesh,) = extract_meshes(field, 1, ExtractionOptions(resolution=16, coarse=8, threshold=0.5))
        >>> mesh.is_watertight, round(mesh.volume, 2)
        (True, 0.26)
    """
    return mise(field, num_clouds, options, seeds=seeds, device=device, dtype=dtype).meshes()


@dataclass(frozen=True)
class Extraction:
    """Extraction stage: field to mesh at the level of the calibration.

    Args:
        resolution: cells per side at the finest level, ``coarse`` times a power of two.
        coarse: cells per side at the first level.
        seeded: whether to always subdivide cells that contain input points, which finds thin parts.

    Raises:
        ValueError: a value outside these ranges.

    Examples:
        >>> from ifdefense.implicit.base import Calibration
        >>> field = lambda points, cloud: 0.16 - (points**2).sum(1)  # a ball
        >>> (mesh,) = Extraction(16, 8)(field, [points[0]], Calibration(threshold=0.5))
        >>> mesh.is_watertight
        True
    """

    resolution: int = 64
    coarse: int = 16
    seeded: bool = True

    def __post_init__(self) -> None:
        ExtractionOptions(self.resolution, self.coarse).check_halving()

    def __call__(self, field: Field, clouds: Sequence[Tensor], calibration: Calibration) -> list[Mesh]:
        """Extracts one mesh per cloud, at the second threshold if the first finds no surface.

        Args:
            field: logits of the batch, see `Field`.
            clouds: ``(N_i, 3)`` input of the network, unit cube.
            calibration: threshold and box.

        Returns:
            One watertight mesh per cloud in the unit-cube frame, empty if there is no surface.
        """
        options = ExtractionOptions(self.resolution, self.coarse, calibration.threshold, calibration.box)
        seeds = list(clouds) if self.seeded else None
        return _extracted(extract_meshes, field, options, calibration, seeds, len(clouds), clouds[0].device)


@dataclass(frozen=True)
class Tracking:
    """Extraction stage that tracks thin solids from the input points, see `track`; otherwise as `Extraction`.

    A sheet along the axes that is thinner than a cell can lie between two planes of the grid and is then
    lost. Its input points show it: they are inside, in cells without a corner inside. Clouds with such points
    are extracted again on a finer grid.

    Args:
        resolution: cells per side, a multiple of ``coarse``.
        coarse: cells per side of the grid on which parts without input points are searched.
        finer: cells per side for clouds with lost parts, a larger multiple of ``coarse``; ``None`` for no
            second extraction.
        lost: largest share of input points in lost parts that is tolerated.

    Raises:
        ValueError: a value outside these ranges.

    Examples:
        >>> from ifdefense.implicit.base import Calibration
        >>> field = lambda points, cloud: 0.16 - (points**2).sum(1)  # a ball
        >>> (mesh,) = Tracking(20, 5)(field, [points[0]], Calibration(threshold=0.5))
        >>> mesh.is_watertight
        True
    """

    resolution: int = 40
    coarse: int = 5
    finer: int | None = None
    lost: float = 0.005

    def __post_init__(self) -> None:
        ExtractionOptions(self.resolution, self.coarse)
        if self.finer is not None:
            ExtractionOptions(self.finer, self.coarse)
            if self.finer <= self.resolution:
                raise ValueError(
                    f"finer must be larger than resolution, got {self.finer} and {self.resolution}"
                )
        if not 0 <= self.lost <= 1:
            raise ValueError(f"lost must be in [0, 1], got {self.lost}")

    def __call__(self, field: Field, clouds: Sequence[Tensor], calibration: Calibration) -> list[Mesh]:
        """As `Extraction`."""
        options = ExtractionOptions(self.resolution, self.coarse, calibration.threshold, calibration.box)
        return _extracted(
            self._tracked, field, options, calibration, list(clouds), len(clouds), clouds[0].device
        )

    def _tracked(
        self,
        field: Field,
        num_clouds: int,
        options: ExtractionOptions,
        *,
        seeds: list[Tensor],
        device: torch.device,
    ) -> list[Mesh]:
        """Meshes by `track`, on the finer grid for clouds with lost parts."""
        grid = track(field, num_clouds, options, seeds=seeds, device=device)
        meshes = grid.meshes()
        if self.finer is None:
            return meshes
        again = [row for row, share in enumerate(_lost(field, grid, seeds)) if share > self.lost]
        if again:
            finer = track(
                _of_rows(field, again, device),
                len(again),
                dataclasses.replace(options, resolution=self.finer),
                seeds=[seeds[row] for row in again],
                device=device,
            )
            for row, mesh in zip(again, finer.meshes(), strict=True):
                meshes[row] = mesh
        return meshes


def _extracted(
    extract: Callable[..., list[Mesh]],
    field: Field,
    options: ExtractionOptions,
    calibration: Calibration,
    seeds: list[Tensor] | None,
    num_clouds: int,
    device: torch.device,
) -> list[Mesh]:
    """Meshes of a batch; at the second threshold for clouds without a surface at the first."""
    meshes = extract(field, num_clouds, options, seeds=seeds, device=device)
    missing = [index for index, mesh in enumerate(meshes) if mesh.is_empty]
    if not missing or calibration.second_threshold is None:
        return meshes
    lower = dataclasses.replace(options, threshold=calibration.second_threshold)
    again = extract(
        _of_rows(field, missing, device),
        len(missing),
        lower,
        seeds=None if seeds is None or extract is extract_meshes else [seeds[index] for index in missing],
        device=device,
    )
    for index, mesh in zip(missing, again, strict=True):
        meshes[index] = mesh
    return meshes


def _of_rows(field: Field, rows: Sequence[int], device: torch.device) -> Field:
    """The field of some clouds of the batch."""
    original = torch.tensor(rows, device=device)
    return lambda points, cloud: field(points, original[cloud])


@torch.no_grad()
def _lost(field: Field, grid: Grid, seeds: Sequence[Tensor]) -> list[float]:
    """Share of each cloud's seeds that are inside, but in cells of the grid without a corner inside."""
    options = grid.options
    touched = _touched(grid.values > options.level)
    place = _cells_of(seeds, options.resolution, options.box, touched)
    outside = ~functional.pad(touched.flatten(), (0, 1), value=True)[place]
    if not outside.any():
        return [0.0] * len(seeds)
    sizes = torch.tensor([len(points) for points in seeds], device=touched.device)
    owner = torch.arange(len(seeds), device=touched.device).repeat_interleave(sizes)[outside]
    inside = field(torch.cat(list(seeds))[outside], owner) > options.level
    return (owner[inside].bincount(minlength=len(seeds)) / sizes).tolist()


class _Sampler:
    """Evaluates the field at grid points of any level."""

    def __init__(
        self, field: Field, options: ExtractionOptions, device: torch.device | str | None, dtype: torch.dtype
    ) -> None:
        self.field, self.options, self.dtype = field, options, dtype
        steps = torch.arange(options.resolution + 1, device=device, dtype=dtype)
        self.axis = steps * options.spacing - options.box / 2

    def evaluate(self, owner: Tensor, axes: Sequence[Tensor], cells: int) -> Tensor:
        """Logits (M,) of clouds (M,), ascending, at indices along x, y and z of a grid of ``cells``."""
        # Positions on the finest grid, so that they are identical at every level.
        step = self.options.resolution // cells
        points = torch.stack([self.axis[axis * step] for axis in axes], 1)
        logits = self.field(points, owner)
        if logits.shape != points.shape[:1]:
            raise ValueError(f"the field must return logits {(len(points),)}, got {tuple(logits.shape)}")
        bad = ~logits.isfinite()
        if bad.any():
            row = int(bad.nonzero()[0, 0])
            where = f"cloud {int(owner[row])} of the batch at {points[row].tolist()}"
            raise ValueError(f"the field is not finite for {where}: {float(logits[row])}")
        return logits.to(self.dtype)


def _at(mask: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Clouds (M,) and indices (M,) along each axis where a mask (B, n, n, n) is true."""
    owner, *axes = (part.contiguous() for part in mask.nonzero().unbind(1))
    return owner, axes


def _mixed(inside: Tensor) -> Tensor:
    """Cells (B, n, n, n) whose corners in ``inside`` (B, n + 1, n + 1, n + 1) have different signs."""
    return _touched(inside) & _touched(~inside)


def _touched(points: Tensor) -> Tensor:
    """Cells (B, n, n, n) with any corner in ``points`` (B, n + 1, n + 1, n + 1)."""
    cells = points
    for dim in (1, 2, 3):
        size = cells.shape[dim] - 1
        cells = cells.narrow(dim, 0, size) | cells.narrow(dim, 1, size)
    return cells


def _cells_of(seeds: Sequence[Tensor], cells: int, box: float, like: Tensor) -> Tensor:
    """Flat indices into ``like`` (B, n, n, n) of the cells of all seeds; its size outside the box."""
    owner = torch.arange(len(seeds)).repeat_interleave(torch.tensor([len(points) for points in seeds]))
    cell = ((torch.cat(list(seeds)).to(like.device) / box + 0.5) * cells).floor().long()
    place = owner.to(like.device)
    for axis in cell.unbind(1):
        place = place * cells + axis
    return place.where(((cell >= 0) & (cell < cells)).all(1), like.numel())


def _occupied(seeds: Sequence[Tensor], cells: int, box: float, like: Tensor) -> Tensor:
    """Mask of the cells that contain a seed, shaped as ``like`` (B, n, n, n)."""
    marked = torch.zeros(like.numel() + 1, dtype=torch.bool, device=like.device)
    marked[_cells_of(seeds, cells, box, like)] = True  # the last one is for points outside the box
    return marked[:-1].view(like.shape)


def _refined(values: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """The next finer grid. New points are unknown and copy the value of their lower corner.

    That corner belongs to all coarse cells around the new point, so the copy has the sign of a uniform cell.
    """
    below = torch.arange(2 * values.shape[1] - 1, device=values.device) // 2
    for dim in (1, 2, 3):
        values = values.index_select(dim, below)
    finer = torch.zeros_like(values, dtype=torch.bool)
    finer[:, ::2, ::2, ::2] = known
    return values, finer


def _corners(cells: Tensor) -> Tensor:
    """Points (B, 2n + 1, ...) of the finer grid in the marked cells (B, n, n, n) of the coarser one."""
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


def _cells_around(points: Sequence[Tensor], like: Tensor) -> Tensor:
    """Mask, shaped as ``like`` (B, n, n, n), of the cells touched by points of the finer grid.

    Args:
        points: clouds (K,) and indices (K,) along x, y and z.
        like: its shape.
    """
    marked = torch.zeros_like(like)
    owner, *axes = points
    for offset in itertools.product((0, 1), repeat=3):
        at = [((axis - d) // 2).clamp(0, like.shape[1] - 1) for axis, d in zip(axes, offset, strict=True)]
        marked[(owner, *at)] = True
    return marked


def _march(height: Tensor, options: ExtractionOptions) -> Mesh:
    """Mesh from values relative to the level, padded by one point on each side."""
    from skimage.measure import marching_cubes

    inside = height > 0
    height = torch.where(height == 0, _TINY, height)
    if not inside.any():
        return Mesh.empty()
    first, window = [], []
    for axes in ((1, 2), (0, 2), (0, 1)):
        occupied = inside.any(dim=axes[1]).any(dim=axes[0]).nonzero()
        low, high = int(occupied[0]) - 1, int(occupied[-1]) + 2
        first.append(low - 1)  # undo the padding
        window.append(slice(low, high))
    volume = height[tuple(window)].float().numpy()
    # In scikit-image's left-handed convention, "ascent" orients faces outwards around larger values.
    vertices, faces, _, _ = marching_cubes(np.ascontiguousarray(volume), 0.0, gradient_direction="ascent")
    positions = (vertices + np.array(first)) * options.spacing - options.box / 2
    return Mesh(positions.astype(np.float32), faces)
