"""Solids as signed distance functions with exact uniform surface sampling.

A solid is a union of parts; a part is a primitive minus other primitives. Distances are negative inside. They
are exact for primitives. Unions and differences keep the sign exact and the distance 1-Lipschitz, a lower
bound of the true one (Hart, *Sphere tracing*, The Visual Computer 12, 1996).

Points are columns, ``(3, Q)``, so that each coordinate is contiguous.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import override

Array = NDArray[np.floating]  # float32 or float64; distances keep the dtype of the points
Samples = tuple[Array, Array]  # points and outward normals, both (3, Q)

_AXES = np.concatenate([np.eye(3), -np.eye(3)], axis=1)  # (3, 6)


class Primitive(ABC):
    """A solid in its own frame with an exact distance and uniform surface sampling.

    Attributes:
        area: surface area.
    """

    area: float

    @abstractmethod
    def distance(self, points: Array) -> Array:
        """Signed distance of points ``(3, Q)``, ``(Q,)``, negative inside."""

    @abstractmethod
    def sample(self, count: int, rng: np.random.Generator) -> Samples:
        """Samples points ``(3, count)`` uniformly by area, with outward unit normals."""

    @abstractmethod
    def support(self, directions: Array) -> Array:
        """Support function in directions ``(3, D)``, ``(D,)``: the largest dot product with a point."""


class RoundedBox(Primitive):
    """Minkowski sum of a box and a ball: boxes, rounded boxes, plates, capsules and spheres.

    Args:
        half: half extents of the inner box, each at least 0.
        radius: radius of the ball, added on every side.
    """

    def __init__(self, half: ArrayLike, radius: float = 0.0) -> None:
        self.half = np.asarray(half, dtype=np.float64)
        self.radius = float(radius)
        h = self.half
        # Nonzero coordinates of the normal (1 on faces, 2 on edges, 3 on corners), and the area of each kind.
        self._kinds = np.array(
            [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 1, 1]], dtype=bool
        )
        faces = 8 * np.array([h[1] * h[2], h[0] * h[2], h[0] * h[1]])
        edges = 4 * np.pi * self.radius * h
        self._areas = np.concatenate([faces, edges, [4 * np.pi * self.radius**2]])
        self.area = float(self._areas.sum())

    @override
    def distance(self, points: Array) -> Array:
        beyond = np.abs(points) - self.half.astype(points.dtype)[:, None]  # (3, Q)
        inside = np.minimum(beyond.max(axis=0), 0)
        np.maximum(beyond, 0, out=beyond)
        distance: Array = np.sqrt(np.einsum("iq,iq->q", beyond, beyond)) + inside - self.radius
        return distance

    @override
    def sample(self, count: int, rng: np.random.Generator) -> Samples:
        kind = self._kinds[_pick(self._areas, count, rng)].T  # (3, count)
        normals = _unit(np.where(kind, rng.standard_normal((3, count)), 0.0))
        along = rng.uniform(-1, 1, (3, count))
        core = np.where(kind, np.sign(normals), along) * self.half[:, None]
        return core + self.radius * normals, normals

    @override
    def support(self, directions: Array) -> Array:
        reach: Array = self.half @ np.abs(directions) + self.radius * np.linalg.norm(directions, axis=0)
        return reach


class Torus(Primitive):
    """A torus about the z axis.

    Args:
        ring: major radius.
        tube: minor radius, less than ``ring``.
    """

    def __init__(self, ring: float, tube: float) -> None:
        self.ring, self.tube = float(ring), float(tube)
        self.area = 4 * np.pi**2 * self.ring * self.tube

    @override
    def distance(self, points: Array) -> Array:
        distance: Array = np.hypot(np.hypot(points[0], points[1]) - self.ring, points[2]) - self.tube
        return distance

    @override
    def sample(self, count: int, rng: np.random.Generator) -> Samples:
        def draw(number: int) -> Array:
            angle, height = rng.uniform(-np.pi, np.pi, number), rng.random(number)
            return angle[height * (self.ring + self.tube) < self.ring + self.tube * np.cos(angle)][None]

        around_tube = _accepted(count, draw)[0]
        angle = rng.uniform(0, 2 * np.pi, count)
        outward, upward = np.cos(around_tube), np.sin(around_tube)
        return (
            _turned(self.ring + self.tube * outward, self.tube * upward, angle),
            _turned(outward, upward, angle),
        )

    @override
    def support(self, directions: Array) -> Array:
        sideways = np.hypot(directions[0], directions[1])
        reach: Array = self.ring * sideways + self.tube * np.linalg.norm(directions, axis=0)
        return reach


class Polygon:
    """A simple polygon in the plane, the profile of revolutions and extrusions.

    Args:
        corners: ``(K, 2)`` corners in either orientation.
        open_axis: ignore edges on the line x = 0, the axis of a revolution.
    """

    def __init__(self, corners: ArrayLike, *, open_axis: bool = False) -> None:
        start = np.asarray(corners, dtype=np.float64)
        following = np.roll(start, -1, axis=0)
        self.area = float(0.5 * np.sum(start[:, 0] * following[:, 1] - start[:, 1] * following[:, 0]))
        if self.area < 0:
            start, following, self.area = following, start, -self.area
        edges = following - start
        keep = np.linalg.norm(edges, axis=1) > 1e-9
        if open_axis:
            keep &= (start[:, 0] > 1e-9) | (following[:, 0] > 1e-9)
        self.corners = start
        self.start, self.edges = start[keep], edges[keep]
        self.tops = following[keep, 1]
        self.lengths = np.linalg.norm(self.edges, axis=1)
        self.normals = np.stack([self.edges[:, 1], -self.edges[:, 0]], axis=1) / self.lengths[:, None]

    def distance(self, x: Array, y: Array) -> Array:
        """Signed distance of the points ``(Q,)``, ``(Q,)``."""
        start, edges = self.start.astype(x.dtype), self.edges.astype(x.dtype)
        tops = self.tops.astype(
            x.dtype
        )  # rounded as the start of the next edge, so that there are no gaps between edges
        squares = np.sum(edges * edges, axis=1)
        nearest = np.full_like(x, np.inf)
        inside = np.zeros(x.shape, dtype=bool)
        for (sx, sy), (ex, ey), top, square in zip(start, edges, tops, squares, strict=True):
            dx, dy = x - sx, y - sy
            along = np.clip((dx * ex + dy * ey) / square, 0, 1)
            np.minimum(nearest, (dx - along * ex) ** 2 + (dy - along * ey) ** 2, out=nearest)
            if sy != top:  # does a ray towards +x cross this edge?
                inside ^= ((y >= sy) != (y >= top)) & (dx < dy * (ex / ey))
        distance = np.sqrt(nearest)
        return np.where(inside, -distance, distance)


class Revolution(Primitive):
    """A solid of revolution about the z axis: cylinders, cones, tubes, bottles, bowls.

    Args:
        profile: ``(K, 2)`` corners (radius, z) of a simple polygon with radius at least 0, which may touch
            the axis.
    """

    def __init__(self, profile: ArrayLike) -> None:
        self.profile = Polygon(profile, open_axis=True)
        self._first = self.profile.start[:, 0]
        self._last = self._first + self.profile.edges[:, 0]
        self._areas = np.pi * (self._first + self._last) * self.profile.lengths
        self.area = float(self._areas.sum())

    @override
    def distance(self, points: Array) -> Array:
        return self.profile.distance(np.hypot(points[0], points[1]), points[2])

    @override
    def sample(self, count: int, rng: np.random.Generator) -> Samples:
        edge = _pick(self._areas, count, rng)
        first, last = self._first[edge], self._last[edge]
        share = 1 - rng.random(count)  # in (0, 1]
        # Inverse of the cumulative area along a frustum, without division by zero for equal radii.
        along = share * (first + last) / (first + np.sqrt(first**2 + share * (last**2 - first**2)))
        radius, height = (self.profile.start[edge] + along[:, None] * self.profile.edges[edge]).T
        outward, upward = self.profile.normals[edge].T
        angle = rng.uniform(0, 2 * np.pi, count)
        return _turned(radius, height, angle), _turned(outward, upward, angle)

    @override
    def support(self, directions: Array) -> Array:
        sideways = np.hypot(directions[0], directions[1])
        reach: Array = (self.profile.corners @ np.stack([sideways, directions[2]])).max(axis=0)
        return reach


class Extrusion(Primitive):
    """A polygon in the xy plane extruded along z.

    Args:
        polygon: ``(K, 2)`` corners of a simple polygon.
        thickness: extent along z, centred on 0.
    """

    def __init__(self, polygon: ArrayLike, thickness: float) -> None:
        self.polygon = Polygon(polygon)
        self.half = 0.5 * thickness
        self._caps = 2 * self.polygon.area
        self.area = float(self._caps + self.polygon.lengths.sum() * thickness)

    @override
    def distance(self, points: Array) -> Array:
        across = self.polygon.distance(points[0], points[1])
        along = np.abs(points[2]) - self.half
        inside = np.minimum(np.maximum(across, along), 0)
        distance: Array = inside + np.hypot(np.maximum(across, 0), np.maximum(along, 0))
        return distance

    @override
    def sample(self, count: int, rng: np.random.Generator) -> Samples:
        on_caps = rng.binomial(count, self._caps / self.area)
        points, normals = np.zeros((3, count)), np.zeros((3, count))
        points[:2, :on_caps] = _accepted(on_caps, lambda number: self._inside(number, rng))
        normals[2, :on_caps] = rng.choice([-1.0, 1.0], on_caps)
        points[2, :on_caps] = normals[2, :on_caps] * self.half
        edge = _pick(self.polygon.lengths, count - on_caps, rng)
        along = rng.random((count - on_caps, 1))
        points[:2, on_caps:] = (self.polygon.start[edge] + along * self.polygon.edges[edge]).T
        points[2, on_caps:] = rng.uniform(-self.half, self.half, count - on_caps)
        normals[:2, on_caps:] = self.polygon.normals[edge].T
        return points, normals

    def _inside(self, number: int, rng: np.random.Generator) -> Array:
        low, high = self.polygon.corners.min(axis=0), self.polygon.corners.max(axis=0)
        points = rng.uniform(low[:, None], high[:, None], (2, number))
        return points[:, self.polygon.distance(*points) < 0]

    @override
    def support(self, directions: Array) -> Array:
        reach: Array = (self.polygon.corners @ directions[:2]).max(axis=0) + self.half * np.abs(directions[2])
        return reach


@dataclass(frozen=True, eq=False)
class Placed:
    """A primitive in the frame of the solid: ``x = rotation @ local + origin``."""

    primitive: Primitive
    origin: Array
    rotation: Array | None = None

    def distance(self, points: Array) -> Array:
        """As `Primitive.distance`, in the frame of the solid."""
        local = points - self.origin.astype(points.dtype)[:, None]
        if self.rotation is not None:
            local = self.rotation.T.astype(points.dtype) @ local
        return self.primitive.distance(local)

    def sample(self, count: int, rng: np.random.Generator) -> Samples:
        """As `Primitive.sample`, in the frame of the solid."""
        points, normals = self.primitive.sample(count, rng)
        if self.rotation is not None:
            points, normals = self.rotation @ points, self.rotation @ normals
        return points + self.origin[:, None], normals

    def support(self, directions: Array) -> Array:
        """As `Primitive.support`, in the frame of the solid."""
        local = directions if self.rotation is None else self.rotation.T @ directions
        return self.primitive.support(local) + self.origin @ directions


@dataclass(frozen=True, eq=False)
class Part:
    """A primitive minus other primitives. Cuts must not change its bounding box."""

    body: Placed
    cuts: tuple[Placed, ...] = ()

    def minus(self, *others: Part) -> Part:
        """This part minus the bodies of others."""
        return Part(self.body, self.cuts + tuple(other.body for other in others))


class Solid:
    """A union of parts.

    Parts must overlap or be disjoint, as a common face of touching parts would count as surface.

    Args:
        parts: at least one.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self._faces = [
            (placed, 1 if placed is part.body else -1) for part in parts for placed in _placed(part)
        ]
        self._areas = np.array([placed.primitive.area for placed, _ in self._faces])

    def bounds(self) -> tuple[Array, Array]:
        """Minimum and maximum corner of the bounding box, each ``(3,)``."""
        reach = np.max([part.body.support(_AXES) for part in self.parts], axis=0)
        return -reach[3:], reach[:3]

    def distance(self, points: Array) -> Array:
        """Signed distance of points ``(3, Q)``, ``(Q,)``."""
        nearest = np.full(points.shape[1], np.inf, dtype=points.dtype)
        for part in self.parts:
            distance = part.body.distance(points)
            for cut in part.cuts:
                np.maximum(distance, -cut.distance(points), out=distance)
            np.minimum(nearest, distance, out=nearest)
        return nearest

    def sample(self, count: int, rng: np.random.Generator, tolerance: float = 1e-6) -> Samples:
        """Samples points ``(3, count)`` uniformly by area on the surface, with outward unit normals.

        Points are drawn on the surfaces of all primitives and accepted on the boundary of the solid; where
        surfaces coincide, on the first one only, so that the density is uniform.

        Args:
            count: number of points.
            rng: source of randomness.
            tolerance: largest distance of a point on a surface.
        """

        def draw(number: int) -> Array:
            shares = rng.multinomial(number, self._areas / self._areas.sum())
            candidates = np.concatenate(
                [
                    np.concatenate([*_signed(placed.sample(share, rng), sign), np.full((1, share), face)])
                    for face, ((placed, sign), share) in enumerate(zip(self._faces, shares, strict=True))
                ],
                axis=1,
            )[:, rng.permutation(number)]
            return candidates[:6, self._on_surface(candidates[:3], candidates[6], tolerance)]

        accepted = _accepted(count, draw)
        return accepted[:3], accepted[3:]

    def _on_surface(self, points: Array, face: Array, tolerance: float) -> NDArray[np.bool_]:
        nearest = np.full(points.shape[1], np.inf)
        first = np.full(points.shape[1], len(self._faces))
        index = 0
        for part in self.parts:
            distance = np.full(points.shape[1], -np.inf)
            for placed in _placed(part):
                own = placed.distance(points)
                np.minimum(first, np.where(np.abs(own) < tolerance, index, len(self._faces)), out=first)
                np.maximum(distance, own if placed is part.body else -own, out=distance)
                index += 1
            np.minimum(nearest, distance, out=nearest)
        owned: NDArray[np.bool_] = (np.abs(nearest) < tolerance) & (first == face)
        return owned


