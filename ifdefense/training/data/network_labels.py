"""Solids behind clouds without meshes, as a trained network sees their surface."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ifdefense.implicit.base import ImplicitNetwork
from ifdefense.stages.extraction import ExtractionOptions, track
from ifdefense.training.data.solids import BOX, RESOLUTION, STEP, OccupancyGrid, filled_grid
from ifdefense.training.data.surfaces import SOFTNESS

COARSE = 6
"""Cells per side of the grid on which parts without points are searched."""


@torch.no_grad()
def grids_from_network(
    network: ImplicitNetwork, clouds: Sequence[NDArray[np.floating]]
) -> list[OccupancyGrid]:
    """The thickened surface that a local network sees behind each cloud, and what it encloses.

    Args:
        network: its logit falls linearly with the distance from the surface, see `SOFTNESS`.
        clouds: ``(N_i, 3)`` samples of surfaces, unit-cube frame.
    """
    # Corners of the extraction's grid are moved onto centres of cells.
    half = BOX / RESOLUTION / 2
    points = [torch.from_numpy(np.asarray(cloud, np.float32)) for cloud in clouds]
    field = network.field(network.encode(points))
    grid = track(
        lambda queries, cloud: field(queries + half, cloud),
        len(points),
        ExtractionOptions(RESOLUTION, COARSE, network.calibration.threshold, BOX),
        seeds=[cloud - half for cloud in points],
    )
    distances = SOFTNESS * (grid.values - network.calibration.level)
    sheets = torch.where(grid.known, distances, -127 * STEP)[:, :-1, :-1, :-1].numpy()
    return [filled_grid(sheet, sheet > 0) for sheet in sheets]
