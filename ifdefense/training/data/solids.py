"""Ground truth of implicit networks: signed grids of clouds, triangle soups and procedural solids.

A network learns the label *inside the solid thickened by* `OFFSET`. Thickened, sheets without an inside
(curtains, table tops modelled as one layer) have a surface of their own; resampling moves its samples back by
the offset.

A grid holds the cell centres of a cube of side `BOX` in the unit-cube frame. It is positive inside, in int8
steps of `STEP`, and exact only near the surface; far from it only the sign counts.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from ifdefense.geometry.mesh import Mesh
    from ifdefense.shapes.procedural import Shape

logger = logging.getLogger(__name__)

BOX = 1.1
"""Side of a grid, unit cube."""
RESOLUTION = 48
"""Cells per side of a grid."""
STEP = 0.001
"""Length of one step of a grid, unit cube."""
OFFSET = 0.015
"""Thickening of the solid in the labels, unit cube."""

OccupancyGrid = NDArray[np.int8]
"""``(R, R, R)``, x first."""


@dataclasses.dataclass(frozen=True)
class SolidOptions:
    """How the solid behind a bare cloud is estimated; lengths in units of the sampling distance.

    The sampling distance is twice the mean distance to the nearest neighbour: for random samples of a
    surface, the side of the square that holds one sample.

    Attributes:
        offset: thickening of the solid, in the unit-cube frame.
        neighbours: samples that a plane is fitted to.
        reach: a cell farther than this from the centroid of its nearest samples lies beyond the sheet's
            border.
        seal: distance within which samples stop a ray.
        limits: bounds of the sampling distance, in the unit-cube frame.
    """

    offset: float = OFFSET
    neighbours: int = 8
    reach: float = 1.0
    seal: float = 1.0
    limits: tuple[float, float] = (0.02, 0.08)


def cell_centres(resolution: int = RESOLUTION) -> NDArray[np.float32]:
    """The ``(R³, 3)`` centres of the grid's cells in the unit-cube frame, x slowest."""
    axis = ((np.arange(resolution) + 0.5) / resolution - 0.5).astype(np.float32) * np.float32(BOX)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)


def distance_to_points(
    points: NDArray[np.floating], limit: float, resolution: int = RESOLUTION
) -> NDArray[np.float32]:
    """Distance of every cell centre to the nearest point, clipped to ``limit``.

    A point is compared only with the cells of a window around it, so the cost is linear in the points.

    Args:
        points: ``(N, 3)``, unit-cube frame.
        limit: largest distance of interest.
        resolution: cells per side.

    Returns:
        ``(R, R, R)`` distances.
    """
    cell = BOX / resolution
    reach = int(np.ceil(limit / cell))
    offsets = np.arange(-reach, reach + 1)
    window = np.stack(np.meshgrid(offsets, offsets, offsets, indexing="ij"), axis=-1).reshape(-1, 3)
    window = window[np.linalg.norm(np.maximum(np.abs(window) - 0.5, 0.0), axis=1) * cell <= limit]
    home = np.floor((points / BOX + 0.5) * resolution).astype(np.int64)
    squared = torch.full((resolution**3,), limit * limit, dtype=torch.float32)
    for start in range(0, len(points), 4096):
        part = slice(start, start + 4096)
        cells = home[part, None, :] + window[None]  # (n, W, 3)
        centre = ((cells + 0.5) / resolution - 0.5) * BOX
        d2 = ((centre - points[part, None, :]) ** 2).sum(-1)
        valid = ((cells >= 0) & (cells < resolution)).all(-1)
        flat = (cells[..., 0] * resolution + cells[..., 1]) * resolution + cells[..., 2]
        squared.scatter_reduce_(
            0, torch.from_numpy(flat[valid]), torch.from_numpy(d2[valid].astype(np.float32)), reduce="amin"
        )
    return squared.sqrt().numpy().reshape(resolution, resolution, resolution)


