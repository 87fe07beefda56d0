"""Methods at a fraction of their cost, for tests that call every one of them many times."""

from __future__ import annotations

import copy
import dataclasses
import functools

import numpy as np
import torch
from conftest import sample_box
from torch import Tensor, nn

import ifdefense
from ifdefense import Purifier
from ifdefense.purifiers.surface import SurfacePurifier
from ifdefense.restorers.mesh import MeshRestorer
from ifdefense.restorers.optimised import Adam, OptimisedRestorer
from ifdefense.restorers.ridge import RidgeRestorer
from ifdefense.stages.extraction import Extraction, Tracking

CLOUDS = torch.from_numpy(
    np.stack([sample_box(sides, 160, np.random.default_rng(0)) for sides in ((1, 0.7, 0.7), (1, 0.9, 0.8))])
)
"""``(2, 160, 3)``: the smallest clouds of which every method finds the surface."""


class Pooled(nn.Module):
    """A small classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)

    def forward(self, points: Tensor) -> Tensor:
        return self.layer(points).amax(1)


def quick(method: str) -> Purifier:
    """A method with its weights and stages, but with coarse grids and few steps: the caller's own copy."""
    return copy.deepcopy(_loaded(method))


@functools.cache
def _loaded(method: str) -> Purifier:
    return load_quick(method)


def load_quick(method: str) -> Purifier:
    """As `quick`, but read from its files again."""
    purifier = ifdefense.load(method)
    for part in purifier.modules():
        if isinstance(part, SurfacePurifier):
            part.restorer = _cheaper(part.restorer)
    return purifier


def _cheaper(restorer: object) -> object:
    if isinstance(restorer, OptimisedRestorer):
        return dataclasses.replace(restorer, solver=Adam(steps=3, every=2))
    if isinstance(restorer, MeshRestorer):
        return dataclasses.replace(restorer, extract=Extraction(16, 8))
    assert isinstance(restorer, RidgeRestorer)
    return restorer.with_stages(extract=Tracking(20, 5))
