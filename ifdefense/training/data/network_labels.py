"""Solids of clouds without meshes, estimated by a trained network."""

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
"""Cells per side of the grid used to search for parts without points."""


@torch.no_grad()
def grids_from_network(
    network: ImplicitNetwork, clouds: Sequence[NDArray[np.floating]]
) -> list[OccupancyGrid]:
    """Thickened surface of each cloud according to a local network, with the enclosed space.

    Args:
        network: its logit falls linearly with the distance from the surface, see `SOFTNESS`.
        clouds: ``(N_i, 3)`` samples of surfaces, unit-cube frame.
    """
    # Align the corners of the extraction grid with centres of cells.
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
