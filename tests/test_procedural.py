"""The procedural data set: exactness, recognisable classes, seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.measure import label, marching_cubes

from ifdefense.geometry.mesh import Mesh
from ifdefense.shapes.procedural import CLASSES, make_dataset, make_shape, make_shapes

SHAPES = {name: [make_shape(name, np.random.default_rng([seed, 1])) for seed in range(3)] for name in CLASSES}


@pytest.fixture(params=CLASSES)
def shapes(request):
    return SHAPES[request.param]


def surface(shape, count=2000):
    return shape.sample_surface(count, np.random.default_rng(0))


def grid(resolution, side=1.1):
    axis = np.linspace(-side / 2, side / 2, resolution + 1, dtype=np.float32)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)


def test_there_are_enough_classes_of_different_names():
    assert len(CLASSES) == len(set(CLASSES)) == 16
    assert tuple(sorted(CLASSES)) == CLASSES


def test_samples_lie_on_the_surface_between_inside_and_outside(shapes):
    for shape in shapes:
        points, normals = surface(shape)
        assert points.shape == normals.shape == (2000, 3)
        assert points.dtype == normals.dtype == np.float32
        assert np.abs(shape.sdf(points)).max() < 1e-5
        np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5)
        # In the creases, a step along the normal of one face passes through another.
        assert np.mean(shape.sdf(points + 1e-4 * normals) > 0) > 0.998
        assert np.mean(shape.sdf(points - 1e-4 * normals) < 0) > 0.998


def test_shapes_fill_the_unit_cube_along_their_longest_side(shapes):
    for shape in shapes:
        assert shape.extent.max() == pytest.approx(1)
        points, _ = surface(shape, 20_000)
        np.testing.assert_allclose(points.max(axis=0), shape.extent / 2, atol=0.012)
        np.testing.assert_allclose(points.min(axis=0), -shape.extent / 2, atol=0.012)
        assert (
            shape.sdf(grid(8, 1.02).reshape(-1, 3)[np.abs(grid(8, 1.02)).max(axis=-1).ravel() > 0.505]) > 0
        ).all()


def test_gradient_of_the_distance_has_norm_one_near_the_surface(shapes):
    step = 1e-6
    for shape in shapes:
        points, normals = surface(shape, 500)
        near = (points + 0.003 * normals).astype(np.float64)
        slope = [shape.sdf(near + step * axis) - shape.sdf(near - step * axis) for axis in np.eye(3)]
        norm = np.linalg.norm(slope, axis=0) / (2 * step)
        assert np.mean(np.abs(norm - 1) < 1e-4) > 0.98  # all but those at the medial axis of a crease


def test_distance_is_1_lipschitz_and_no_more_than_that_to_the_surface(shapes):
    rng = np.random.default_rng(3)
    a = rng.uniform(-0.6, 0.6, (1000, 3))
    b = a + rng.normal(0, 0.1, (1000, 3))
    for shape in shapes:
        rise = np.abs(shape.sdf(a) - shape.sdf(b))
        assert (rise <= np.linalg.norm(a - b, axis=1) + 1e-9).all()
        points, _ = surface(shape, 200)
        to_samples = np.linalg.norm(a[:, None] - points[None], axis=2).min(axis=1)
        assert (np.abs(shape.sdf(a)) <= to_samples + 1e-5).all()


def test_marching_cubes_finds_a_watertight_body_in_one_piece(shapes):
    points, anywhere = grid(64), np.random.default_rng(0).random((50_000, 3), np.float32) - 0.5
    for shape in shapes:
        field = shape.sdf(points)
        vertices, faces, _, _ = marching_cubes(field, 0.0)
        mesh = Mesh(vertices, faces)
        assert mesh.is_watertight
        assert mesh.volume * (1.1 / 64) ** 3 == pytest.approx(
            np.mean(shape.sdf(anywhere) < 0), rel=0.1, abs=1e-3
        )
        assert label(field < 0.5 * 1.1 / 64, connectivity=1).max() == 1


def test_no_part_is_thinner_than_two_hundredths(shapes):
    for shape in shapes:
        points, normals = surface(shape)
        depths = np.float32([0.005, 0.01, 0.015, 0.0195])
        inside = np.stack([shape.sdf(points - depth * normals) < 0 for depth in depths]).all(axis=0)
        assert inside.mean() > 0.95  # all but the sharp edges of wings, rims and cones


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.float32, torch.float64])
def test_sdf_keeps_the_kind_the_dtype_and_the_leading_shape(kind):
    shape = SHAPES["chair"][0]
    points = np.random.default_rng(0).uniform(-0.5, 0.5, (4, 5, 3))
    expected = shape.sdf(points)
    given = torch.tensor(points, dtype=kind) if isinstance(kind, torch.dtype) else points.astype(kind)
    found = shape.sdf(given)
    assert type(found) is type(given)
    assert found.dtype == kind
    assert found.shape == (4, 5)
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-6)


def test_equal_seeds_give_equal_sets_and_other_seeds_other_shapes():
    first, again, other = (
        make_dataset(2, 64, seed=3),
        make_dataset(2, 64, seed=3),
        make_dataset(2, 64, seed=4),
    )
    np.testing.assert_array_equal(first.points, again.points)
    assert first.points.shape == (32, 64, 3)
    assert (first.points == other.points).mean(axis=(1, 2)).max() < 0.5  # flat faces may share a coordinate


def test_a_shape_does_not_depend_on_how_many_are_drawn():
    few, many = make_shapes(1, seed=5), make_shapes(3, seed=5)
    assert [shape.name for shape in few] == [shape.name for shape in many[::3]]
    points = grid(4).reshape(-1, 3)
    for one, same in zip(few, many[::3], strict=True):
        np.testing.assert_array_equal(one.sdf(points), same.sdf(points))


def test_a_set_names_and_labels_its_clouds():
    clouds = make_dataset(2, 32)
    assert clouds.classes == CLASSES
    assert clouds.points.dtype == np.float32
    np.testing.assert_array_equal(clouds.labels, np.repeat(np.arange(16), 2))
    assert [name.rsplit("_", 1)[0] for name in clouds.names] == [CLASSES[label] for label in clouds.labels]
    assert len(set(clouds.names)) == 32
    assert clouds.targets is None


def test_shapes_of_a_class_vary():
    for shapes in SHAPES.values():
        extents = np.stack([shape.extent for shape in shapes])
        assert np.ptp(extents, axis=0).max() > 0.01


def test_a_shape_says_its_name():
    assert repr(SHAPES["mug"][0]) == f"Shape('mug', label={CLASSES.index('mug')})"


def test_an_unknown_class_is_refused():
    with pytest.raises(ValueError, match="no procedural class 'dragon'; the classes are airplane, bed"):
        make_shape("dragon", np.random.default_rng(0))