def _placed(part: Part) -> tuple[Placed, ...]:
    return (part.body, *part.cuts)


def _signed(samples: Samples, sign: int) -> Samples:
    return samples[0], sign * samples[1]


def _pick(weights: Array, count: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Draws indices in proportion to the weights."""
    edges: Array = np.cumsum(weights)
    found: NDArray[np.intp] = np.searchsorted(edges, rng.random(count) * edges[-1], side="right")
    found[found == len(weights)] -= 1  # rounded up to the last edge
    return found


def _unit(vectors: Array) -> Array:
    lengths: Array = np.maximum(np.linalg.norm(vectors, axis=0), 1e-12)
    return vectors / lengths


def _turned(radius: Array, height: Array, angle: Array) -> Array:
    """Rotates points (radius, height) of a half plane about the z axis."""
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), height])


def _accepted(count: int, draw: Callable[[int], Array]) -> Array:
    """Rejection sampling of ``count`` columns; ``draw(n)`` returns the accepted ones of ``n`` candidates."""
    batches, have, number = [], 0, count + count // 2 + 16
    while True:
        batches.append(draw(number))
        have += batches[-1].shape[1]
        if have >= count:
            return np.concatenate(batches, axis=1)[:, :count]
        number = int(1.3 * (count - have) * number / max(batches[-1].shape[1], 1)) + 16
