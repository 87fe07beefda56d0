"""How far the surfaces of an Occupancy Network are from those of the shapes it was given."""

from __future__ import annotations

import torch

from ifdefense.geometry.points import chamfer_distance
from ifdefense.implicit.occupancy import OccupancyNetwork
from ifdefense.stages.extraction import ExtractionOptions, extract_meshes
from ifdefense.stages.resampling import resample
from ifdefense.training.fit import Sampler, TrainOptions
from ifdefense.training.occupancies import OFFSET, OccupancySet


@torch.no_grad()
def chamfer_l1(
    network: OccupancyNetwork, validation: OccupancySet, options: TrainOptions, count: int = 64
) -> dict[str, float]:
    """Mean Chamfer-L1 of the first shapes of a set, for clean and for corrupted input.

    As Mescheder et al. define it (`arXiv:1812.03828 <https://arxiv.org/abs/1812.03828>`_): the mean of the
    distances from samples of the mesh to the shape's points and back, in tenths of the longest side. Shapes
    that get no surface are left out; ``"missing"`` is their share.

    Args:
        network: the network, in evaluation mode.
        validation: shapes.
        options: of the training; the threshold and the box are used.
        count: number of shapes.

    Returns:
        ``"clean"``, ``"corrupted"`` and ``"missing"``.
    """
    sampler = Sampler(validation, options)
    device = next(network.parameters()).device
    extraction = ExtractionOptions(box=options.box, threshold=options.threshold)
    result, missing = {}, 0
    for name in ("clean", "corrupted"):
        given, whole = sampler.surfaces(count, name == "corrupted")
        distances = []
        for part in torch.arange(len(given)).split(16):
            field = network.field(given[part].to(device))
            for index, mesh in zip(
                part, extract_meshes(field, len(part), extraction, device=device), strict=True
            ):
                if mesh.is_empty:
                    missing += 1
                    continue
                samples = torch.from_numpy(resample([mesh], whole.shape[1], method="uniform", inset=OFFSET))
                both = chamfer_distance(samples, whole[index][None], squared=False)
                distances.append(float(both) / 2 * 10)
        result[name] = sum(distances) / max(len(distances), 1)
    return result | {"missing": missing / (2 * max(len(given), 1))}
