"""Classes of the procedural data set: one function per class draws proportions and assembles parts.

Units are arbitrary, as shapes are scaled afterwards; z is up and objects face -y. Parts are at least 3% of
the longest side thick, which a grid of 64 cells per side resolves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from ifdefense.shapes.sdf import Array, Extrusion, Part, Placed, Revolution, RoundedBox, Torus

Rng = np.random.Generator
Builder = Callable[[Rng], list[Part]]

BUILDERS: dict[str, Builder] = {}


def _register(build: Builder) -> Builder:
    BUILDERS[build.__name__.strip("_")] = build
    return build


# --- parts --------------------------------------------------------------------------------------------------


def _box(low: ArrayLike, high: ArrayLike, radius: float = 0.0) -> Part:
    """A box between two corners with edges rounded by ``radius`` (less if the box is thin)."""
    low, high = np.asarray(low, float), np.asarray(high, float)
    half = 0.5 * (high - low)
    radius = min(radius, 0.99 * float(half.min()))
    return Part(Placed(RoundedBox(half - radius, radius), 0.5 * (low + high)))


def _frame(direction: Array) -> Array:
    """A rotation whose third column is the direction and whose first is as horizontal as possible."""
    z = direction / np.linalg.norm(direction)
    x = np.cross([0.0, 1.0, 0.0] if abs(z[1]) < 0.9 else [0.0, 0.0, 1.0], z)
    x /= np.linalg.norm(x)
    return np.stack([x, np.cross(z, x), z], axis=1)


def _rod(start: ArrayLike, end: ArrayLike, first: float, last: float | None = None) -> Part:
    """A round bar from start to end, tapering from radius ``first`` to ``last``."""
    start, end = np.asarray(start, float), np.asarray(end, float)
    last = first if last is None else last
    length = float(np.linalg.norm(end - start))
    return _turned([(0, 0), (first, 0), (last, length), (0, length)], start, _frame(end - start))


def _bar(start: ArrayLike, end: ArrayLike, width: float) -> Part:
    """A square bar from start to end."""
    start, end = np.asarray(start, float), np.asarray(end, float)
    half = [0.5 * width, 0.5 * width, 0.5 * float(np.linalg.norm(end - start))]
    return Part(Placed(RoundedBox(half), 0.5 * (start + end), _frame(end - start)))


def _turned(profile: ArrayLike, origin: ArrayLike = (0, 0, 0), rotation: Array | None = None) -> Part:
    return Part(Placed(Revolution(profile), np.asarray(origin, float), rotation))


def _plate(polygon: ArrayLike, thickness: float, origin: ArrayLike, rotation: Array | None = None) -> Part:
    return Part(Placed(Extrusion(polygon, thickness), np.asarray(origin, float), rotation))


def _ring(ring: float, tube: float, origin: ArrayLike, rotation: Array | None = None) -> Part:
    return Part(Placed(Torus(ring, tube), np.asarray(origin, float), rotation))


def _ball(centre: ArrayLike, radius: float) -> Part:
    return Part(Placed(RoundedBox((0, 0, 0), radius), np.asarray(centre, float)))


def _about_x(angle: float) -> Array:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def _about_z(angle: float) -> Array:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


# Columns are the images of x, y, z: rotations of a plate drawn in the (x, y) plane.
_SIDE = np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])  # drawn (y, z), thick along x
_FRONT = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # drawn (x, z), thick along y


def _mirrored(polygon: ArrayLike) -> Array:
    """Closes an outline at positive x, given from bottom to top, by its mirror image."""
    right = np.asarray(polygon, float)
    return np.concatenate([right, right[::-1] * [-1, 1]])


def _smooth(knots: Sequence[tuple[float, float]], count: int) -> Array:
    """Monotone cubic curve of ``count`` points (radius, z) through knots of increasing z."""
    from scipy.interpolate import PchipInterpolator

    radius, height = np.asarray(knots, float).T
    z = np.linspace(height[0], height[-1], count)
    return np.stack([PchipInterpolator(height, radius)(z), z], axis=1)


def _inset(curve: Array, wall: float) -> Array:
    """Offsets a curve (radius, z), bottom to top, inwards along its normals by the wall thickness."""
    along = np.gradient(curve, axis=0)
    inward = np.stack([-along[:, 1], along[:, 0]], axis=1) / np.linalg.norm(along, axis=1, keepdims=True)
    moved: Array = curve + wall * inward
    moved[:, 0] = moved[:, 0].clip(min=0.01)
    return moved


def _vessel(outside: Array, wall: float, floor: float) -> Array:
    """Profile of an open vessel from its outer curve (radius, z), bottom to top, and thicknesses."""
    inside = _inset(outside, wall)
    level = outside[0, 1] + floor
    corner = (np.interp(level, inside[:, 1], inside[:, 0]), level)
    inside = np.concatenate([[(0, level), corner], inside[inside[:, 1] > level]])
    return np.concatenate([[(0, outside[0, 1])], outside, inside[::-1]])


def _corners(half_x: float, half_y: float) -> list[tuple[float, float]]:
    return [(x * half_x, y * half_y) for x in (-1, 1) for y in (-1, 1)]


def _legs(rng: Rng, half_x: float, half_y: float, height: float, width: float, splay: float) -> list[Part]:
    """Four legs below z = height, at the corners and splayed outwards, square, round or tapered."""
    kind = rng.integers(3)
    parts = []
    for x, y in _corners(half_x - 0.6 * width, half_y - 0.6 * width):
        foot, head = (x + np.sign(x) * splay, y + np.sign(y) * splay, 0.0), (x, y, height + 0.3 * width)
        if kind == 0:
            parts.append(_bar(foot, head, width))
        elif kind == 1:
            parts.append(_rod(foot, head, 0.5 * width))
        else:
            parts.append(_rod(foot, head, 0.4 * width, 0.65 * width))
    return parts


def _pedestal(rng: Rng, height: float, reach: float, column: float) -> list[Part]:
    """One column below z = height on a disc or on three to five feet."""
    parts = [_rod((0, 0, 0.02), (0, 0, height + 0.02), column)]
    thick = max(0.035, 0.8 * column)
    if rng.random() < 0.5:
        slope = rng.uniform(0.3, 0.9)
        return [
            *parts,
            _turned([(0, 0), (reach, 0), (reach, thick), (slope * column, 2.5 * thick), (0, 2.5 * thick)]),
        ]
    feet = int(rng.integers(3, 6))
    for angle in rng.uniform(0, np.pi) + 2 * np.pi * np.arange(feet) / feet:
        out = np.array([np.cos(angle), np.sin(angle), 0.0])
        parts.append(
            _rod(reach * out + [0, 0, 0.5 * thick], [0, 0, rng.uniform(0.6, 2.5) * thick], 0.5 * thick)
        )
    return parts


# --- classes ------------------------------------------------------------------------------------------------


@_register
def _airplane(rng: Rng) -> list[Part]:
    length, radius = 1.0, rng.uniform(0.045, 0.075)
    nose, tail = rng.uniform(0.08, 0.2), rng.uniform(0.25, 0.4)
    knots = [(0.35 * radius, 0.0), (radius, tail), (radius, length - nose), (0.35 * radius, length)]
    along = _frame(np.array([0.0, -1.0, 0.0]))  # the profile's axis runs from the tail to the nose
    body = _turned(np.concatenate([[(0, 0)], _smooth(knots, 16), [(0, length)]]), (0, 0.5 * length, 0), along)
    parts = [body, _ball((0, -0.5 * length + 0.05 * radius, 0), 0.36 * radius)]

    span, chord, sweep = rng.uniform(0.35, 0.55), rng.uniform(0.14, 0.24), rng.uniform(-0.02, 0.28)
    tip, thick = chord * rng.uniform(0.35, 0.9), rng.uniform(0.032, 0.042)
    root, height = rng.uniform(-0.16, -0.02), rng.uniform(-0.7, 0.6) * radius
    half = [(0, root), (span, root + sweep), (span, root + sweep + tip), (0, root + chord)]
    parts.append(_plate(_mirrored(half), thick, (0, 0, height)))

    back, share = 0.5 * length, rng.uniform(0.3, 0.5)
    fin = rng.uniform(0.14, 0.24)
    raised = fin if rng.random() < 0.3 else rng.uniform(0.0, 0.3) * radius  # a T-tail
    half = [
        (0, back - 0.17),
        (share * span, back - 0.17 + 0.6 * sweep),
        (share * span, back),
        (0, back - 0.02),
    ]
    parts.append(_plate(_mirrored(half), thick, (0, 0, raised)))
    outline = [(back - 0.2, 0), (back - 0.1, fin), (back + 0.02, fin), (back - 0.02, 0)]
    parts.append(_plate(outline, thick, (0, 0, 0), _SIDE))

    engines, size = int(rng.integers(0, 3)), rng.uniform(0.025, 0.04)
    for number in range(engines):
        x = span * (0.35 + 0.3 * number)
        y = root + sweep * x / span
        for side in (-1, 1):
            parts.append(
                _rod(
                    (side * x, y - 0.06, height - size), (side * x, y + 0.08, height - size), size, 0.7 * size
                )
            )
    return parts


@_register
def _bed(rng: Rng) -> list[Part]:
    half, length = rng.uniform(0.25, 0.48), 1.0
    frame, mattress = rng.uniform(0.14, 0.26), rng.uniform(0.08, 0.18)
    slab, board = rng.uniform(0.06, 0.1), rng.uniform(0.035, 0.06)
    head, foot = frame + mattress + rng.uniform(0.05, 0.3), frame + rng.uniform(-0.04, 0.2)
    parts = [_box((-half, 0, frame - slab), (half, length, frame))]
    parts.append(_box((-half + 0.01, 0.02, frame - 0.02), (half - 0.01, length, frame + mattress), 0.04))
    parts.append(_box((-half, length - 0.01, 0), (half, length + board, head), rng.choice([0.0, 0.015])))
    if rng.random() < 0.6:
        parts.append(_box((-half, -board, 0), (half, 0.01, foot)))
    if rng.random() < 0.3:
        parts.append(_box((-half + 0.03, 0.03, 0), (half - 0.03, length, frame - 0.02)))
    else:
        for x, y in _corners(half - 0.04, 0.5 * length - 0.05):
            parts.append(_bar((x, y + 0.5 * length, 0), (x, y + 0.5 * length, frame - 0.01), 0.055))
    top = frame + mattress
    pillows = 1 if half < 0.33 else 2
    for centre in np.linspace(-half, half, 2 * pillows + 1)[1::2]:
        wide = 0.8 * half / pillows
        parts.append(
            _box(
                (centre - wide, length - 0.25, top - 0.03), (centre + wide, length - 0.04, top + 0.05), 0.035
            )
        )
    return parts


@_register
def _bookshelf(rng: Rng) -> list[Part]:
    half, depth, board = rng.uniform(0.18, 0.42), rng.uniform(0.2, 0.34), rng.uniform(0.03, 0.045)
    shelves = int(rng.integers(3, 7))
    levels = np.linspace(0, 1 - board, shelves)
    if rng.random() < 0.5:
        levels += rng.uniform(0.03, 0.08) * (1 - levels)  # stands on its side panels
    parts = [_box((-half, 0, 0), (-half + board, depth, 1)), _box((half - board, 0, 0), (half, depth, 1))]
    parts += [_box((-half, 0, z), (half, depth, z + board)) for z in levels]
    if rng.random() < 0.8:
        parts.append(_box((-half, depth - board, levels[0]), (half, depth, 1)))
    if half > 0.3 and rng.random() < 0.5:
        x = rng.uniform(-0.3, 0.3) * half
        parts.append(_box((x - 0.5 * board, 0, levels[0]), (x + 0.5 * board, depth, 1)))
    for low, high in pairwise(levels):
        x = -half + board - 0.01
        while rng.random() < 0.7 and x < half - board - 0.12:
            wide, tall = rng.uniform(0.03, 0.1), rng.uniform(0.55, 0.9) * (high - low - board)
            parts.append(
                _box((x, 0.25 * depth, low + board - 0.01), (x + wide, depth - 0.01, low + board + tall))
            )
            x += wide + rng.choice([0.0, rng.uniform(0.03, 0.1)]) - 0.005
    return parts


@_register
def _bottle(rng: Rng) -> list[Part]:
    body, neck = rng.uniform(0.11, 0.2), rng.uniform(0.032, 0.055)
    shoulder, start = rng.uniform(0.4, 0.65), rng.uniform(0.68, 0.82)
    waist = body * rng.choice([1.0, rng.uniform(0.75, 0.95)])
    knots = [
        (0.92 * body, 0.0),
        (body, 0.04),
        (waist, 0.5 * shoulder),
        (body, shoulder),
        (neck, start),
        (neck, 1.0),
    ]
    profile = np.concatenate([[(0, 0)], _smooth(knots, 24), [(0, 1)]])
    parts = [_turned(profile)]
    lip = neck * rng.uniform(1.15, 1.5)
    cap = rng.uniform(0.03, 0.1)
    parts.append(_turned([(0, 1 - cap), (lip, 1 - cap), (lip, 1.005), (0, 1.005)]))
    return parts


@_register
def _bowl(rng: Rng) -> list[Part]:
    height, foot = rng.uniform(0.28, 0.6), rng.uniform(0.15, 0.3)
    belly = rng.uniform(0.3, 0.46)
    knots = [(foot, 0.0), (max(belly, foot + 0.02), 0.4 * height), (0.5, height)]
    wall = rng.uniform(0.032, 0.05)
    parts = [_turned(_vessel(_smooth(knots, 12), wall, 1.5 * wall))]
    if rng.random() < 0.5:
        tall = rng.uniform(0.03, 0.1)
        parts.append(_turned([(0, -tall), (foot, -tall), (0.85 * foot, 0.01), (0, 0.01)]))
    return parts


@_register
def _car(rng: Rng) -> list[Part]:
    half, wheel = rng.uniform(0.18, 0.23), rng.uniform(0.075, 0.105)
    low, belt = wheel * rng.uniform(0.6, 1.0), rng.uniform(0.2, 0.25)
    roof = belt + rng.uniform(0.1, 0.17)
    hood, boot = rng.uniform(0.2, 0.34), rng.choice([0.02, rng.uniform(0.1, 0.22)])
    slope, rear = rng.uniform(0.06, 0.16), rng.uniform(0.03, 0.12)
    drop = rng.uniform(0.0, 0.05)
    outline = [
        (-0.5, low),
        (0.5, low),
        (0.5, belt - 0.01),
        (0.5 - boot, belt),
        (-0.5 + hood, belt),
        (-0.5, belt - drop),
    ]
    parts = [_plate(outline, 2 * half, (0, 0, 0), _SIDE)]
    if rng.random() < 0.15:  # a pickup: the cabin ends half way
        boot, rear = 0.45, 0.02
    cabin = [
        (-0.5 + hood, belt - 0.02),
        (0.5 - boot, belt - 0.02),
        (0.5 - boot - rear, roof),
        (-0.5 + hood + slope, roof),
    ]
    parts.append(_plate(cabin, 1.8 * half, (0, 0, 0), _SIDE))
    wide, axle = rng.uniform(0.05, 0.08), rng.uniform(0.27, 0.33)
    for y in (-axle, axle):
        for side in (-1, 1):
            parts.append(_rod((side * (half + 0.02), y, wheel), (side * (half - wide), y, wheel), wheel))
    return parts


@_register
def _chair(rng: Rng) -> list[Part]:
    half_x, half_y = rng.uniform(0.2, 0.28), rng.uniform(0.2, 0.28)
    seat, thick, leg = rng.uniform(0.38, 0.48), rng.uniform(0.035, 0.08), rng.uniform(0.035, 0.055)
    top, lean, panel = seat + rng.uniform(0.35, 0.55), rng.uniform(0.0, 0.14), rng.uniform(0.035, 0.05)
    rounded = rng.choice([0.0, 0.02])
    parts = [_box((-half_x, -half_y, seat - thick), (half_x, half_y, seat), rounded)]
    if rng.random() < 0.15:
        parts += _pedestal(rng, seat - thick, 0.9 * min(half_x, half_y), 0.03)
    else:
        parts += _legs(rng, half_x, half_y, seat - thick, leg, rng.choice([0.0, rng.uniform(0.02, 0.12)]))

    foot, head = np.array([0, half_y - 0.5 * panel, seat - 0.02]), np.array([0, half_y + lean, top])
    across = np.array([half_x - 0.5 * panel, 0, 0])
    style = rng.integers(3)
    if style == 0:  # a panel
        height = float(np.linalg.norm(head - foot))
        plate = Placed(
            RoundedBox((half_x, 0.5 * panel, 0.5 * height)), 0.5 * (foot + head), _frame(head - foot)
        )
        parts.append(Part(plate))
    else:  # a frame with slats or spindles
        parts += [_bar(foot - across, head - across, panel), _bar(foot + across, head + across, panel)]
        parts.append(
            _bar(head - across - [0.5 * panel, 0, 0], head + across + [0.5 * panel, 0, 0], 1.2 * panel)
        )
        count = int(rng.integers(1, 4))
        for share in np.linspace(0, 1, count + 2)[1:-1]:
            if style == 1:
                middle = foot + (share + 0.1) * (head - foot)
                parts.append(_bar(middle - across, middle + across, panel))
            else:
                x = (2 * share - 1) * across
                parts.append(_rod(foot + x, head + x, 0.5 * panel))
    if rng.random() < 0.35:
        arm, width = seat + rng.uniform(0.15, 0.24), 0.04
        for side in (-1, 1):
            x = side * (half_x - 0.5 * width)
            reach = half_y + lean * (arm - seat) / (top - seat)
            parts.append(_box((x - 0.5 * width, -half_y, arm - width), (x + 0.5 * width, reach, arm)))
            parts.append(
                _bar(
                    (x, -half_y + 0.5 * width, seat - 0.02),
                    (x, -half_y + 0.5 * width, arm - 0.01),
                    0.9 * width,
                )
            )
    return parts


@_register
def _guitar(rng: Rng) -> list[Part]:
    thick, lower = rng.uniform(0.05, 0.11), rng.uniform(0.14, 0.2)
    upper, waist, body = lower * rng.uniform(0.7, 0.9), lower * rng.uniform(0.5, 0.72), rng.uniform(0.4, 0.5)
    knots = [
        (0.5 * lower, 0.0),
        (lower, 0.28 * body),
        (waist, 0.62 * body),
        (upper, 0.84 * body),
        (0.4 * upper, body),
    ]
    parts = [_plate(_mirrored(_smooth(knots, 14)), thick, (0, 0, 0), _FRONT)]
    neck, board, end = rng.uniform(0.025, 0.035), 0.035, rng.uniform(0.84, 0.9)
    front = -0.5 * thick
    parts.append(_box((-neck, front - 0.01, 0.6 * body), (neck, front - 0.01 + board, end)))
    head = [
        (neck, end - 0.01),
        (rng.uniform(1.2, 2.0) * neck, end + 0.03),
        (rng.uniform(1.0, 1.9) * neck, 1.0),
    ]
    parts.append(_plate(_mirrored(head), board, (0, front - 0.01 + 0.5 * board, 0), _FRONT))
    parts.append(_box((-2 * neck, front - 0.02, 0.18 * body), (2 * neck, front + 0.01, 0.18 * body + 0.04)))
    if rng.random() < 0.6:
        hole = _rod((0, front - 0.03, 0.5 * body), (0, front + 0.4 * thick, 0.5 * body), 0.4 * waist)
        parts[0] = parts[0].minus(hole)
    return parts


@_register
def _lamp(rng: Rng) -> list[Part]:
    stem, reach = rng.uniform(0.016, 0.03), rng.uniform(0.1, 0.2)
    shade, wide = rng.uniform(0.16, 0.34), rng.uniform(0.14, 0.28)
    narrow, wall = wide * rng.uniform(0.35, 1.0), 0.032
    bottom = 1 - shade
    parts = [_rod((0, 0, 0.01), (0, 0, 1 - 0.3 * shade), stem)]
    base = rng.uniform(0.03, 0.08)
    parts.append(
        _turned([(0, 0), (reach, 0), (reach, 0.5 * base), (1.2 * stem, base + 0.03), (0, base + 0.03)])
    )
    if rng.random() < 0.4:  # a table lamp: the stem is a body
        knots = [(0.8 * reach, 0.01), (rng.uniform(0.5, 1.2) * reach, 0.5 * bottom), (1.2 * stem, bottom)]
        parts.append(_turned(np.concatenate([[(0, 0.01)], _smooth(knots, 12), [(0, bottom)]])))
    if rng.random() < 0.75:
        outer = np.array([(wide, bottom), (narrow, 1.0)])
        parts.append(_turned(np.concatenate([outer, _inset(outer, wall)[::-1]])))
        level = 1 - 0.4 * shade  # support of the shade
        radius = float(np.interp(level, outer[:, 1], outer[:, 0])) - 0.4 * wall
        parts.append(_turned([(0, level), (radius, level), (radius, level + wall), (0, level + wall)]))
    else:
        parts.append(_ball((0, 0, 1 - 0.5 * shade), 0.5 * shade))
    return parts


@_register
def _laptop(rng: Rng) -> list[Part]:
    half, depth = 0.5, rng.uniform(0.6, 0.78)
    base, lid = rng.uniform(0.035, 0.06), rng.uniform(0.032, 0.045)
    lean, height = rng.uniform(-0.15, 0.75), depth * rng.uniform(0.9, 1.0)
    parts = [_box((-half, -depth, 0), (half, 0, base), rng.choice([0.0, 0.012]))]
    tilt = _about_x(-lean)
    hinge = np.array([0, -0.5 * lid, 0.5 * base])
    middle = hinge + tilt @ [0, 0, 0.5 * height]
    parts.append(Part(Placed(RoundedBox((half - 0.01, 0.5 * lid, 0.5 * height)), middle, tilt)))
    if rng.random() < 0.6:
        parts.append(_rod((-0.8 * half, -0.4 * lid, base), (0.8 * half, -0.4 * lid, base), 0.03))
    pad = rng.uniform(0.08, 0.14)
    parts[0] = parts[0].minus(
        _box((-pad, -depth + 0.03, base - 0.012), (pad, -depth + 0.03 + pad, base + 0.1))
    )
    return parts


@_register
def _monitor(rng: Rng) -> list[Part]:
    half, tall = 0.5, rng.uniform(0.5, 0.75)
    thick, stand = rng.uniform(0.035, 0.07), rng.uniform(0.08, 0.22)
    parts = [_box((-half, -0.5 * thick, stand), (half, 0.5 * thick, stand + tall), rng.choice([0.0, 0.015]))]
    bezel = rng.uniform(0.025, 0.05)
    screen = _box(
        (-half + bezel, -thick, stand + bezel), (half - bezel, -0.5 * thick + 0.012, stand + tall - bezel)
    )
    parts[0] = parts[0].minus(screen)
    if rng.random() < 0.4:  # a CRT with a deep back
        back = rng.uniform(0.1, 0.3)
        parts.append(
            _box(
                (-0.7 * half, 0.3 * thick, stand + 0.1 * tall), (0.7 * half, back, stand + 0.85 * tall), 0.04
            )
        )
    column = rng.uniform(0.03, 0.08)
    parts.append(_box((-column, -0.3 * thick, 0.01), (column, 0.3 * thick + 0.03, stand + 0.2 * tall)))
    reach, deep = rng.uniform(0.15, 0.3), rng.uniform(0.09, 0.15)
    if rng.random() < 0.5:
        parts.append(_box((-reach, -deep, 0), (reach, deep, 0.035)))
    else:
        parts.append(_turned([(0, 0), (deep + 0.06, 0), (deep + 0.04, 0.035), (0, 0.05)]))
    return parts


@_register
def _mug(rng: Rng) -> list[Part]:
    height, radius, wall = 1.0, rng.uniform(0.32, 0.48), rng.uniform(0.04, 0.07)
    foot, belly = radius * rng.uniform(0.75, 1.0), radius * rng.uniform(0.95, 1.12)
    outside = _smooth([(foot, 0.0), (belly, 0.45 * height), (radius, height)], 12)
    tube = rng.uniform(0.04, 0.065)
    ring = rng.uniform(0.2, 0.3)
    level = height * rng.uniform(0.45, 0.58)
    handle = _ring(
        ring,
        tube,
        (np.interp(level, outside[:, 1], outside[:, 0]) + 0.25 * ring, 0, level),
        _about_x(np.pi / 2),
    )
    filled = np.concatenate([[(0, -0.01)], outside - [0.5 * wall, 0], [(0, height + 0.01)]])
    return [_turned(_vessel(outside, wall, 1.3 * wall)), handle.minus(_turned(filled))]


@_register
def _sofa(rng: Rng) -> list[Part]:
    half, depth = 0.5, rng.uniform(0.34, 0.46)
    seat, back = rng.uniform(0.17, 0.22), rng.uniform(0.34, 0.46)
    arm, thick = rng.uniform(0.05, 0.11), rng.uniform(0.08, 0.13)
    rise = seat + rng.uniform(0.06, 0.14)
    soft = rng.uniform(0.01, 0.04)
    foot = rng.choice([0.0, rng.uniform(0.03, 0.07)])
    parts = [_box((-half, -depth, foot), (half, 0, seat - 0.05))]
    parts.append(_box((-half, -thick, foot + 0.01), (half, 0.02, back), soft))
    for side in (-1, 1):
        if rng.random() < 0.92:
            inner, outer = sorted((side * half, side * (half - arm)))
            parts.append(_box((inner, -depth - 0.01, foot + 0.01), (outer, -0.01, rise), soft))
    edges = np.linspace(-half + arm, half - arm, int(rng.integers(2, 5)))
    for left, right in pairwise(edges):
        low = (left - 0.003, -depth - 0.02, seat - 0.07)
        parts.append(_box(low, (right + 0.003, 0.02 - thick, seat + 0.02), 0.03))
    if foot:
        for x, y in _corners(half - 0.05, 0.5 * depth - 0.05):
            parts.append(_rod((x, y - 0.5 * depth, 0), (x, y - 0.5 * depth, foot + 0.02), 0.022))
    return parts


@_register
def _stool(rng: Rng) -> list[Part]:
    half, height = rng.uniform(0.18, 0.32), rng.uniform(0.6, 1.0)
    thick, leg = rng.uniform(0.04, 0.1), rng.uniform(0.035, 0.055)
    rounded = rng.random() < 0.6
    if rounded:
        parts = [_turned([(0, height - thick), (half, height - thick), (half, height), (0, height)])]
    else:
        parts = [_box((-half, -half, height - thick), (half, half, height), rng.choice([0.0, 0.02]))]
    if rng.random() < 0.25:
        return parts + _pedestal(rng, height - thick, rng.uniform(0.8, 1.1) * half, rng.uniform(0.025, 0.045))
    inner = (0.75 if rounded else 0.95) * half
    spread = inner * rng.uniform(1.0, 1.35)
    ring = rng.uniform(0.2, 0.5) * height
    rungs = []
    for x, y in _corners(inner - 0.5 * leg, inner - 0.5 * leg):
        scale = spread / inner
        foot, head = np.array([scale * x, scale * y, 0]), np.array([x, y, height - 0.5 * thick])
        parts.append(_rod(foot, head, 0.5 * leg))
        rungs.append(foot + ring / head[2] * (head - foot))
    if rng.random() < 0.7:
        for first, second in ((0, 1), (1, 3), (3, 2), (2, 0)):
            parts.append(_rod(rungs[first], rungs[second], 0.42 * leg))
    return parts


@_register
def _table(rng: Rng) -> list[Part]:
    half_x, half_y = rng.uniform(0.35, 0.5), rng.uniform(0.22, 0.42)
    height, thick, leg = rng.uniform(0.3, 0.7), rng.uniform(0.035, 0.07), rng.uniform(0.04, 0.075)
    splay = rng.choice([0.0, rng.uniform(0.02, 0.12)])
    if rng.random() < 0.3:  # a round top
        top = _turned([(0, height - thick), (half_x, height - thick), (half_x, height), (0, height)])
        inner = 0.66 * half_x
        if rng.random() < 0.6:
            return [
                top,
                *_pedestal(rng, height - thick, rng.uniform(0.5, 0.8) * half_x, rng.uniform(0.025, 0.06)),
            ]
        return [top, *_legs(rng, inner, inner, height - thick, leg, splay)]
    top = _box((-half_x, -half_y, height - thick), (half_x, half_y, height))
    if rng.random() < 0.15:  # two side panels instead of legs
        panel = rng.uniform(0.035, 0.06)
        ends = (0.1 - half_x, half_x - 0.1 - panel)
        return [top, *(_box((x, -0.9 * half_y, 0), (x + panel, 0.9 * half_y, height - 0.01)) for x in ends)]
    inset = rng.uniform(0.0, 0.08)
    parts = [top, *_legs(rng, half_x - inset, half_y - inset, height - thick, leg, splay)]
    x, y = half_x - inset - 0.02, half_y - inset - 0.02
    if rng.random() < 0.4:  # a drawer box below the top
        parts.append(_box((-x, -y, height - thick - rng.uniform(0.05, 0.15)), (x, y, height - 0.01)))
    if not splay and rng.random() < 0.4:  # a lower shelf between upright legs
        z = rng.uniform(0.15, 0.35) * height
        parts.append(_box((-x, -y, z), (x, y, z + 0.035)))
    return parts


@_register
def _vase(rng: Rng) -> list[Part]:
    foot, belly = rng.uniform(0.1, 0.2), rng.uniform(0.2, 0.36)
    neck, lip = rng.uniform(0.08, 0.16), rng.uniform(0.12, 0.3)
    fullest, narrow = rng.uniform(0.25, 0.55), rng.uniform(0.72, 0.88)
    knots = [(foot, 0.0), (belly, fullest), (neck, narrow), (max(lip, neck), 1.0)]
    if rng.random() < 0.25:  # a beaker, widening all the way
        knots = [(foot, 0.0), (0.5 * (foot + lip) + 0.02, 0.5), (lip + 0.06, 1.0)]
    return [_turned(_vessel(_smooth(knots, 20), rng.uniform(0.034, 0.045), 0.06))]
