"""Corrupted clouds from dense samples of a surface, with one to three kinds of corruption each.

`ifdefense.corruptions.simulated` draws every corruption independently. Here a cloud has few kinds, noise has
the bounded per-coordinate form of gradient attacks, and other samples of the surface replace removed points.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

KINDS = ("gauss", "box", "far", "smooth", "cluster", "outliers", "drop")
"""Kinds of corruption: fields of `CombinedOptions` that hold their weights."""

CANDIDATES = 4096
"""Number of consecutive dense samples from which a cloud is taken."""


@dataclasses.dataclass(frozen=True)
class CombinedOptions:
    """Frequencies and strengths of the corruptions; lengths in the unit cube.

    Attributes:
        clean: probability of no corruption but Gaussian noise of at most ``jitter``.
        jitter: largest standard deviation of the noise of uncorrupted clouds.
        second: probability of a second kind.
        third: probability of a third kind if there is a second.
        gauss: weight of Gaussian noise on every point.
        sigma: its largest standard deviation.
        box: weight of noise bounded per coordinate: uniform, signs only, or alike for neighbours.
        box_side: its largest bound.
        far: weight of displacing a part of the points, up to 0.15.
        smooth: weight of low-frequency deformations, up to 0.02 each.
        cluster: weight of added clusters and small objects.
        outliers: weight of outliers: uniform in the cube, or about the cloud.
        drop: weight of removed regions: balls, ends of limbs, or a half space.
        uneven: probability of a density that decays from a random point, independent of other kinds.

    Raises:
        ValueError: if a probability is outside [0, 1], another number is negative, or all weights are 0.

    Examples:
        >>> kinds = CombinedOptions(clean=0.5).draw_kinds(np.random.default_rng(0))
        >>> type(kinds)
        <class 'set'>
    """

    clean: float = 0.22
    jitter: float = 0.003
    second: float = 0.4
    third: float = 0.25
    gauss: float = 0.12
    sigma: float = 0.02
    box: float = 0.32
    box_side: float = 0.032
    far: float = 0.1
    smooth: float = 0.06
    cluster: float = 0.08
    outliers: float = 0.08
    drop: float = 0.24
    uneven: float = 0.2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            highest = 1 if name in ("clean", "second", "third", "uneven") else math.inf
            if not 0 <= value <= highest or value == math.inf:
                raise ValueError(f"{name} is {value}, outside {'[0, 1]' if highest == 1 else '[0, inf)'}")
        if not any(getattr(self, name) for name in KINDS):
            raise ValueError(f"the weights {', '.join(KINDS)} are all 0")

    def draw_kinds(self, rng: np.random.Generator) -> set[str]:
        """One to three kinds of corruption by their weights."""
        share = np.array([getattr(self, name) for name in KINDS])
        number = 1 + int(rng.random() < self.second) * (1 + int(rng.random() < self.third))
        number = min(number, int((share > 0).sum()))
        return set(rng.choice(KINDS, number, replace=False, p=share / share.sum()).tolist())


def draw_corrupted(dense: Floats, count: int, options: CombinedOptions, rng: np.random.Generator) -> Floats:
    """Draws a corrupted cloud.

    Args:
        dense: ``(D, 3)`` samples of a surface in random order, unit-cube frame.
        count: points of the cloud; added points replace some; if more than ``count - 256`` are added, the
            cloud is larger.
        options: frequencies and strengths.
        rng: source of randomness.

    Returns:
        ``(N, 3)`` points in random order, approximately in the unit cube.

    Examples:
        >>> dense = points[0].repeat(8, 1).numpy()
        >>> draw_corrupted(dense, 48, CombinedOptions(), np.random.default_rng(0)).shape
        (48, 3)
    """
    start = rng.integers(max(len(dense) - CANDIDATES, 0) + 1)
    points = dense[start : start + CANDIDATES]
    if rng.random() < options.clean:
        points = points[:count]
        return points + rng.normal(0, options.jitter * rng.random(), points.shape).astype(np.float32)
    kinds = options.draw_kinds(rng)
    keep = _kept_regions(points, rng) if "drop" in kinds else np.ones(len(points), bool)
    if rng.random() < options.uneven:
        distance = np.linalg.norm(points - points[rng.integers(len(points))], axis=1)
        keep &= rng.random(len(points)) < np.exp(-rng.uniform(0, 4) * distance)
    left = np.flatnonzero(keep)
    if len(left) < 64:
        left = np.arange(len(points))
    points = points[left[:count]] if len(left) >= count else points[rng.choice(left, count)]
    points = points + _moves(points, kinds, options, rng).astype(np.float32)
    added = _added(points, kinds, rng)
    if len(added):
        points = np.concatenate([added, points])[: max(count, len(added) + 256)]
    return rng.permutation(points)


def _kept_regions(points: Floats, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Mask ``(N,)`` without balls, ends of limbs or a half space: 5% to 30% of the points."""
    share, kind = rng.uniform(0.05, 0.3), rng.random()
    if kind < 0.35:
        keep, number = np.ones(len(points), bool), int(rng.integers(1, 5))
        for _ in range(number):
            distance = ((points - points[rng.integers(len(points))]) ** 2).sum(1)
            keep &= distance > np.quantile(distance[:1024], share / number)
        return keep
    if kind < 0.75:  # limbs: far from the centre, in a few directions
        offset = points - np.median(points[:1024], 0)
        towards = _unit(offset) @ _unit(rng.normal(size=(rng.integers(1, 5), 3))).T
        score = np.linalg.norm(offset, axis=1) * np.exp(4 * rng.random() * towards.max(1))
        score *= np.exp(rng.normal(0, 0.3 * rng.random(), len(points)))
    else:
        score = points @ rng.normal(size=3)
    kept: NDArray[np.bool_] = score < np.quantile(score[:1024], 1 - share)
    return kept


