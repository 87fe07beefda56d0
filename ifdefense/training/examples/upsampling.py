"""Training examples of PU-Net: noisy points of a surface, and even samples of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ifdefense.geometry.points import gather, spread_sampling
from ifdefense.training.data.surfaces import DenseSurfaces
from ifdefense.training.examples.thickened_surfaces import random_rotation
from ifdefense.training.runs import check_ranges


@dataclasses.dataclass(frozen=True)
class UpsamplingOptions:
    """How examples are drawn. Lengths are in the unit-sphere frame.

    Attributes:
        batch_size: clouds per step.
        points: points per cloud, of which PU-Net makes four times as many.
        jitter: largest standard deviation of the noise on the points, drawn per cloud.
        max_scale: each axis is scaled by a factor between the inverse of this and this.

    Raises:
        ValueError: if a number is out of range.
    """

    batch_size: int = 4
    points: int = 1024
    jitter: float = 0.01
    max_scale: float = 1.3

    def __post_init__(self) -> None:
        check_ranges(self, batch_size=(1, math.inf), points=(16, math.inf), jitter=(0, 1), max_scale=(1, 10))


class Example(NamedTuple):
    """A batch: noisy points ``(B, N, 3)`` and even samples of their surfaces ``(B, 4 N, 3)``."""

    points: Tensor
    target: Tensor


class UpsamplingSampler:
    """Draws examples from dense surfaces.

    Args:
        sources: sets by name.
        options: settings.
        mix: weight of each source; its surfaces are drawn equally often.

    Raises:
        ValueError: if ``mix`` does not name the sources, or a set has too few samples.
    """

    def __init__(
        self, sources: Mapping[str, DenseSurfaces], options: UpsamplingOptions, mix: Mapping[str, float]
    ) -> None:
        if mix.keys() != sources.keys():
            raise ValueError(f"the mix names {sorted(mix)}, the sources are {sorted(sources)}")
        for name, data in sources.items():
            if data.points.shape[1] < 5 * options.points:
                raise ValueError(f"{name} has {data.points.shape[1]} samples per surface, too few")
        self.sources, self.options, self.mix = dict(sources), options, dict(mix)
        self._train = self._rows(held=False)
        self._held = self._rows(held=True)

    def _rows(self, held: bool) -> tuple[list[tuple[str, int]], NDArray[np.float64]]:
        """Surfaces as source and index, and their probabilities."""
        rows: list[tuple[str, int]] = []
        weights = []
        for name, data in self.sources.items():
            members = np.flatnonzero(data.held == held)
            rows += [(name, int(index)) for index in members]
            weights += [self.mix[name] / len(members)] * len(members)
        if not rows:
            raise ValueError(f"no surface is {'held out for validation' if held else 'left for training'}")
        return rows, np.array(weights) / sum(weights)

    def describe(self) -> dict[str, Any]:
        """What determines the examples, for the settings of a run."""
        return {"mix": self.mix, "surfaces": {name: data.digest() for name, data in self.sources.items()}}

    def draw(self, generator: torch.Generator) -> Example:
        """The batch of one training step."""
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        rows, weight = self._train
        limit = math.log(self.options.max_scale)
        surfaces = []
        for index in rng.choice(len(rows), self.options.batch_size, p=weight):
            name, number = rows[index]
            scale = np.exp(rng.uniform(-limit, limit, 3))
            surfaces.append(self.sources[name].surface(number, scale, random_rotation(rng))[0])
        return self._example(surfaces, rng, rng.uniform(0, self.options.jitter, (len(surfaces), 1, 1)))

    def validation(self, count: int) -> list[Example]:
        """Batches of at most ``count`` held-out surfaces, neither augmented nor noisy; always the same."""
        rows, weight = self._held
        rng = np.random.default_rng(1)
        chosen = rng.choice(len(rows), min(count, len(rows)), replace=False, p=weight)
        surfaces = [self.sources[rows[index][0]].surface(rows[index][1])[0] for index in chosen]
        size = self.options.batch_size
        return [
            self._example(surfaces[start : start + size], rng, np.zeros((1, 1, 1)))
            for start in range(0, len(surfaces), size)
        ]

    def _example(
        self, surfaces: list[NDArray[np.float32]], rng: np.random.Generator, sigma: NDArray[np.float64]
    ) -> Example:
        """Random samples as points, and even ones of the others as target, in the points' unit sphere."""
        count = self.options.points
        dense = np.stack([rng.permutation(surface) for surface in surfaces])
        points = dense[:, :count] + sigma * rng.normal(size=(len(dense), count, 3))
        centre = points.mean(1, keepdims=True)
        radius = np.linalg.norm(points - centre, axis=2).max(1)[:, None, None]
        given, rest = (
            torch.from_numpy(((part - centre) / radius).astype(np.float32))
            for part in (points, dense[:, count:])
        )
        return Example(given, gather(rest, spread_sampling(rest, 4 * count)))
