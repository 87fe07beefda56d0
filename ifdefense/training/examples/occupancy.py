"""Training examples of occupancy networks: augmented clouds as an attacker leaves them, labelled queries."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ifdefense.corruptions.simulated import simulate_attack
from ifdefense.geometry.frame import bounding_cubes
from ifdefense.provenance import digest
from ifdefense.training.data.solids import OccupancySet, interpolate
from ifdefense.training.fit import Batch
from ifdefense.training.runs import check_ranges


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How examples are drawn. Lengths are in the unit-cube frame.

    Attributes:
        batch_size: clouds per step.
        points: points per cloud that the encoder sees.
        queries: queries per cloud; half of them uniform in the box, half near the surface.
        near_sigma: standard deviation of the near-surface queries.
        box: side of the cube of the uniform queries.
        clean: share of the clouds that are not corrupted, but for noise of ``jitter``.
        jitter: standard deviation of the noise on uncorrupted clouds.
        max_scale: each axis is scaled by a factor between the inverse of this and this.
        rotated: share of the clouds rotated about the up axis by a random multiple of 90°.

    Raises:
        ValueError: if a number is out of range.
    """

    batch_size: int = 32
    points: int = 300
    queries: int = 256
    near_sigma: float = 0.04
    box: float = 1.2
    clean: float = 0.4
    jitter: float = 0.005
    max_scale: float = 1.2
    rotated: float = 0.1

    def __post_init__(self) -> None:
        check_ranges(
            self,
            batch_size=(1, math.inf),
            points=(1, math.inf),
            queries=(2, math.inf),
            near_sigma=(0, 1),
            box=(1, 10),
            clean=(0, 1),
            jitter=(0, 1),
            max_scale=(1, 10),
            rotated=(0, 1),
        )


class OccupancySampler:
    """Draws training batches from an occupancy set.

    The encoder sees a cloud in the frame of what it is given, as at inference: outliers and missing parts
    move the bounding box, and the queries move with it.

    Args:
        data: shapes to draw from.
        options: settings.
        mix: weight of each source of the set; ``None`` draws every shape equally often.

    Raises:
        ValueError: if ``mix`` names an unknown source.
    """

    def __init__(
        self, data: OccupancySet, options: SamplingOptions, mix: Mapping[str, float] | None = None
    ) -> None:
        self.points = torch.from_numpy(np.array(data.points))
        self.grids = torch.from_numpy(np.array(data.grids))
        self.options = options
        self.mix = dict(mix) if mix is not None else None
        self.digest = digest(data.points, data.source)
        weight = np.ones(len(data))
        if mix is not None:
            unknown = set(mix) - set(data.sources)
            if unknown:
                raise ValueError(f"unknown sources {sorted(unknown)}, the set has {list(data.sources)}")
            for number, name in enumerate(data.sources):
                members = np.asarray(data.source) == number
                weight[members] = mix.get(name, 0.0) / max(members.sum(), 1)
        self.weight = torch.from_numpy(weight / weight.sum())

    def describe(self) -> dict[str, Any]:
        """What determines the examples, for the settings of a run."""
        return dataclasses.asdict(self.options) | {"mix": self.mix, "shapes": self.digest}

    def draw(self, generator: torch.Generator) -> Batch:
        """Clouds ``(B, N, 3)``, queries ``(B, Q, 3)`` and bool labels ``(B, Q)`` of one training step."""
        options = self.options
        batch = options.batch_size
        index = torch.multinomial(self.weight, batch, replacement=True, generator=generator)
        scale = torch.empty(batch, 1, 3).uniform_(
            -math.log(options.max_scale), math.log(options.max_scale), generator=generator
        )
        scale = scale.exp()
        sign = torch.randint(0, 2, (batch, 1, 3), generator=generator).mul_(2).sub_(1)
        sign[..., 2] = 1  # up stays up
        quarter = torch.randint(1, 4, (batch,), generator=generator)
        rotated = torch.rand(batch, generator=generator) < options.rotated
        points = self.points[index].float()
        scale = scale / (scale * points.abs().amax(1, keepdim=True)).amax(-1, keepdim=True) / 2
        rotation = _quarter_rotations(torch.where(rotated, quarter, 0))
        whole = (points * scale * sign) @ rotation
        clean = torch.rand(batch, generator=generator) < options.clean
        given = self._given(whole, clean, generator)
        centre, extent = bounding_cubes(given)
        near = _subset(whole, options.queries // 2, generator)
        near = near + options.near_sigma * torch.randn(near.shape, generator=generator)
        uniform = torch.rand(batch, options.queries - near.shape[1], 3, generator=generator) - 0.5
        queries = torch.cat([near, uniform * options.box * extent + centre], dim=1)
        labels = interpolate(self.grids, index, queries @ rotation.transpose(1, 2) / (scale * sign)) > 0
        return (given - centre) / extent, (queries - centre) / extent, labels

    def _given(self, whole: Tensor, clean: Tensor, generator: torch.Generator) -> Tensor:
        """What the encoder sees of ``(B, N, 3)`` clouds: with jitter where ``clean``, else corrupted."""
        jittered = _subset(whole, self.options.points, generator)
        jittered = jittered + self.options.jitter * torch.randn(jittered.shape, generator=generator)
        corrupted = simulate_attack(whole, self.options.points, generator)
        return torch.where(clean[:, None, None], jittered, corrupted)

    def _first(self, count: int, corrupted: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Points of the first ``count`` shapes, not augmented, and what the encoder sees of them."""
        whole = self.points[:count].float()
        return whole, self._given(whole, torch.full((len(whole),), not corrupted), generator)

    def surfaces(self, count: int, corrupted: bool) -> tuple[Tensor, Tensor]:
        """What the encoder sees of the first ``count`` shapes, and all their points in the same frame."""
        whole, given = self._first(count, corrupted, torch.Generator().manual_seed(1))
        centre, extent = bounding_cubes(given)
        return (given - centre) / extent, (whole - centre) / extent

    def validation(self, count: int) -> dict[str, list[Batch]]:
        """Batches of the first ``count`` shapes, not augmented, the same at every call.

        Returns:
            ``"clean"`` and ``"corrupted"``, each with 2,048 uniform queries per cloud.
        """
        return {name: self._batches(count, name == "corrupted") for name in ("clean", "corrupted")}

    def _batches(self, count: int, corrupted: bool) -> list[Batch]:
        generator = torch.Generator().manual_seed(1)
        _, given = self._first(count, corrupted, generator)
        index = torch.arange(len(given))
        centre, extent = bounding_cubes(given)
        queries = (torch.rand(len(index), 2048, 3, generator=generator) - 0.5) * self.options.box
        labels = interpolate(self.grids, index, queries * extent + centre) > 0
        clouds = (given - centre) / extent
        return list(zip(clouds.split(16), queries.split(16), labels.split(16), strict=True))


def _subset(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """A random subset of ``count`` points of each cloud."""
    order = torch.rand(points.shape[:2], generator=generator).argsort(1)[:, :count]
    return points.gather(1, order[..., None].expand(-1, -1, 3))


def _quarter_rotations(number: Tensor) -> Tensor:
    """Rotations ``(B, 3, 3)`` about the up axis, for row vectors, by multiples of 90°."""
    angle = number * (math.pi / 2)
    cos, sin = angle.cos().round(), angle.sin().round()
    matrix = torch.zeros(len(number), 3, 3)
    matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 1, 0], matrix[:, 1, 1] = cos, sin, -sin, cos
    matrix[:, 2, 2] = 1.0
    return matrix
