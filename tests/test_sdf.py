"""Signed distance functions against closed forms, dense samples and known areas."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import cKDTree

from ifdefense.shapes.sdf import Extrusion, Part, Placed, Revolution, RoundedBox, Solid, Torus

L_SHAPE = [(-0.4, -0.4), (0.4, -0.4), (0.4, -0.1), (-0.1, -0.1), (-0.1, 0.4), (-0.4, 0.4)]
CUP = [(0, -0.4), (0.3, -0.4), (0.4, 0.4), (0.3, 0.4), (0.22, -0.3), (0, -0.3)]
CYLINDER = [(0, -0.4), (0.3, -0.4), (0.3, 0.4), (0, 0.4)]
PRIMITIVES = {
    "box": (RoundedBox((0.3, 0.2, 0.4)), 8 * (0.3 * 0.2 + 0.3 * 0.4 + 0.2 * 0.4)),
    "sphere": (RoundedBox((0, 0, 0), 0.4), 4 * np.pi * 0.4**2),
    "capsule": (RoundedBox((0, 0, 0.3), 0.1), 4 * np.pi * 0.1**2 + 2 * np.pi * 0.1 * 0.6),
    "rounded box": (
        RoundedBox((0.2, 0.1, 0.3), 0.1),
        8 * (0.02 + 0.06 + 0.03) + 2 * np.pi * 0.1 * 1.2 + 4 * np.pi * 0.1**2,
    ),
    "torus": (Torus(0.3, 0.1), 4 * np.pi**2 * 0.03),
    "cylinder": (Revolution(CYLINDER), 2 * np.pi * 0.3**2 + 2 * np.pi * 0.3 * 0.8),
    "cone": (Revolution([(0, -0.4), (0.3, -0.4), (0, 0.4)]), np.pi * 0.3 * (0.3 + np.hypot(0.3, 0.8))),
    "cup": (
        Revolution(CUP),
        np.pi * (0.09 + 0.7 * np.hypot(0.1, 0.8) + 0.07 + 0.52 * np.hypot(0.08, 0.7) + 0.22**2),
    ),
    "tube": (Revolution([(0.2, -0.1), (0.4, -0.1), (0.4, 0.1), (0.2, 0.1)]), 2 * np.pi * (0.12 + 0.12)),
    "extrusion": (Extrusion(L_SHAPE, 0.4), 2 * (0.8 * 0.3 + 0.3 * 0.5) + 3.2 * 0.4),
}


@pytest.fixture(params=PRIMITIVES)
def named(request):
    return PRIMITIVES[request.param]


def queries(count=2000, seed=0):
    return np.random.default_rng(seed).uniform(-0.6, 0.6, (3, count))


def unit_directions(count=50):
    directions = np.random.default_rng(1).standard_normal((3, count))
    return directions / np.linalg.norm(directions, axis=0)


def test_area_is_the_closed_form(named):
    primitive, area = named
    assert primitive.area == pytest.approx(area)


def test_distance_is_that_to_the_nearest_of_dense_samples(named):
    primitive, _ = named
    samples, _ = primitive.sample(60_000, np.random.default_rng(2))
    nearest, _ = cKDTree(samples.T).query(queries().T)
    excess = nearest - np.abs(primitive.distance(queries()))
    assert excess.min() > -1e-9  # no sample is nearer than the distance says ...
    assert excess.max() < 0.02  # ... and the gap is the spacing of the samples


def test_samples_lie_on_the_surface_with_its_gradient_as_normal(named):
    primitive, _ = named
    points, normals = primitive.sample(3000, np.random.default_rng(3))
    assert np.abs(primitive.distance(points)).max() < 1e-12
    np.testing.assert_allclose(np.linalg.norm(normals, axis=0), 1, atol=1e-12)
    step = 1e-6
    rise = (primitive.distance(points + step * normals) - primitive.distance(points - step * normals)) / (
        2 * step
    )
    assert np.mean(np.abs(rise - 1) < 1e-6) > 0.999


def test_support_is_the_reach_of_the_samples(named):
    primitive, _ = named
    points, _ = primitive.sample(20_000, np.random.default_rng(4))
    slack = primitive.support(unit_directions()) - (unit_directions().T @ points).max(axis=1)
    assert slack.min() > -1e-12
    assert slack.max() < 0.03


def test_float32_keeps_its_dtype_and_its_signs(named):
    primitive, _ = named
    single, double = primitive.distance(queries().astype(np.float32)), primitive.distance(queries())
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, double, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("box", lambda p: (np.abs(p) < [[0.3], [0.2], [0.4]]).all(axis=0)),
        ("sphere", lambda p: np.linalg.norm(p, axis=0) < 0.4),
        ("torus", lambda p: (np.hypot(p[0], p[1]) - 0.3) ** 2 + p[2] ** 2 < 0.01),
        ("cylinder", lambda p: (np.hypot(p[0], p[1]) < 0.3) & (np.abs(p[2]) < 0.4)),
        ("cone", lambda p: (np.hypot(p[0], p[1]) < 0.3 * (0.4 - p[2]) / 0.8) & (np.abs(p[2]) < 0.4)),
        (
            "extrusion",
            lambda p: (
                (np.abs(p[:2]) < 0.4).all(axis=0) & ((p[0] < -0.1) | (p[1] < -0.1)) & (np.abs(p[2]) < 0.2)
            ),
        ),
    ],
)
def test_sign_agrees_with_the_equation_of_the_solid(name, inside):
    points = queries(20_000)
    np.testing.assert_array_equal(PRIMITIVES[name][0].distance(points) < 0, inside(points))


def test_signs_hold_on_rays_through_the_corners_of_a_profile():
    # In float32 the end of one edge must round as the start of the next, or a ray slips out between them.
    angles = np.linspace(0, 2 * np.pi, 97)[:-1]
    profile = np.stack([0.3 * np.cos(angles), 0.3 * np.sin(angles)], axis=1)
    heights = np.float32(profile[:, 1])
    polygon = Extrusion(profile, 1.0).polygon
    for x, expected in ((-0.2, np.abs(heights) < 0.2), (-0.4, np.zeros(96, bool))):
        sure = np.abs(np.abs(heights) - 0.223) > 0.03
        found = polygon.distance(np.full(96, x, np.float32), heights) < 0
        np.testing.assert_array_equal(found[sure], expected[sure])


@pytest.mark.parametrize(
    ("name", "region", "area"),
    [
        ("sphere", lambda p: p[2] > 0.2, 2 * np.pi * 0.4 * 0.2),
        ("cylinder", lambda p: (p[2] > 0.4 - 1e-9) & (np.hypot(p[0], p[1]) < 0.15), np.pi * 0.15**2),
        ("cone", lambda p: p[2] > 0, np.pi * 0.15 * np.hypot(0.15, 0.4)),
        ("torus", lambda p: np.hypot(p[0], p[1]) < 0.3, 2 * np.pi * 0.1 * (np.pi * 0.3 - 0.2)),
        ("rounded box", lambda p: p[0] > 0.3 - 1e-9, 4 * 0.1 * 0.3),
        ("extrusion", lambda p: (p[0] < 0) & (p[1] > 0) & (p[2] > 0.2 - 1e-9), 0.3 * 0.4),
    ],
)
def test_samples_are_uniform_by_area(name, region, area):
    primitive, total = PRIMITIVES[name]
    count, share = 40_000, area / total
    points, _ = primitive.sample(count, np.random.default_rng(5))
    assert abs(region(points).mean() - share) < 4 * np.sqrt(share * (1 - share) / count)


def rotated():
    half = np.sqrt(0.5)
    return np.array([[half, -half, 0], [half, half, 0], [0, 0, 1]])


def test_placement_turns_and_moves_a_primitive():
    placed = Placed(RoundedBox((0.4, 0.1, 0.1)), np.array([1.0, 2.0, 3.0]), rotated())
    along = np.array([[np.sqrt(0.5)], [np.sqrt(0.5)], [0]])
    centre = np.array([[1.0], [2.0], [3.0]])
    assert placed.distance(centre + 0.5 * along) == pytest.approx(0.1)
    points, normals = placed.sample(500, np.random.default_rng(0))
    assert np.abs(placed.distance(points)).max() < 1e-12
    assert (placed.distance(points + 0.01 * normals) > 0.009).all()
    assert placed.support(along) == pytest.approx((along.T @ points).max(), abs=0.01)


def part(primitive, origin=(0, 0, 0)):
    return Part(Placed(primitive, np.asarray(origin, float)))


def test_faces_that_coincide_are_sampled_once():
    # Two boxes overlap by half; the four long faces coincide there and must not be twice as dense.
    boxes = Solid([part(RoundedBox((0.3, 0.1, 0.1)), (x, 0, 0)) for x in (-0.15, 0.15)])
    points, _ = boxes.sample(40_000, np.random.default_rng(0))
    assert np.abs(boxes.distance(points)).max() < 1e-6
    share = (4 * 0.3 * 0.2) / (4 * 0.9 * 0.2 + 2 * 0.04)
    found = (np.abs(points[0]) < 0.15).mean()
    assert abs(found - share) < 4 * np.sqrt(share * (1 - share) / 40_000)
    np.testing.assert_allclose(boxes.bounds(), [(-0.45, -0.1, -0.1), (0.45, 0.1, 0.1)])


def test_a_cut_leaves_a_new_face_that_looks_out_of_the_solid():
    ball, half_space = part(RoundedBox((0, 0, 0), 0.4)), part(RoundedBox((1, 1, 1)), (0, 0, 1))
    half_ball = Solid([ball.minus(half_space)])
    points, normals = half_ball.sample(40_000, np.random.default_rng(0))
    flat = points[2] > -1e-9
    assert points[2].max() < 1e-9
    np.testing.assert_allclose(normals[:, flat], [[0], [0], [1]] * np.ones(flat.sum()), atol=1e-12)
    share = 1 / 3  # a disc of pi r^2 beside a half sphere of 2 pi r^2
    assert abs(flat.mean() - share) < 4 * np.sqrt(share * (1 - share) / 40_000)
    inside = (np.linalg.norm(queries(), axis=0) < 0.4) & (queries()[2] < 0)
    np.testing.assert_array_equal(half_ball.distance(queries()) < 0, inside)


def test_equal_seeds_give_equal_samples_and_the_count_is_kept():
    solid = Solid([part(PRIMITIVES["cup"][0]), part(Torus(0.2, 0.05), (0.4, 0, 0))])
    first, second = (solid.sample(333, np.random.default_rng(7))[0] for _ in range(2))
    assert first.shape == (3, 333)
    np.testing.assert_array_equal(first, second)
    assert solid.sample(0, np.random.default_rng(7))[0].shape == (3, 0)