def _outside(free: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The free cells connected to the border of the grid."""
    from scipy import ndimage

    labels, _ = ndimage.label(np.pad(free, 1, constant_values=True))
    return np.asarray(labels == labels[0, 0, 0])[1:-1, 1:-1, 1:-1]


def _quantise(signed: NDArray[np.floating]) -> OccupancyGrid:
    return np.asarray(np.clip(np.rint(signed / STEP), -127, 127), dtype=np.int8)


def _sheet(points: NDArray[np.floating], spacing: float, options: SolidOptions) -> NDArray[np.float64]:
    """Signed grid of the sheet through the points: thickness minus distance to locally fitted planes."""
    from scipy.spatial import cKDTree

    tree = cKDTree(points)
    _, around = tree.query(points, options.neighbours + 2)
    spread = points[around] - points[around].mean(1, keepdims=True)  # (N, k, 3)
    _, axes = np.linalg.eigh(spread.transpose(0, 2, 1) @ spread)
    normals = axes[:, :, 0]  # the direction of least spread; its sign does not matter

    signed = np.full(RESOLUTION**3, -STEP * 127)
    near = np.flatnonzero(distance_to_points(points, 1.5 * spacing).ravel() < 1.5 * spacing * (1 - 1e-6))
    cells = cell_centres()[near]
    distance, index = tree.query(cells, options.neighbours)
    weight = np.exp(-((distance / spacing) ** 2))[..., None]
    weight /= weight.sum(1, keepdims=True)
    delta = cells[:, None] - points[index]
    height = np.sqrt((weight[..., 0] * np.einsum("mkc,mkc->mk", delta, normals[index]) ** 2).sum(1))
    lateral = np.linalg.norm((weight * delta).sum(1), axis=1)
    signed[near] = np.minimum(options.offset - height, options.reach * spacing - lateral)
    return signed.reshape((RESOLUTION,) * 3)


def _enclosed(stops: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Cells whose rays along all six axes are stopped; a vote of neighbours closes gaps in the sampling."""
    from scipy import ndimage

    votes = np.zeros(stops.shape, dtype=np.float32)
    for axis in range(3):
        votes += np.logical_or.accumulate(stops, axis=axis)
        votes += np.flip(np.logical_or.accumulate(np.flip(stops, axis), axis=axis), axis)
    return np.asarray(ndimage.uniform_filter(votes, 3) > 5.5)


def grid_from_cloud(points: NDArray[np.floating], options: SolidOptions = SolidOptions()) -> OccupancyGrid:
    """The solid behind a cloud without a mesh: a thickened sheet through the points, and what it encloses.

    A cell is enclosed if rays along all six axes meet the cloud. A flood fill of the closed voxel shell does
    worse: with 1,024 random samples, a closing wide enough to seal the shell also fills the gaps between
    parts.

    Args:
        points: ``(N, 3)`` samples of the surface, unit-cube frame.
        options: scales.
    """
    from scipy.spatial import cKDTree

    points = np.asarray(points, dtype=np.float64)
    nearest = np.asarray(cKDTree(points).query(points, 2)[0])[:, 1]
    spacing = float(np.clip(2 * nearest.mean(), *options.limits))
    stops = distance_to_points(points, options.seal * spacing) < options.seal * spacing * (1 - 1e-6)
    return filled_grid(_sheet(points, spacing, options), stops)


def filled_grid(sheet: NDArray[np.floating], stops: NDArray[np.bool_]) -> OccupancyGrid:
    """The solid of a thickened sheet and of what it encloses.

    Args:
        sheet: ``(R, R, R)`` signed distances to the border of the sheet, positive inside, unit cube.
        stops: bool of the same shape, the cells that a ray does not pass.
    """
    from scipy import ndimage

    inside = _enclosed(stops) & (sheet <= 0)
    if inside.any():
        cell = BOX / RESOLUTION
        depth = ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside)
        sheet = np.maximum(sheet, (depth + 0.5) * cell)
    return _quantise(sheet)


def grid_from_shape(shape: Shape, offset: float = OFFSET) -> OccupancyGrid:
    """The exact grid of a procedural solid."""
    sdf = np.asarray(shape.sdf(cell_centres()), dtype=np.float32)
    return _quantise(offset - sdf.reshape(RESOLUTION, RESOLUTION, RESOLUTION))


