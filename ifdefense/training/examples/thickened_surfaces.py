"""Training examples of local occupancy networks: corrupted clouds, and the thickened surface at queries.

The label of a query falls with its distance from the surface, from 1 to 0 as a logistic around the offset, so
that the logit is linear in the distance. No inside is needed: sheets are thickened like solids.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ifdefense.corruptions.combined import CombinedOptions, draw_corrupted
from ifdefense.stages.outliers import statistical_outlier_removal
from ifdefense.training.data.attacked_clouds import AttackedClouds
from ifdefense.training.data.surfaces import SOFTNESS, DenseSurfaces
from ifdefense.training.fit import Batch
from ifdefense.training.runs import check_ranges

Floats = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class ThickenedOptions:
    """How examples are drawn. Lengths are in the unit-cube frame.

    Attributes:
        batch_size: clouds per step.
        counts: points per cloud, one number per batch, each with equal probability.
        queries: queries per cloud.
        offset: thickening of the surface, where the label is 0.5.
        softness: width of the logistic.
        box: side of the cube of the uniform queries.
        uniform: share of the queries drawn in the cube, or in the surface's bounding box.
        near_surface: share of the queries about samples of the surface.
        near_points: share of the queries about points of the cloud. The other queries are about samples of
            the surface far from the cloud, or uniform where there are none.
        filtered: share of the clouds from which statistical outliers are removed.
        stretched: share of the surfaces whose axes are scaled.
        max_scale: largest such factor, and the inverse of the smallest.

    Raises:
        ValueError: if a number is out of range.
    """

    batch_size: int = 16
    counts: tuple[int, ...] = (384, 512, 640, 640, 768, 768, 864, 864, 928, 928, 976, 976)
    queries: int = 512
    offset: float = 0.015
    softness: float = SOFTNESS
    box: float = 1.2
    uniform: float = 0.36
    near_surface: float = 0.27
    near_points: float = 0.29
    filtered: float = 0.9
    stretched: float = 0.6
    max_scale: float = 1.35

    def __post_init__(self) -> None:
        check_ranges(
            self,
            batch_size=(1, math.inf),
            queries=(16, math.inf),
            offset=(0, 1),
            softness=(1e-6, 1),
            box=(1, 10),
            uniform=(0, 1),
            near_surface=(0, 1),
            near_points=(0, 1),
            filtered=(0, 1),
            stretched=(0, 1),
            max_scale=(1, 10),
        )
        if not self.counts or min(self.counts) < 16:
            raise ValueError(f"counts must be at least 16 points, got {self.counts}")
        if self.uniform + self.near_surface + self.near_points > 1:
            raise ValueError("uniform, near_surface and near_points must sum to at most 1")


class Surface:
    """A surface known by dense samples.

    Args:
        points: ``(D, 3)``.
        normals: ``(D, 3)`` unit normals.
        slack: samples stand for the tangent plane within this distance.
    """

    def __init__(self, points: Floats, normals: Floats, slack: float) -> None:
        from scipy.spatial import cKDTree

        self.points, self.normals, self.slack = points, normals, slack
        self._tree = cKDTree(points, balanced_tree=False, compact_nodes=False)

    @classmethod
    def of_samples(cls, points: Floats, normals: Floats, rng: np.random.Generator) -> Surface:
        """Slack is the median distance to the third neighbour."""
        surface = cls(points, normals, 0.0)
        some = points[rng.integers(0, len(points), 64)]
        surface.slack = float(np.median(surface._tree.query(some, [min(4, len(points))])[0]))
        return surface

    def distances(self, queries: Floats) -> Floats:
        """Distance of queries ``(Q, 3)``: to the tangent plane of the nearest sample, within the slack."""
        index = self._tree.query(queries)[1]
        offset = queries - self.points[index]
        height = (offset * self.normals[index]).sum(1)
        aside = np.sqrt(np.maximum((offset**2).sum(1) - height**2, 0))
        distance: Floats = np.hypot(height, np.maximum(aside - self.slack, 0)).astype(np.float32)
        return distance


def soft_labels(distances: Floats, offset: float, softness: float) -> Floats:
    """Occupancies by the distance from the surface: a logistic around the offset."""
    logits = np.clip((offset - distances) / softness, -30, 30)
    labels: Floats = (1 / (1 + np.exp(-logits))).astype(np.float32)
    return labels


def random_rotation(rng: np.random.Generator) -> NDArray[np.float64]:
    """An orthogonal matrix: upright, about the up axis, along the axes with reflections, or any rotation."""
    kind = rng.random()
    if kind < 0.3:
        upright = np.diag([*rng.choice([-1.0, 1.0], 2), 1.0])
        return upright[[1, 0, 2]] if rng.random() < 0.5 else upright
    if kind < 0.45:
        angle = rng.random() * 2 * np.pi
        cos, sin = np.cos(angle), np.sin(angle)
        return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    if kind < 0.75:
        matrix: NDArray[np.float64] = np.eye(3)[rng.permutation(3)] * rng.choice([-1.0, 1.0], 3)
        return matrix
    matrix = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    return matrix


def draw_cloud(
    dense: Floats, count: int, filtered: float, corruption: CombinedOptions, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """A cloud as a network gets it: corrupted, mostly without statistical outliers, in its own unit cube.

    Args:
        dense: ``(D, 3)`` samples of a surface in random order.
        count: points of the cloud.
        filtered: probability that outliers are removed.
        corruption: what happens to the cloud.
        rng: source of randomness.

    Returns:
        ``(count, 3)`` points, and the samples ``(D, 3)`` in the same frame.
    """
    cloud = draw_corrupted(dense, int(count * 1.12) + 8, corruption, rng)
    return as_given(cloud, dense, count, filtered, rng)


def as_given(
    cloud: Floats, dense: Floats, count: int, filtered: float, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """A cloud ``(N, 3)`` in random order as a network gets it; arguments and result as `draw_cloud`."""
    keep = np.ones(len(cloud), bool)
    if rng.random() < filtered:
        keep = statistical_outlier_removal(torch.from_numpy(cloud)[None])[0].numpy()
    # Outliers return only where too few points are left.
    order = np.concatenate([np.flatnonzero(keep), np.flatnonzero(~keep)])
    if len(order) < count:
        order = rng.integers(0, len(cloud), count)
    cloud = cloud[order[:count]]
    low, high = cloud.min(0), cloud.max(0)
    centre, side = (low + high) / 2, np.float32(max(float((high - low).max()), 1e-3))
    return (cloud - centre) / side, (dense - centre) / side


def draw_queries(cloud: Floats, dense: Floats, options: ThickenedOptions, rng: np.random.Generator) -> Floats:
    """Queries ``(Q, 3)`` of a cloud; the first share is uniform.

    Args:
        cloud: ``(N, 3)``.
        dense: ``(D, 3)`` samples of the surface in random order, in the cloud's frame.
        options: number and mix.
        rng: source of randomness.
    """
    from scipy.spatial import cKDTree

    shares = (options.uniform, options.near_surface, options.near_points)
    uniform, surface, points = (int(options.queries * share) for share in shares)
    missing = options.queries - uniform - surface - points
    anywhere = rng.uniform(-options.box / 2, options.box / 2, (uniform, 3))
    anywhere[: uniform // 2] = rng.uniform(*_bounds(dense, 0.06), (uniform // 2, 3))
    # Wide spreads keep most queries far from the points empty, as space is; otherwise the network fills it.
    sigma = rng.choice([0.01, 0.025, 0.06], (surface, 1), p=[0.5, 0.3, 0.2])
    near = dense[rng.integers(0, len(dense), surface)] + sigma * rng.normal(size=(surface, 3))
    sigma = rng.choice([0.02, 0.05, 0.1], (points, 1), p=[0.6, 0.25, 0.15])
    own = cloud[rng.integers(0, len(cloud), points)] + sigma * rng.normal(size=(points, 3))
    candidates = dense[rng.integers(0, len(dense), 4 * missing)]
    gap = np.asarray(cKDTree(cloud).query(candidates)[0])
    first = np.argsort(-gap)[:missing]
    lost = candidates[first] + rng.choice([0.01, 0.03, 0.08], (missing, 1)) * rng.normal(size=(missing, 3))
    seen = gap[first] < 0.05
    lost[seen] = rng.uniform(*_bounds(dense, 0.03), (int(seen.sum()), 3))
    return np.concatenate([anywhere, near, own, lost]).astype(np.float32)


def _bounds(points: Floats, margin: float) -> tuple[Floats, Floats]:
    """Corners of about the bounding box, from some of the points in random order."""
    some = points[:2048]
    return some.min(0) - margin, some.max(0) + margin


class ThickenedSampler:
    """Draws training batches from sets of dense surfaces.

    Args:
        sources: sets by name.
        options: how examples are drawn.
        corruption: what happens to the clouds.
        mix: weight of each source; rare classes of a source are drawn more often, by the square root of their
            size. Equal weights by default.
        attacked: attacked clouds of the sources.
        attacked_share: probability that an example is one of them.

    Raises:
        ValueError: if ``mix`` does not name the sources, or the attacked clouds are not of them.
    """

    def __init__(
        self,
        sources: Mapping[str, DenseSurfaces],
        options: ThickenedOptions | None = None,
        corruption: CombinedOptions | None = None,
        mix: Mapping[str, float] | None = None,
        attacked: AttackedClouds | None = None,
        attacked_share: float = 0.0,
    ) -> None:
        self.sources = dict(sources)
        self.options, self.corruption = options or ThickenedOptions(), corruption or CombinedOptions()
        self.mix = dict(mix) if mix is not None else dict.fromkeys(self.sources, 1.0)
        if self.mix.keys() != self.sources.keys():
            raise ValueError(f"the mix names {sorted(self.mix)}, the sources are {sorted(self.sources)}")
        self._train = self._table(held=False)
        self._held = self._table(held=True)
        if not 0 <= attacked_share <= 1 or (attacked_share > 0) != (attacked is not None):
            raise ValueError(
                f"attacked_share is the share of the attacked clouds, in (0, 1] with and 0 without them, "
                f"got {attacked_share}"
            )
        self.attacked, self.attacked_share = attacked, attacked_share
        if attacked is not None:
            attacked.check(self.sources)
            held = attacked.held(self.sources)
            self._attacked = {False: np.flatnonzero(~held), True: np.flatnonzero(held)}
            if not all(len(rows) for rows in self._attacked.values()):
                raise ValueError("the attacked clouds need surfaces for training and for validation")

    def _table(self, held: bool) -> tuple[list[tuple[str, int]], NDArray[np.float64]]:
        """Surfaces as source and index, and their probabilities."""
        rows: list[tuple[str, int]] = []
        weights = [np.zeros(0)]
        for name, data in self.sources.items():
            members = np.flatnonzero(data.held == held)
            if not len(members):
                continue
            labels = data.labels[members]
            weight = 1 / np.sqrt(np.bincount(labels)[labels])
            rows += [(name, int(index)) for index in members]
            weights.append(self.mix[name] * weight / weight.sum())
        weight = np.concatenate(weights)
        return rows, weight / max(float(weight.sum()), 1e-12)

    def __len__(self) -> int:
        """Number of training surfaces."""
        return len(self._train[0])

    def describe(self) -> dict[str, Any]:
        """What determines the examples, for the settings of a run."""
        return (
            dataclasses.asdict(self.options)
            | {
                "corruption": dataclasses.asdict(self.corruption),
                "mix": self.mix,
                "surfaces": {name: data.digest() for name, data in self.sources.items()},
            }
            | (
                {"attacked": self.attacked.digest(), "attacked_share": self.attacked_share}
                if self.attacked is not None
                else {}
            )
        )

    def draw(self, generator: torch.Generator) -> Batch:
        """Clouds ``(B, N, 3)``, queries ``(B, Q, 3)`` and labels ``(B, Q)`` of one training step."""
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        count = int(rng.choice(self.options.counts))
        rows, weight = self._train
        examples = []
        for index in rng.choice(len(rows), self.options.batch_size, p=weight):
            if self.attacked is not None and rng.random() < self.attacked_share:
                row = int(rng.choice(self._attacked[False]))
                examples.append(self._attacked_example(row, count, random_rotation(rng), rng))
                continue
            name, number = rows[index]
            limit = math.log(self.options.max_scale)
            stretched = rng.random() < self.options.stretched
            scale = np.exp(rng.uniform(-limit, limit, 3)) if stretched else None
            surface = self.sources[name].surface(number, scale, random_rotation(rng))
            examples.append(self._example(*surface, count, self.corruption, rng))
        return _stack(examples)

    def _example(
        self,
        points: Floats,
        normals: Floats,
        count: int,
        corruption: CombinedOptions,
        rng: np.random.Generator,
    ) -> tuple[Floats, Floats, Floats]:
        """A cloud, queries and labels of a surface."""
        cloud, dense = draw_cloud(points, count, self.options.filtered, corruption, rng)
        return self._labelled(cloud, dense, normals, rng)

    def _attacked_example(
        self, row: int, count: int, rotation: NDArray[np.floating] | None, rng: np.random.Generator
    ) -> tuple[Floats, Floats, Floats]:
        """An attacked cloud, turned, with queries and labels of its surface."""
        assert self.attacked is not None
        cloud, points, normals = self.attacked.pair(row, self.sources)
        if rotation is not None:
            turn = rotation.astype(np.float32)
            cloud, points, normals = cloud @ turn, points @ turn, normals @ turn
        cloud, dense = as_given(rng.permutation(cloud), points, count, self.options.filtered, rng)
        return self._labelled(cloud, dense, normals, rng)

    def _labelled(
        self, cloud: Floats, dense: Floats, normals: Floats, rng: np.random.Generator
    ) -> tuple[Floats, Floats, Floats]:
        """A cloud with queries and their labels."""
        queries = draw_queries(cloud, dense, self.options, rng)
        distances = Surface.of_samples(dense, normals, rng).distances(queries)
        return cloud, queries, soft_labels(distances, self.options.offset, self.options.softness)

    def _validation_surfaces(self, count: int) -> list[tuple[Floats, Floats]]:
        """At most ``count`` held-out surfaces as they are, the same at every call."""
        rows, weight = self._held
        if not rows:
            raise ValueError("none of the surfaces is held out for validation")
        chosen = np.random.default_rng(1).choice(len(rows), min(count, len(rows)), replace=False, p=weight)
        return [self.sources[rows[index][0]].surface(rows[index][1]) for index in chosen]

    def validation(self, count: int, points: int = 512) -> dict[str, list[Batch]]:
        """Batches of held-out surfaces, not augmented, the same at every call.

        Args:
            count: surfaces at most.
            points: per cloud.

        Returns:
            ``"clean"`` and ``"corrupted"``, and ``"attacked"`` if there are attacked clouds.
        """
        surfaces = self._validation_surfaces(count)
        result = {}
        size = self.options.batch_size
        for name, share in (("clean", 1.0), ("corrupted", 0.0)):
            rng = np.random.default_rng(2)
            corruption = dataclasses.replace(self.corruption, clean=share)
            examples = [self._example(*surface, points, corruption, rng) for surface in surfaces]
            result[name] = [_stack(examples[start : start + size]) for start in range(0, len(examples), size)]
        if self.attacked is not None:
            rng = np.random.default_rng(2)
            chosen = rng.permutation(self._attacked[True])[:count]
            examples = [self._attacked_example(int(row), points, None, rng) for row in chosen]
            result["attacked"] = [
                _stack(examples[start : start + size]) for start in range(0, len(examples), size)
            ]
        return result

    def surfaces(self, count: int, corrupted: bool, points: int = 1024) -> tuple[Tensor, Tensor]:
        """Clouds of held-out surfaces, and 4,096 samples of each in the same frame."""
        rng = np.random.default_rng(3)
        corruption = dataclasses.replace(self.corruption, clean=float(not corrupted))
        pairs = [
            draw_cloud(dense, points, self.options.filtered, corruption, rng)
            for dense, _ in self._validation_surfaces(count)
        ]
        clouds, whole = zip(*pairs, strict=True)
        return torch.from_numpy(np.stack(clouds)), torch.from_numpy(np.stack(whole)[:, -4096:])


def _stack(examples: list[tuple[Floats, Floats, Floats]]) -> Batch:
    return tuple(torch.from_numpy(np.stack(part)) for part in zip(*examples, strict=True))
