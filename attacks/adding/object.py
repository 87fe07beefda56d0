"""Adding small objects."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from attacks.adding.critical import critical_points, seed_clusters
from attacks.base import Oracle, ThreatModel
from attacks.functional import distances
from attacks.optimised.carlini_wagner import CarliniWagner, Problem, Rows, shared_noise
from ifdefense.geometry.points import gather, squared_distances


@dataclass(frozen=True)
class AddObject(CarliniWagner):
    """Adds a few small objects, turned, placed and deformed.

    Xiang et al., 2019, `arXiv:1809.07016 <https://arxiv.org/abs/1809.07016>`_, with the settings of
    IF-Defense, `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_.

    Minimises ``hinge(logits) + weight * distance``, as `CarliniWagner` does, over the shapes of the objects,
    their places and their angles about the up axis z; the distance is the norm of the deformation of all
    objects together plus ``chamfer_weight`` times the mean squared distance of the added points from the
    nearest original ones. An object starts at the critical point nearest the middle of one of the largest
    clusters, by DBSCAN, of the critical points, at a random angle. Objects come one after another, last in
    the returned clouds; the original points stay as they are.

    Differs from IF-Defense's code in the axis, which is y there as its clouds stand on y, in the default
    shape, which is an aeroplane of ModelNet40 there, and in that all clouds of a batch share their random
    numbers.

    Attributes:
        kappa: margin of the hinge in logits (published: 0).
        first_weight: weight of the distance in the first search (published: 5).
        largest_weight: upper end of the bisection (published: 40).
        searches: steps of the bisection (published: 5).
        iterations: steps of Adam a search (published: 500).
        rate: learning rate of Adam (published: 1e-2).
        noise: standard deviation of the noise each search starts from (published: 1e-7).
        polish: steps after the first success of a search (published: all that are left), see `CarliniWagner`.
        num: objects to add (published: 3).
        size: points of an object, drawn anew for each (published: 64).
        scale: largest distance of a point from the object's mean, in units of the cloud (published: 0.3).
        shape: ``(M, 3)`` points to draw an object from, in any frame, z up; by default those of an aeroplane
            of `ifdefense.data`.
        chamfer_weight: weight of the Chamfer distance against the deformation (published: 0.2).
        critical: critical points to look for clusters in (published: 128); all if there are fewer.
        radius: radius of DBSCAN's neighbourhoods in units of the cloud (published: 0.2).
        least: points that make a neighbourhood dense (published: 3).

    Raises:
        ValueError: if a number is out of range, or ``shape`` has too few points.
    """

    first_weight: float = 5.0
    largest_weight: float = 40.0
    searches: int = 5
    num: int = 3
    size: int = 64
    scale: float = 0.3
    shape: Tensor | None = field(default=None, compare=False)
    chamfer_weight: float = 0.2
    critical: int = 128
    radius: float = 0.2
    least: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num < 1 or self.size < 1 or self.critical < self.num:
            raise ValueError(
                "num and size must be at least 1, and critical at least num, "
                f"got num={self.num}, size={self.size}, critical={self.critical}"
            )
        if self.shape is not None and (
            self.shape.ndim != 2 or self.shape.shape[1] != 3 or len(self.shape) < self.size
        ):
            raise ValueError(
                f"shape must be (M, 3) with at least {self.size} points, got {tuple(self.shape.shape)}"
            )

    @property
    def threat(self) -> ThreatModel:
        """White box, targeted or untargeted, ``num`` objects of ``size`` points."""
        return ThreatModel("white-box", "both", "add", count=self.num * self.size)

    def problem(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> Problem:
        """Varies the objects' shapes, places and angles."""
        batch = len(points)
        critical = critical_points(oracle, points, min(self.critical, points.shape[1]))
        members = seed_clusters(critical, self.num, 1, self.radius, self.least, generator)
        places = _middles(critical, members)
        objects = self._objects(points, generator).expand(batch, -1, -1, -1)

        def start(generator: torch.Generator) -> list[Tensor]:
            shapes = objects + self.noise * shared_noise(objects, generator)
            middles = places + self.noise * shared_noise(places, generator)
            angles = math.pi * torch.rand(self.num, generator=generator, dtype=points.dtype)
            return [shapes, middles, angles.to(points.device).repeat(batch, 1)]

        def clouds(variables: list[Tensor], rows: Rows) -> Tensor:
            return torch.cat([points[rows], _placed(*variables).flatten(1, 2)], 1)

        def distance(variables: list[Tensor], clouds: Tensor, rows: Rows) -> Tensor:
            deformation = distances.l2(variables[0].flatten(1, 2), objects[rows].flatten(1, 2))
            away = distances.directed_chamfer(clouds[:, points.shape[1] :], points[rows])
            return deformation + self.chamfer_weight * away

        return Problem(start, clouds, distance)

    def _objects(self, points: Tensor, generator: torch.Generator) -> Tensor:
        """``(num, size, 3)`` points of the objects, around the origin."""
        shape = (_aeroplane() if self.shape is None else self.shape.detach()).to(points)
        shape = shape - shape.mean(0)
        shape = self.scale * shape / torch.linalg.vector_norm(shape, dim=1).max()
        draw = torch.rand(self.num, len(shape), generator=generator).argsort(1)[:, : self.size]
        objects: Tensor = shape[draw.to(points.device)]
        return objects


def _middles(points: Tensor, members: Tensor) -> Tensor:
    """``(B, num, 3)`` the member of each group ``(B, num, K)`` that is nearest to its mean."""
    share = members.to(points.dtype) / members.sum(2, keepdim=True)
    distance = squared_distances(share @ points, points)
    return gather(points, torch.where(members, distance, torch.inf).argmin(2))


def _placed(shapes: Tensor, places: Tensor, angles: Tensor) -> Tensor:
    """Turns ``(B, num, size, 3)`` shapes by ``(B, num)`` angles about z and moves them to their places."""
    cos, sin = angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)
    x, y, z = shapes.unbind(3)
    return torch.stack([cos * x - sin * y, sin * x + cos * y, z], 3) + places.unsqueeze(2)


def _aeroplane() -> Tensor:
    """``(1024, 3)`` points of an aeroplane, always the same."""
    from ifdefense.shapes.procedural import make_shape  # not needed by the other attacks

    rng = np.random.default_rng(0)
    return torch.from_numpy(make_shape("airplane", rng).sample_surface(1024, rng)[0])
