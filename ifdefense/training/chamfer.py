"""Distance of the surfaces that an implicit network extracts from those of the shapes."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ifdefense.geometry.points import chamfer_distance
from ifdefense.implicit.base import ImplicitNetwork
from ifdefense.stages.extraction import ExtractionOptions, extract_meshes
from ifdefense.stages.resampling import resample


class ValidationShapes(Protocol):
    """Source of validation shapes."""

    def surfaces(self, count: int, corrupted: bool) -> tuple[Tensor, Tensor]:
        """Input clouds ``(S, N, 3)`` of the first shapes, and points of their surfaces ``(S, M, 3)``.

        Both are in the unit cube of the input; S is at most ``count``.
        """
        ...


@torch.no_grad()
def chamfer_l1(
    network: ImplicitNetwork,
    validation: ValidationShapes,
    count: int = 64,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """Mean Chamfer-L1 of the first shapes of a set, for clean and for corrupted input.

    As defined by Mescheder et al. (`arXiv:1812.03828 <https://arxiv.org/abs/1812.03828>`_): the mean of the
    distances from samples of the mesh to the shape's points and back, in tenths of the longest side. Shapes
    that get no surface are left out.

    Args:
        network: the network, in evaluation mode; its calibration is used.
        validation: shapes.
        count: number of shapes.
        device: of the network.

    Returns:
        ``"clean"`` and ``"corrupted"``, and ``"missing"``, the share of shapes without a surface.
    """
    calibration = network.calibration
    extraction = ExtractionOptions(box=calibration.box, threshold=calibration.threshold)
    result, missing = {}, 0
    for name in ("clean", "corrupted"):
        given, whole = validation.surfaces(count, name == "corrupted")
        distances = []
        for part in torch.arange(len(given)).split(16):
            field = network.field(network.encode(list(given[part].to(device))))
            for index, mesh in zip(
                part, extract_meshes(field, len(part), extraction, device=device), strict=True
            ):
                if mesh.is_empty:
                    missing += 1
                    continue
                samples = resample([mesh], whole.shape[1], method="uniform", inset=calibration.offset).points
                both = chamfer_distance(samples, whole[index][None], squared=False)
                distances.append(float(both) / 2 * 10)
        result[name] = sum(distances) / max(len(distances), 1)
    return result | {"missing": missing / (2 * max(len(given), 1))}
