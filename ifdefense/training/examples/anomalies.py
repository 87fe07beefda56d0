"""Training examples of the anomaly network: clouds with points that do not belong to their shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ifdefense.corruptions.combined import CombinedOptions, draw_corrupted
from ifdefense.corruptions.planted import KINDS, plant
from ifdefense.devices import device_of_weights
from ifdefense.geometry.frame import Frame
from ifdefense.implicit.anomaly import AnomalyNetwork
from ifdefense.stages.outliers import statistical_outlier_removal
from ifdefense.training.data.solid_sources import to_unit_cube

MIX = {"modelnet40": 0.4, "meshes": 0.34, "furniture": 0.13, "procedural": 0.13}
"""Shares of the sources."""

SHARES = {"planted": 0.36, "scattered": 0.22, "displaced": 0.06, "corrupted": 0.09, "clean": 0.27}
"""Shares of the kinds of clouds."""

POINTS = 1024

OFF = 0.03
"""Corrupted points farther than this from the surface are anomalous, unit cube."""

NEAR = 0.015
"""Anomalous points nearer than this are not learned from: the network thickens the surface as much."""

KEPT = 400
"""Points per cloud that are learned from, drawn at random: the others tell little more."""

Floats = NDArray[np.float32]


class Surfaces(Protocol):
    """Shapes as dense samples, such as `ifdefense.training.data.surfaces.DenseSurfaces`."""

    @property
    def held(self) -> NDArray[np.bool_]:
        """``(S,)``, shapes held out for validation."""
        ...

    def surface(self, index: int) -> tuple[Floats, ...]:
        """Samples ``(D, 3)`` of a shape in the unit cube, and what else is known of them."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class WholeClouds:
    """Clouds as they are, for what needs no surface between their points.

    Attributes:
        points: ``(S, D, 3)``, any frame.
        held: ``(S,)`` bool.
    """

    points: Floats
    held: NDArray[np.bool_]

    def surface(self, index: int) -> tuple[Floats]:
        """The points ``(D, 3)`` of a cloud in the unit cube."""
        return (to_unit_cube(self.points[index]),)


def draw_example(dense: Floats, rng: np.random.Generator) -> tuple[Floats, NDArray[np.int64]]:
    """A cloud with labels of its points.

    By `SHARES` it has one or two planted anomalies of 3% to 16% of the points, scattered groups, displaced
    points, or another corruption, or is clean. Axes are exchanged and mirrored in half of them.

    Args:
        dense: ``(D, 3)`` samples of a surface, unit-cube frame.
        rng: source of randomness.

    Returns:
        ``(N, 3)`` points and ``(N,)`` labels: 1 anomalous, 0 not, -1 neither.
    """
    from scipy.spatial import cKDTree

    if rng.random() < 0.5:
        dense = np.ascontiguousarray(dense[:, rng.permutation(3)] * rng.choice([-1, 1], 3).astype(np.float32))
    dense = rng.permutation(dense)
    cloud = dense[:POINTS]
    kind = str(rng.choice(list(SHARES), p=list(SHARES.values())))
    if kind == "planted":
        added, number, share = [cloud], 1 + int(rng.random() < 0.35), rng.uniform(0.03, 0.16)
        for _ in range(number):
            count = max(8, int(share * POINTS / number))
            planted = plant(dense, str(rng.choice(KINDS)), rng.uniform(0.04, 0.22), count, rng)
            added += [] if planted is None else [planted]
        cloud = np.concatenate(added)
    elif kind == "scattered":
        cloud = np.concatenate([cloud, scattered(dense, rng)])
    elif kind == "displaced":
        moved = rng.random(POINTS) < rng.uniform(0.02, 0.4)
        move = rng.normal(size=(POINTS, 3)) + rng.random() * rng.normal(size=3)
        move *= rng.uniform(0.03, 0.2, (POINTS, 1)) / np.linalg.norm(move, axis=1, keepdims=True)
        cloud = cloud + moved[:, None] * move.astype(np.float32)
    elif kind == "corrupted":
        cloud = draw_corrupted(dense, POINTS, CombinedOptions(clean=0), rng)
    distance = np.asarray(cKDTree(dense).query(cloud)[0])
    labels = np.zeros(len(cloud), np.int64)
    if kind == "planted":
        labels[POINTS:] = np.where(distance[POINTS:] < NEAR, -1, 1)
    elif kind == "scattered":
        labels[POINTS:] = np.where(distance[POINTS:] > OFF, 1, -1)
    elif kind != "clean":
        labels[distance > OFF] = 1
    order = rng.permutation(len(cloud))
    return cloud[order].astype(np.float32), labels[order]


def scattered(dense: Floats, rng: np.random.Generator) -> Floats:
    """One to four groups of 16 to 80 points near a surface: Gaussian clouds, or small copies of the shape."""
    groups = []
    for _ in range(rng.integers(1, 5)):
        count = int(rng.integers(16, 81))
        centre = dense[rng.integers(len(dense))] + rng.normal(0, rng.uniform(0, 0.15), 3)
        if rng.random() < 0.5:
            shape = rng.normal(size=(count, 3)) * rng.uniform(0.01, 0.1) * rng.uniform(0.3, 1.5, 3)
        else:
            turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
            shape = dense[rng.integers(0, len(dense), count)] @ turn * rng.uniform(0.1, 0.5)
        groups.append(centre + shape)
    return np.concatenate(groups).astype(np.float32)


@torch.no_grad()
def examples(
    network: AnomalyNetwork, sources: Mapping[str, Surfaces], count: int, seed: int, held: bool
) -> tuple[Tensor, Tensor]:
    """Inputs of the head ``(M, C)`` float16 and labels ``(M,)`` of points of ``count`` clouds, on the CPU.

    Args:
        network: of which the head is trained; it computes on its device.
        sources: names as in `MIX`.
        count: number of clouds, each as a purifier gives it to the network: after SOR, in the unit cube.
        seed: of everything.
        held: whether to take held-out surfaces or the others.
    """
    device = device_of_weights(network)
    names = list(sources)
    share = np.array([MIX[name] for name in names])
    rows = {name: np.flatnonzero(sources[name].held == held) for name in names}
    inputs, labels = [], []
    for index in tqdm(range(count), desc="held out" if held else "examples", mininterval=5):
        rng = np.random.default_rng([seed, int(held), index])
        name = str(rng.choice(names, p=share / share.sum()))
        cloud, label = draw_example(sources[name].surface(int(rng.choice(rows[name])))[0], rng)
        points = torch.from_numpy(cloud)
        kept = statistical_outlier_removal(points[None])[0]
        points, known = points[kept], torch.from_numpy(label)[kept]
        cube = Frame.of(points).to_cube(points).to(device)
        # The encoded points are a part of the cloud in another order.
        encoded, values = network.features(cube)
        match = torch.cdist(encoded.source, cube).argmin(1).cpu()
        use = torch.from_numpy(rng.permutation(np.flatnonzero(known[match] >= 0))[:KEPT])
        inputs.append(values[use.to(device)].half().cpu())
        labels.append(known[match][use])
    return torch.cat(inputs), torch.cat(labels)
