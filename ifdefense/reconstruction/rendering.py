"""Images of procedural solids by sphere tracing of their distances.

Hart, "Sphere tracing", The Visual Computer 12, 1996: a ray may always advance by the distance of its point
from the solid. Images are shaded by three lights in the camera's frame, red from the left, green from above
and blue from the right. An image and its mirror image with red and blue exchanged therefore show a solid and
the mirrored solid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ifdefense.shapes.procedural import Shape

Floats = NDArray[np.float32]

AMBIENT = 0.25
"""Share of the light that does not depend on the direction."""
LIGHTS = np.array([[-0.8, 0.2, 0.55], [0.0, 0.85, 0.5], [0.8, 0.2, 0.55]])
"""Directions of the lights of the channels: right, up, towards the camera."""
_TOLERANCE, _STEPS, _NUDGE = 1e-3, 96, 2e-3


@dataclasses.dataclass(frozen=True)
class Camera:
    """A pinhole camera that looks at the centre of the unit cube, z up.

    Attributes:
        azimuth: degrees about the up axis; 0 looks at the front of a solid, from -y, 90 from +x.
        elevation: degrees above the horizon, within ±89.
        distance: from the centre, in unit cubes.
        view: field of view, degrees.

    Raises:
        ValueError: if the camera looks straight up or down, or a number is out of range.
    """

    azimuth: float = 30.0
    elevation: float = 25.0
    distance: float = 2.0
    view: float = 40.0

    def __post_init__(self) -> None:
        if not abs(self.elevation) <= 89:
            raise ValueError(f"the elevation must lie within 89 degrees, got {self.elevation}")
        if not self.distance > 0.9:
            raise ValueError(f"the camera must be outside of the unit cube, got distance {self.distance}")
        if not 0 < self.view < 180:
            raise ValueError(f"the field of view must be from 0 to 180 degrees, got {self.view}")

    def axes(self) -> NDArray[np.float64]:
        """Unit vectors right, up and towards the camera, as rows ``(3, 3)``."""
        turn, rise = np.radians([self.azimuth, self.elevation])
        back = np.array([np.sin(turn) * np.cos(rise), -np.cos(turn) * np.cos(rise), np.sin(rise)])
        right = np.array([np.cos(turn), np.sin(turn), 0.0])
        return np.stack([right, np.cross(back, right), back])

    def rays(self, size: int) -> tuple[Floats, Floats]:
        """The camera's position ``(3,)`` and unit directions ``(size, size, 3)`` through the pixels."""
        axes = self.axes()
        step = ((np.arange(size) + 0.5) / size * 2 - 1) * np.tan(np.radians(self.view) / 2)
        x, y = np.meshgrid(step, -step)
        ways = np.stack([x, y, -np.ones_like(x)], -1) @ axes
        ways /= np.linalg.norm(ways, axis=-1, keepdims=True)
        return (self.distance * axes[2]).astype(np.float32), ways.astype(np.float32)


class Rendering(NamedTuple):
    """What a camera sees.

    Attributes:
        image: ``(H, W, 3)`` in [0, 1], black where there is nothing.
        depth: ``(H, W)`` distance from the camera along the ray, infinite where there is nothing.
    """

    image: Floats
    depth: Floats


def render(shape: Shape, camera: Camera = Camera(), size: int = 64) -> Rendering:
    """Renders a solid.

    Args:
        shape: the solid, in the unit cube.
        camera: where from.
        size: pixels per side.

    Raises:
        ValueError: if ``size`` is not positive.
    """
    if size < 1:
        raise ValueError(f"an image has at least one pixel, got a size of {size}")
    origin, ways = camera.rays(size)
    depth = trace(shape.sdf, origin, ways.reshape(-1, 3), shape.extent / 2)
    hit = np.flatnonzero(np.isfinite(depth))
    image = np.zeros((size * size, 3), np.float32)
    if len(hit):
        # A little in front of the surface, where the distance is exact.
        points = origin + (depth[hit] - _NUDGE)[:, None] * ways.reshape(-1, 3)[hit]
        lights = LIGHTS / np.linalg.norm(LIGHTS, axis=1, keepdims=True)
        facing = (_normals(shape.sdf, points) @ camera.axes().T @ lights.T).clip(0, 1)
        image[hit] = AMBIENT + (1 - AMBIENT) * facing
    return Rendering(image.reshape(size, size, 3), depth.reshape(size, size))


def trace(
    distance: Callable[[Floats], Floats], origin: Floats, ways: Floats, half: NDArray[np.floating]
) -> Floats:
    """Lengths ``(Q,)`` of rays until they hit a solid, infinite where they miss it.

    Args:
        distance: signed distance, or a lower bound, of points ``(M, 3)``.
        origin: start ``(3,)`` of all rays, outside of the box.
        ways: unit directions ``(Q, 3)``.
        half: half sides ``(3,)`` of a box about 0 that holds the solid.
    """
    side = half.astype(np.float32) + np.float32(2 * _TOLERANCE)
    safe = np.where(np.abs(ways) < 1e-9, np.float32(1e-9), ways)
    near, far = np.sort(np.stack([(-side - origin) / safe, (side - origin) / safe]), axis=0)
    length, last = near.max(1), far.min(1)
    found = np.full(len(ways), np.inf, np.float32)
    active = np.flatnonzero((length < last) & (last > 0))
    for _ in range(_STEPS):
        if not len(active):
            break
        step = distance(origin + length[active, None] * ways[active])
        struck = step < _TOLERANCE
        found[active[struck]] = length[active[struck]]
        length[active] += step
        active = active[~struck & (length[active] < last[active])]
    return found


def _normals(distance: Callable[[Floats], Floats], points: Floats) -> Floats:
    """Unit gradients ``(M, 3)`` of the distance, from the corners of a small tetrahedron."""
    corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], np.float32)
    found = distance((points + np.float32(_TOLERANCE) * corners[:, None]).reshape(-1, 3)).reshape(4, -1)
    slopes = found.T @ corners
    unit: Floats = slopes / np.maximum(np.linalg.norm(slopes, axis=1, keepdims=True), 1e-12)
    return unit


def random_cameras(count: int, rng: np.random.Generator) -> list[Camera]:
    """Cameras from all sides, 5 to 45 degrees above the horizon."""
    return [Camera(rng.uniform(0, 360), rng.uniform(5, 45)) for _ in range(count)]