def grid_from_mesh(
    mesh: Mesh, points: NDArray[np.floating], offset: float = OFFSET, max_disagreement: float = 0.1
) -> OccupancyGrid | None:
    """The grid of a triangle soup by winding numbers.

    Winding numbers are trusted only where they agree with a flood fill of the voxelised surface, which does
    not depend on orientations: for soups with inconsistent orientations whole regions differ.

    Args:
        mesh: triangles in the unit-cube frame.
        points: ``(N, 3)`` dense samples of its surface (tens of thousands), same frame.
        offset: thickening of the solid.
        max_disagreement: share of the occupied cells on which the two may differ.

    Returns:
        The grid, or ``None`` if the two differ by more.
    """
    import point_cloud_utils as pcu

    shape = (RESOLUTION,) * 3
    winding = pcu.triangle_soup_fast_winding_number(
        mesh.vertices.astype(np.float64), mesh.faces.astype(np.int32), cell_centres().astype(np.float64)
    )
    inside = np.asarray(winding).reshape(shape) > 0.5
    cell = BOX / RESOLUTION
    distance = distance_to_points(points, 2 * cell)
    band = distance < 1.5 * cell  # the surface itself, where the two cannot be compared
    filled = ~_outside(~band)
    occupied = inside | filled
    disagreement = ((inside != filled) & ~band).sum() / max(occupied.sum(), 1)
    if disagreement > max_disagreement:
        logger.debug(
            "winding number and flood fill differ on %.0f%% of the occupied cells", 100 * disagreement
        )
        return None
    return _quantise(offset + np.where(inside, distance, -distance))


@dataclasses.dataclass(frozen=True, eq=False)
class OccupancySet:
    """Clouds with the grids of the solids they were sampled from.

    Attributes:
        points: ``(S, N, 3)`` float16 surface points, unit-cube frame.
        grids: ``(S, R, R, R)`` int8 signed grids, positive inside.
        source: ``(S,)`` index into ``sources``.
        sources: names of the collections.
    """

    points: NDArray[np.float16]
    grids: OccupancyGrid
    source: NDArray[np.int64]
    sources: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.points)

    def save(self, folder: str | Path) -> None:
        """Writes a folder of ``.npy`` files, which load memory-mapped."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("points", "grids", "source"):
            np.save(folder / f"{name}.npy", getattr(self, name))
        (folder / "sources.txt").write_text("\n".join(self.sources))

    @classmethod
    def load(cls, folder: str | Path) -> OccupancySet:
        """Reads a folder written by `save`."""
        folder = Path(folder)
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("points", "grids", "source")
        }
        return cls(sources=tuple((folder / "sources.txt").read_text().split("\n")), **arrays)


def concatenate(sets: list[OccupancySet]) -> OccupancySet:
    """Joins sets whose clouds have the same number of points."""
    sources = tuple(name for part in sets for name in part.sources)
    starts = np.cumsum([0, *(len(part.sources) for part in sets)])
    return OccupancySet(
        points=np.concatenate([part.points for part in sets]),
        grids=np.concatenate([part.grids for part in sets]),
        source=np.concatenate([part.source + start for part, start in zip(sets, starts, strict=False)]),
        sources=sources,
    )


def interpolate(grids: Tensor, index: Tensor, queries: Tensor) -> Tensor:
    """Trilinear interpolation.

    Args:
        grids: ``(S, R, R, R)`` int8.
        index: ``(B,)`` int64, the grid of each cloud.
        queries: ``(B, Q, 3)``, unit-cube frame of the grid. Cells outside the grid count as far outside.

    Returns:
        ``(B, Q)`` float32 in steps of `STEP`, positive inside.
    """
    resolution = grids.shape[-1]
    grid = (queries / BOX + 0.5) * resolution - 0.5
    low = grid.floor()
    fraction = grid - low
    corner = low.long()
    base = index[:, None] * resolution**3
    flat = grids.reshape(-1)
    value = torch.zeros(queries.shape[:2])
    for offset in ((x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)):
        cell = corner + torch.tensor(offset)
        valid = ((cell >= 0) & (cell < resolution)).all(-1)
        i, j, k = cell.clamp(0, resolution - 1).unbind(-1)
        stored = flat[base + (i * resolution + j) * resolution + k].float()
        weight = torch.where(torch.tensor(offset, dtype=torch.bool), fraction, 1 - fraction).prod(-1)
        value += weight * torch.where(valid, stored, -127.0)
    return value
