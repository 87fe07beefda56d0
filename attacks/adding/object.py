"""Adding small objects."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from attacks.adding.groups import AddGroups
from attacks.functional import distances
from attacks.functional.noise import shared_noise
from attacks.optimised.carlini_wagner import SearchSpace
from attacks.oracle import Oracle, Rows
from attacks.settings import NonNegativeFloat, PositiveFloat, PositiveInt, PositiveOrInfinite
from ifdefense.geometry.points import directed_chamfer, gather, squared_distances


@dataclass(frozen=True)
class AddObject(AddGroups):
    """Adds a few small objects, rotated, translated and deformed.

    Xiang et al., 2019, `arXiv:1809.07016 <https://arxiv.org/abs/1809.07016>`_, with the settings of
    IF-Defense, `arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_. Varies shapes, places and angles about
    the up axis z; the distance of `CarliniWagner` is the norm of the deformation plus ``chamfer_weight``
    times the one-sided squared Chamfer distance. Objects start at random angles at the central critical
    points of the largest clusters. Added points come last; the original ones are not moved.

    Differs from IF-Defense's code: the up axis is y there; the default shape is a procedural aeroplane, not
    one of ModelNet40; all clouds of a batch share their random numbers.

    Attributes:
        size: points per object, drawn anew for each (published: 64); others as in `AddGroups`.
        scale: radius of an object in units of the cloud (published: 0.3).
        shape: ``(M, 3)`` points to draw objects from, z up, in any frame; an aeroplane by default.

    Examples:
        >>> attack = attacks.AddObject(num=1, size=16, critical=16, searches=1, iterations=2)
        >>> result = attack(classifier, points, labels)
        >>> result.points.shape
        torch.Size([2, 80, 3])
    """

    largest_weight: PositiveOrInfinite = 40.0
    size: PositiveInt = 64
    chamfer_weight: NonNegativeFloat = 0.2
    scale: PositiveFloat = 0.3
    shape: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shape is not None and (
            self.shape.ndim != 2 or self.shape.shape[1] != 3 or len(self.shape) < self.size
        ):
            raise ValueError(
                f"shape must be (M, 3) with at least {self.size} points, got {tuple(self.shape.shape)}"
            )

    def space(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> SearchSpace:
        """Varies shapes, places and angles of the objects."""
        batch = len(points)
        critical, members = self.seeds(oracle, points, 1, generator)
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
            away = directed_chamfer(clouds[:, points.shape[1] :], points[rows])
            return deformation + self.chamfer_weight * away

        return SearchSpace(start, clouds, distance)

    def _objects(self, points: Tensor, generator: torch.Generator) -> Tensor:
        """``(num, size, 3)`` objects around the origin."""
        shape = (_aeroplane() if self.shape is None else self.shape.detach()).to(points)
        shape = shape - shape.mean(0)
        shape = self.scale * shape / torch.linalg.vector_norm(shape, dim=1).max()
        draw = torch.rand(self.num, len(shape), generator=generator, dtype=torch.float32)
        draw = draw.argsort(1)[:, : self.size]
        objects: Tensor = shape[draw.to(points.device)]
        return objects


def _middles(points: Tensor, members: Tensor) -> Tensor:
    """``(B, num, 3)`` member of each group ``(B, num, K)`` nearest to its mean."""
    share = members.to(points.dtype) / members.sum(2, keepdim=True)
    distance = squared_distances(share @ points, points)
    return gather(points, torch.where(members, distance, torch.inf).argmin(2))


def _placed(shapes: Tensor, places: Tensor, angles: Tensor) -> Tensor:
    """Rotates ``(B, num, size, 3)`` shapes by ``(B, num)`` angles about z and translates them."""
    cos, sin = angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)
    x, y, z = shapes.unbind(3)
    return torch.stack([cos * x - sin * y, sin * x + cos * y, z], 3) + places.unsqueeze(2)


def _aeroplane() -> Tensor:
    """``(1024, 3)`` points of a fixed procedural aeroplane."""
    from ifdefense.shapes.procedural import make_shape  # not needed by the other attacks

    rng = np.random.default_rng(0)
    return torch.from_numpy(make_shape("airplane", rng).sample_surface(1024, rng)[0])
