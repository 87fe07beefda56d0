"""Training examples of generative, voxel and image networks: procedural solids with what the networks see.

The label of a query is inside the thickened solid, as for ``train onet``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ifdefense.provenance import digest
from ifdefense.reconstruction.conditions import VOXEL_BOX, VOXELS, voxel_centres
from ifdefense.reconstruction.rendering import random_cameras, render
from ifdefense.shapes.procedural import CLASSES, make_shape
from ifdefense.training.data.solid_sources import cached, from_procedural
from ifdefense.training.data.solids import BOX, OFFSET, STEP, OccupancySet, interpolate
from ifdefense.training.fit import Batch
from ifdefense.training.runs import check_ranges

HELD_PER_CLASS = 4
"""Validation solids of each class."""
VIEWS = 4
"""Images of each solid."""


@dataclasses.dataclass(frozen=True)
class QueryOptions:
    """How examples are drawn. Lengths are in the unit cube.

    Attributes:
        batch_size: solids per step.
        queries: queries per solid; half of them uniform in the grid's box, half near the surface.
        near_sigma: standard deviation of the near-surface queries.
        offset: thickening of the solid in the labels.

    Raises:
        ValueError: if a number is out of range.
    """

    batch_size: int = 16
    queries: int = 512
    near_sigma: float = 0.04
    offset: float = OFFSET

    def __post_init__(self) -> None:
        infinity = float("inf")
        check_ranges(
            self, batch_size=(1, infinity), queries=(2, infinity), near_sigma=(0, 1), offset=(0, 0.05)
        )


class SolidSampler:
    """Draws solids and labelled queries in the solids' frame; a subclass adds what its network is given.

    Args:
        data: the solids.
        options: how examples are drawn.
    """

    mirrored = (False, False)
    """Whether examples are mirrored at random along x, and along y."""

    def __init__(self, data: OccupancySet, options: QueryOptions) -> None:
        self.points = torch.from_numpy(np.array(data.points))
        self.grids = torch.from_numpy(np.array(data.grids))
        self.options = options
        self.digest = digest(data.points)

    def given(self, index: Tensor, sign: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """What the network is given of solids ``(B,)``, mirrored by the signs ``(B, 3)`` of the axes."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What determines the examples, for the settings of a run."""
        return dataclasses.asdict(self.options) | {"shapes": self.digest}

    def draw(self, generator: torch.Generator) -> Batch:
        """What the network is given, queries ``(B, Q, 3)`` and bool labels ``(B, Q)`` of a training step."""
        batch = self.options.batch_size
        index = torch.randint(len(self.points), (batch,), generator=generator)
        sign = torch.ones(batch, 3)
        for axis, mirrored in enumerate(self.mirrored):
            if mirrored:
                sign[:, axis] = torch.randint(0, 2, (batch,), generator=generator) * 2.0 - 1
        queries, labels = self.labelled(index, self.options.queries, sign, generator)
        return (*self.given(index, sign, generator), queries, labels)

    def labelled(
        self, index: Tensor, count: int, sign: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Queries, half of them near the surface, and their labels."""
        near = torch.randint(self.points.shape[1], (len(index), count // 2), generator=generator)
        near_points = self.points[index[:, None], near].float()
        near_points = near_points + self.options.near_sigma * torch.randn(
            near_points.shape, generator=generator
        )
        uniform = (torch.rand(len(index), count - count // 2, 3, generator=generator) - 0.5) * BOX
        queries = torch.cat([near_points, uniform], 1)
        return queries * sign[:, None], self.inside(index, queries)

    def inside(self, index: Tensor, queries: Tensor) -> Tensor:
        """Labels ``(B, Q)`` of queries that are not mirrored; a grid holds its offset minus the distance."""
        return interpolate(self.grids, index, queries) * STEP > OFFSET - self.options.offset

    def validation(self) -> dict[str, list[Batch]]:
        """Batches of all solids with 2,048 uniform queries, not mirrored, the same at every call."""
        generator = torch.Generator().manual_seed(1)
        batches: list[Batch] = []
        for index in torch.arange(len(self.points)).split(16):
            queries = (torch.rand(len(index), 2048, 3, generator=generator) - 0.5) * BOX
            labels = self.inside(index, queries)
            batches.append((*self.given(index, torch.ones(len(index), 3), generator), queries, labels))
        return {"iou": batches}


class PairSampler(SolidSampler):
    """Gives labelled points, for the latent encoder."""

    def given(self, index: Tensor, sign: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Points ``(B, Q, 3)`` and their occupancies ``(B, Q)``, drawn as the queries are."""
        points, labels = self.labelled(index, self.options.queries, sign, generator)
        return points, labels.float()


class VoxelSampler(SolidSampler):
    """Gives voxels ``(B, 32, 32, 32)``."""

    mirrored = (True, True)

    def __init__(self, data: OccupancySet, options: QueryOptions) -> None:
        super().__init__(data, options)
        centres = voxel_centres().view(1, -1, 3)
        # The rule of voxelise; a grid holds the offset minus the distance.
        least = (OFFSET - VOXEL_BOX / VOXELS / 2) / STEP
        rows = [
            interpolate(self.grids, index, centres.expand(len(index), -1, -1)) >= least
            for index in torch.arange(len(self.grids)).split(16)
        ]
        self.voxels = torch.cat(rows).view(-1, VOXELS, VOXELS, VOXELS)

    def given(self, index: Tensor, sign: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Voxels of the solids."""
        voxels = self.voxels[index]
        for axis in (0, 1):
            turned = (sign[:, axis] < 0)[:, None, None, None]
            voxels = torch.where(turned, voxels.flip(axis + 1), voxels)
        return (voxels.float(),)


class ImageSampler(SolidSampler):
    """Gives images ``(B, H, W, 3)`` from random sides.

    Args:
        data: the solids.
        options: how examples are drawn.
        images: ``(S, V, H, W, 3)`` uint8 of the same solids.
    """

    # Mirrored along y, a solid gives no new image, as the camera may stand on either side.
    mirrored = (True, False)

    def __init__(self, data: OccupancySet, options: QueryOptions, images: NDArray[np.uint8]) -> None:
        super().__init__(data, options)
        self.images = torch.from_numpy(np.array(images))

    def describe(self) -> dict[str, Any]:
        """What determines the examples, for the settings of a run."""
        return super().describe() | {"images": list(self.images.shape)}

    def given(self, index: Tensor, sign: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """One image of each solid."""
        view = torch.randint(self.images.shape[1], (len(index),), generator=generator)
        images = self.images[index, view].float() / 255
        turned = (sign[:, 0] < 0)[:, None, None, None]
        return (torch.where(turned, images.flip(2, 3), images),)


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Images of solids.

    Attributes:
        values: ``(S, V, H, W, 3)`` uint8.
    """

    values: NDArray[np.uint8]

    def save(self, folder: Path) -> None:
        """Writes them into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "images.npy", self.values)

    @classmethod
    def load(cls, folder: Path) -> Images:
        """Maps into memory what `save` wrote."""
        return cls(np.load(folder / "images.npy", mmap_mode="r"))


def render_procedural(per_class: int, seed: int, views: int = VIEWS, size: int = 64) -> Images:
    """Images of the solids of `from_procedural`, in the same order."""
    values = []
    for number in tqdm(range(len(CLASSES) * per_class), desc="images", mininterval=5):
        label, index = divmod(number, per_class)
        shape = make_shape(CLASSES[label], np.random.default_rng([seed, label, index]))
        cameras = random_cameras(views, np.random.default_rng([seed, label, index, 1]))
        seen = [render(shape, camera, size).image for camera in cameras]
        values.append((np.stack(seen) * 255).round().astype(np.uint8))
    return Images(np.stack(values))


def solids(cache: Path, per_class: int, seed: int) -> tuple[OccupancySet, OccupancySet]:
    """Solids to train on, and to validate on, in the caches of ``train onet``."""
    train, held = seed + 1, seed + 2
    return (
        cached(
            cache / "procedural",
            lambda: from_procedural(per_class, train),
            {"per_class": per_class, "seed": train},
        ),
        cached(
            cache / "procedural-validation", lambda: from_procedural(HELD_PER_CLASS, held), {"seed": held}
        ),
    )