def _moves(
    points: Floats, kinds: set[str], options: CombinedOptions, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Displacements ``(N, 3)``."""
    shape = points.shape
    move = np.zeros(shape)
    if "gauss" in kinds:
        move += rng.normal(0, options.sigma * rng.random(), shape)
    if "box" in kinds:
        move += _box_noise(points, options.box_side, rng)
    if "far" in kinds:
        chosen = rng.random(len(points)) < rng.uniform(0, 0.4)
        length = 0.15 * rng.random() * rng.random(len(points)) ** 2 * chosen
        move += length[:, None] * _unit(rng.normal(size=shape) + 2 * rng.random() * rng.normal(size=3))
    if "smooth" in kinds:
        for _ in range(rng.integers(1, 4)):
            wave = np.sin(points @ rng.normal(0, 6, 3) + 6 * rng.random())
            move += rng.uniform(0, 0.02) * wave[:, None] * _unit(rng.normal(size=3))
    return move


def _box_noise(points: Floats, side: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Noise of at most ``side`` per coordinate: uniform, mostly signs, or alike for neighbours."""
    bound = rng.uniform(min(0.004, side), side)
    drift = rng.normal(0, 1, points.shape) * 2 * rng.random()
    drifting = rng.random(points.shape) < (rng.random() if rng.random() < 0.6 else 1.0)
    if rng.random() < 0.4:
        drift = 3 * np.sin(points @ rng.normal(0, 12, (3, 3)) + 6 * rng.random(3))
    noise: NDArray[np.float64] = bound * np.clip(rng.uniform(-1, 1, points.shape) + drifting * drift, -1, 1)
    return noise


def _added(points: Floats, kinds: set[str], rng: np.random.Generator) -> Floats:
    """Clusters, small copies of the cloud and outliers, ``(A, 3)``."""
    count = len(points)
    added = [np.zeros((0, 3))]
    if "cluster" in kinds:
        number, total = int(rng.integers(1, 5)), int(rng.integers(10, 200))
        for _ in range(number):
            size = max(1, total // number)
            centre = points[rng.integers(count)] + rng.normal(0, 0.1 * rng.random(), 3)
            shape = _unit(rng.normal(size=(size, 3))) * rng.random((size, 1)) ** (1 / 3)
            if rng.random() < 0.4:
                shape = 2.0 * points[rng.integers(0, count, size)].astype(np.float64)
            added.append(centre + rng.uniform(0.005, 0.08) * shape)
    if "outliers" in kinds:
        size = int(rng.integers(1, 100))
        if rng.random() < 0.5:
            added.append(rng.uniform(-0.55, 0.55, (size, 3)))
        else:
            spread = rng.uniform(0.03, 0.15)
            added.append(points[rng.integers(0, count, size)] + rng.normal(0, spread, (size, 3)))
    return np.concatenate(added).astype(np.float32)


def _unit(vectors: NDArray[np.floating]) -> NDArray[np.float64]:
    unit: NDArray[np.float64] = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)
    return unit
