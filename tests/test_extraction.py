"""Extraction against dense grids, analytic spheres and boxes, and a naive flood fill."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from ifdefense.implicit.base import Calibration, Field
from ifdefense.stages.extraction import (
    Extraction,
    ExtractionOptions,
    Grid,
    Tracking,
    extract_meshes,
    mise,
    track,
)

Box = tuple[tuple[float, float, float], tuple[float, float, float]]
SMALL = ExtractionOptions(resolution=16, coarse=4)


def box_distance(points: Tensor, centre: tuple[float, ...], half: tuple[float, ...]) -> Tensor:
    """Signed distance to an axis-parallel box, negative inside."""
    q: Tensor = (points - points.new_tensor(centre)).abs() - points.new_tensor(half)
    outside: Tensor = torch.linalg.vector_norm(q.clamp(min=0), dim=1)
    return outside + q.amax(dim=1).clamp(max=0)


def union_field(shapes: list[list[Box]], options: ExtractionOptions, slope: float = 20.0) -> Field:
    """Logits that fall by ``slope`` a unit of distance from the union of boxes of each cloud."""

    def field(points: Tensor, cloud: Tensor) -> Tensor:
        logits = points.new_empty(len(points))
        for i, boxes in enumerate(shapes):
            mine = points[cloud == i]
            distances = [box_distance(mine, *box) for box in boxes] or [mine.new_ones(len(mine))]
            logits[cloud == i] = options.level - slope * torch.stack(distances).amin(dim=0)
        return logits

    return field


def sphere_field(radii: list[float], options: ExtractionOptions) -> Field:
    def field(points: Tensor, cloud: Tensor) -> Tensor:
        signed: Tensor = points.new_tensor(radii)[cloud] - torch.linalg.vector_norm(points, dim=1)
        return signed * 20 + options.level

    return field


class Counted:
    """A field that remembers the calls made of it."""

    def __init__(self, field: Field) -> None:
        self.field = field
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, points: Tensor, cloud: Tensor) -> Tensor:
        self.calls.append((points, cloud))
        return self.field(points, cloud)


def dense(options: ExtractionOptions) -> ExtractionOptions:
    return ExtractionOptions(options.resolution, options.resolution, options.threshold, options.box)


def mixed_cells(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    corners = [inside[tuple(slice(o, n - 1 + o) for o, n in zip(offset, inside.shape, strict=True))]
               for offset in itertools.product((0, 1), repeat=3)]  # fmt: skip
    mixed: NDArray[np.bool_] = np.logical_or.reduce(corners) & ~np.logical_and.reduce(corners)
    return mixed


def edges_seen_by_coarse_level(
    inside: NDArray[np.bool_], ratio: int
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Axis and lower end of a fine edge with a sign change: coarse edges whose ends disagree, bisected."""
    coarse = inside[::ratio, ::ratio, ::ratio]
    for axis in range(3):
        for low in np.argwhere(np.diff(coarse, axis=axis)) * ratio:
            step = np.eye(3, dtype=np.int64)[axis] * ratio
            while step[axis] > 1:
                step //= 2
                if inside[tuple(low + step)] == inside[tuple(low)]:
                    low = low + step
            yield axis, low


def surface_seen_by_coarse_level(inside: NDArray[np.bool_], ratio: int) -> NDArray[np.bool_]:
    """Naive twin: fine cells reached across faces with both signs from the edges the coarse level sees."""
    reached = np.zeros([n - 1 for n in inside.shape], bool)
    queue: deque[tuple[int, ...]] = deque()

    def reach(cell: tuple[int, ...]) -> None:
        if all(0 <= c < n for c, n in zip(cell, reached.shape, strict=True)) and not reached[cell]:
            reached[cell] = True
            queue.append(cell)

    for axis, low in edges_seen_by_coarse_level(inside, ratio):
        for back in itertools.product((0, 1), repeat=2):
            reach(tuple(map(int, low - np.insert(back, axis, 0))))
    while queue:
        cell = queue.popleft()
        for axis, side in itertools.product(range(3), (0, 1)):
            window = [slice(c, c + 2) for c in cell]
            window[axis] = slice(cell[axis] + side, cell[axis] + side + 1)
            face = inside[tuple(window)]
            if face.any() and not face.all():
                reach(tuple(c + (2 * side - 1) * (a == axis) for a, c in enumerate(cell)))
    return reached


coordinates = st.floats(-0.5, 0.5, width=32)
boxes = st.lists(
    st.tuples(st.tuples(*[coordinates] * 3), st.tuples(*[st.floats(0.0078125, 0.40625, width=32)] * 3)),
    max_size=5,
)


@given(shapes=st.lists(boxes, min_size=1, max_size=3))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_whatever_the_coarse_level_sees_of_random_solids_is_as_on_the_dense_grid(
    shapes: list[list[Box]],
) -> None:
    field = union_field(shapes, SMALL)
    sparse, full = mise(field, len(shapes), SMALL), mise(field, len(shapes), dense(SMALL))
    assert torch.equal(sparse.values[sparse.known], full.values[sparse.known])
    for values, known, expected in zip(sparse.values, sparse.known, full.values, strict=True):
        inside, truth = (values > SMALL.level).numpy(), (expected > SMALL.level).numpy()
        seen = surface_seen_by_coarse_level(truth, SMALL.resolution // SMALL.coarse)
        found = mixed_cells(inside)
        assert not (seen & ~found).any()
        assert not (found & ~mixed_cells(truth)).any()
        # Marching cubes reads the true field at every corner of every cell it meshes.
        assert not (found & (mixed_cells(known.numpy()) | ~known.numpy()[:-1, :-1, :-1])).any()


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_meshes_of_noise_are_watertight_and_outward_oriented(seed: int) -> None:
    noise = torch.randn(1, 9, 9, 9, generator=torch.Generator().manual_seed(seed))
    # A third of the values equal the level exactly, the hardest case for marching cubes.
    noise = torch.where(noise.abs() < 0.4, 0.0, noise) + SMALL.level
    options = ExtractionOptions(8, 8)
    mesh = Grid(noise, torch.ones_like(noise, dtype=torch.bool), options).meshes()[0]
    assert mesh.is_watertight
    assert mesh.volume > 0


def test_thin_legs_no_coarse_point_touches_are_followed_from_the_table_top() -> None:
    # Legs of 0.05 between the points of a coarse grid of 0.14: invisible to its corners.
    legs: list[Box] = [((x, y, -0.1), (0.025, 0.025, 0.35)) for x in (-0.35, 0.35) for y in (-0.35, 0.35)]
    options = ExtractionOptions(resolution=64, coarse=8)
    table = union_field([[((0.0, 0.0, 0.25), (0.45, 0.45, 0.1)), *legs]], options)
    hidden = mise(union_field([legs], options), 1, ExtractionOptions(8, 8)).values
    assert not (hidden > options.level).any()
    counted = Counted(table)
    followed = extract_meshes(counted, 1, options)[0]
    reference = extract_meshes(table, 1, dense(options))[0]
    assert len(counted.calls) > 4  # more than one a level: it had to follow
    assert np.array_equal(followed.vertices, reference.vertices)
    assert np.array_equal(followed.faces, reference.faces)
    assert followed.vertices[:, 2].min() == pytest.approx(-0.45, abs=1e-3)


def test_spheres_have_their_closed_form_volume_and_area() -> None:
    options, radii = ExtractionOptions(), [0.2, 0.3, 0.45]
    for mesh, radius in zip(extract_meshes(sphere_field(radii, options), 3, options), radii, strict=True):
        assert mesh.is_watertight
        assert mesh.volume == pytest.approx(4 / 3 * math.pi * radius**3, rel=0.01)
        assert mesh.area == pytest.approx(4 * math.pi * radius**2, rel=0.01)
        assert np.allclose(np.linalg.norm(mesh.vertices, axis=1), radius, atol=0.05 * options.spacing)


def test_a_box_aligned_with_the_grid_is_exact() -> None:
    options = ExtractionOptions(resolution=32, coarse=8, box=1.0)
    half = (0.25, 0.1875, 0.3125)
    mesh = extract_meshes(union_field([[((0.0, 0.0, 0.0), half)]], options), 1, options)[0]
    assert np.allclose(np.abs(mesh.vertices).max(axis=0), half, atol=1e-6)


def test_evaluations_are_a_fraction_of_the_dense_grid() -> None:
    options = ExtractionOptions()
    grid = mise(sphere_field([0.3], options), 1, options)
    assert int(grid.evaluations[0]) == int(grid.known.sum())
    assert int(grid.evaluations[0]) < 0.1 * (options.resolution + 1) ** 3


def test_each_level_is_one_call_for_all_clouds_and_no_point_is_asked_twice() -> None:
    options, radii = ExtractionOptions(), [0.2, 0.3, 0.45]
    counted = Counted(sphere_field(radii, options))
    grid = mise(counted, 3, options)
    assert len(counted.calls) == 3  # 16, 32, 64: a sphere never leaves the cells its corners show
    for points, cloud in counted.calls:
        assert points.dtype == torch.float32
        assert (cloud.diff() >= 0).all()
        assert set(cloud.tolist()) == {0, 1, 2}
    asked = torch.cat([torch.cat([c[:, None], p], dim=1) for p, c in counted.calls])
    assert len(torch.unique(asked, dim=0)) == len(asked) == int(grid.evaluations.sum())


def test_a_mesh_does_not_depend_on_its_batch() -> None:
    shapes: list[list[Box]] = [[((0.1 * i, 0.0, 0.0), (0.1, 0.2, 0.3))] for i in range(3)]
    together = extract_meshes(union_field(shapes, SMALL), 3, SMALL)
    for mesh, shape in zip(together, shapes, strict=True):
        alone = extract_meshes(union_field([shape], SMALL), 1, SMALL)[0]
        assert np.array_equal(mesh.vertices, alone.vertices)
        assert np.array_equal(mesh.faces, alone.faces)


def test_no_surface_gives_an_empty_mesh_among_others() -> None:
    meshes = extract_meshes(union_field([[], [((0.0, 0.0, 0.0), (0.3, 0.3, 0.3))]], SMALL), 2, SMALL)
    assert meshes[0].is_empty
    assert meshes[1].is_watertight


def test_a_solid_that_fills_the_box_is_closed_on_its_faces() -> None:
    options = ExtractionOptions(resolution=16, coarse=4, box=1.1)
    everywhere = extract_meshes(lambda points, cloud: torch.full_like(points[:, 0], 3.0), 1, options)[0]
    assert everywhere.is_watertight
    assert everywhere.volume == pytest.approx(1.1**3, rel=1e-3)
    half = extract_meshes(lambda points, cloud: options.level - points[:, 0], 1, options)[0]
    assert half.is_watertight
    assert half.volume == pytest.approx(1.1**3 / 2, rel=1e-3)


def test_dtype_follows_the_argument() -> None:
    grid = mise(sphere_field([0.3], SMALL), 1, SMALL, dtype=torch.float64)
    assert grid.values.dtype == torch.float64
    assert grid.meshes()[0].vertices.dtype == np.float32


def test_gradients_are_not_recorded() -> None:
    weight = torch.ones((), requires_grad=True)
    grid = mise(lambda points, cloud: weight * (0.3 - points.norm(dim=1)), 1, SMALL)
    assert not grid.values.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 48, "coarse": 32}, "multiple of coarse, got 48 and 32"),
        ({"resolution": 16, "coarse": 32}, "multiple of coarse, got 16 and 32"),
        ({"coarse": 0}, "multiple of coarse, got 64 and 0"),
        ({"threshold": 1.0}, r"probability in \(0, 1\), got 1.0"),
        ({"box": 0.0}, "positive side, got 0.0"),
    ],
)
def test_options_are_checked(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExtractionOptions(**arguments)  # type: ignore[arg-type]


def test_subdivision_halves_cells_and_tracking_takes_any_multiple() -> None:
    with pytest.raises(ValueError, match="power of two, got 36 and 12"):
        Extraction(36, 12)
    options = ExtractionOptions(36, 12, 0.5, 1.1)
    with pytest.raises(ValueError, match="power of two, got 36 and 12"):
        mise(shell_field, 1, options)
    dense = mise(shell_field, 1, ExtractionOptions(36, 36, 0.5, 1.1)).values
    tracked = track(shell_field, 1, options, seeds=[sphere_points(0.3)])
    assert torch.equal(tracked.values > 0, dense > 0)


def test_a_bad_field_is_named() -> None:
    with pytest.raises(ValueError, match=r"must return logits \(125,\), got \(125, 1\)"):
        extract_meshes(lambda points, cloud: points[:, :1], 1, SMALL)
    with pytest.raises(ValueError, match=r"not finite for cloud 1 of the batch at .*nan"):
        extract_meshes(lambda points, cloud: torch.where(cloud == 1, torch.nan, points[:, 0]), 3, SMALL)


def test_seeds_find_rods_between_the_coarse_points() -> None:
    """Rods of thickness 0.02 at random places: the coarse grid of 16 misses many, seeds none."""
    rng = np.random.default_rng(0)
    ends = rng.uniform(-0.45, 0.45, size=(16, 2))
    rods = torch.from_numpy(ends).float()

    def field(points: Tensor, cloud: Tensor) -> Tensor:
        across = (points[:, :2] - rods[cloud]).norm(dim=1)
        along = points[:, 2].abs() - 0.4
        return 100 * (0.01 - torch.maximum(across, along))

    angle, height = rng.uniform(0, 2 * np.pi, size=(16, 60)), rng.uniform(-0.4, 0.4, size=(16, 60))
    surface = np.stack(
        [ends[:, :1] + 0.01 * np.cos(angle), ends[:, 1:] + 0.01 * np.sin(angle), height], axis=2
    )
    seeds = list(torch.from_numpy(surface).float())
    calibration = Calibration(box=1.1, threshold=0.5)
    blind = Extraction(seeded=False)(field, seeds, calibration)
    seeing = Extraction()(field, seeds, calibration)
    assert sum(mesh.is_empty for mesh in blind) > 3
    assert not any(mesh.is_empty for mesh in seeing)
    spans = [np.ptp(mesh.vertices[:, 2]) for mesh in seeing]
    assert np.mean([span > 0.7 for span in spans]) > 0.8


def shell_field(points: Tensor, cloud: Tensor) -> Tensor:
    """Shells of thickness 0.08: around spheres of radius 0.3 and 0.4, and a small one away from them."""
    radius = torch.where(cloud == 0, 0.3, 0.4)
    main = (points.norm(dim=1) - radius).abs()
    small = ((points - 0.45).norm(dim=1) - 0.05).abs()
    return 20 * (0.04 - torch.minimum(main, small))


def sphere_points(radius: float, count: int = 300) -> Tensor:
    directions = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    return radius * directions / directions.norm(dim=1, keepdim=True)


def test_tracking_knows_every_end_of_a_crossed_edge_and_evaluates_half() -> None:
    options = ExtractionOptions(32, 4, 0.5, 1.1)
    seeds = [sphere_points(0.3), sphere_points(0.4)]
    dense = mise(shell_field, 2, ExtractionOptions(32, 32, 0.5, 1.1))
    subdivided = mise(shell_field, 2, options, seeds=seeds)
    tracked = track(shell_field, 2, options, seeds=seeds)
    assert ((tracked.values > 0) == (subdivided.values > 0)).all()
    assert tracked.values[tracked.known].equal(dense.values[tracked.known])
    assert (tracked.evaluations < 0.7 * subdivided.evaluations).all()
    inside = tracked.values > 0
    for dim in (1, 2, 3):
        size = inside.shape[dim] - 1
        crossed = inside.narrow(dim, 0, size) != inside.narrow(dim, 1, size)
        assert (tracked.known.narrow(dim, 0, size) & tracked.known.narrow(dim, 1, size))[crossed].all()


def test_tracking_follows_a_shell_from_a_single_seed() -> None:
    options = ExtractionOptions(32, 1, 0.5, 1.1)
    few = track(shell_field, 1, options, seeds=[sphere_points(0.3, 1)])
    many = track(shell_field, 1, options, seeds=[sphere_points(0.3)])
    assert (few.values > 0).equal(many.values > 0) and (few.values > 0).sum() > 1000


def test_the_coarse_grid_of_tracking_finds_parts_without_seeds() -> None:
    seeds, calibration = [sphere_points(0.3)], Calibration(box=1.1, threshold=0.5)
    (mesh,) = Tracking(32, 1)(shell_field, seeds, calibration)
    assert mesh.is_watertight and np.linalg.norm(mesh.vertices, axis=1).max() < 0.36
    (mesh,) = Tracking(32, 16)(shell_field, seeds, calibration)
    assert mesh.is_watertight and np.linalg.norm(mesh.vertices, axis=1).max() > 0.7


def test_clouds_with_sheets_between_the_planes_are_extracted_on_a_finer_grid() -> None:
    """Of cells of 0.055, whose nearest planes are at 0 and 0.055."""

    def field(points: Tensor, cloud: Tensor) -> Tensor:
        first = -box_distance(points, (0.0, 0.0, 0.033), (0.3, 0.3, 0.01))
        second = -box_distance(points, (-0.4, 0.0, 0.033), (0.02, 0.02, 0.01))
        ball = 0.2 - (points - points.new_tensor((0.2, 0.0, 0.0))).norm(dim=1)
        return 100 * torch.where(cloud == 0, first, torch.maximum(second, ball))

    generator = torch.Generator().manual_seed(0)
    flat = torch.rand(200, 3, generator=generator) * torch.tensor([0.6, 0.6, 0.0])
    flat -= torch.tensor([0.3, 0.3, -0.033])
    ball = torch.nn.functional.normalize(torch.randn(199, 3, generator=generator), dim=1) * 0.19
    ball[:, 0] += 0.2
    small = torch.tensor([[-0.4, 0.0, 0.033]])
    seeds, calibration = [flat, torch.cat([ball, small])], Calibration(box=1.1, threshold=0.5)
    coarse = Tracking(20, 5)(field, seeds, calibration)
    fine = Tracking(60, 5)(field, seeds, calibration)
    assert coarse[0].is_empty and fine[0].is_watertight and fine[1].vertices[:, 0].min() < -0.39
    both = Tracking(20, 5, finer=60)(field, seeds, calibration)  # one of 200 points is lost
    assert np.array_equal(both[0].vertices, fine[0].vertices)
    assert np.array_equal(both[1].vertices, coarse[1].vertices)
    every = Tracking(20, 5, finer=60, lost=0.004)(field, seeds, calibration)
    for found, expected in zip(every, fine, strict=True):
        assert np.array_equal(found.vertices, expected.vertices)
    noisy = [torch.cat([flat, flat + 0.2]), ball]  # points outside the solid are not lost parts of it
    kept = Tracking(20, 5, finer=60, lost=0.6)(field, noisy, calibration)
    assert kept[0].is_empty


def test_the_finer_grid_of_tracking_is_checked() -> None:
    with pytest.raises(ValueError, match="finer must be larger than resolution, got 20 and 20"):
        Tracking(20, 5, finer=20)
    with pytest.raises(ValueError, match="multiple of coarse, got 33 and 5"):
        Tracking(20, 5, finer=33)
    with pytest.raises(ValueError, match=r"lost must be in \[0, 1\], got -1"):
        Tracking(20, 5, finer=40, lost=-1)


def test_a_tracked_mesh_does_not_depend_on_its_batch_and_the_second_threshold_is_used() -> None:
    def field(points: Tensor, cloud: Tensor) -> Tensor:
        return shell_field(points, cloud) - torch.where(cloud == 1, 1.0, 0.0)  # below the first level

    seeds = [sphere_points(0.3), sphere_points(0.4)]
    calibration = Calibration(box=1.1, threshold=0.5, second_threshold=0.2)
    first, second = Tracking(32, 4)(field, seeds, calibration)
    (alone,) = Tracking(32, 4)(field, seeds[:1], calibration)
    assert np.array_equal(first.vertices, alone.vertices) and np.array_equal(first.faces, alone.faces)
    assert not second.is_empty and np.linalg.norm(second.vertices, axis=1).max() > 0.4
    only = dataclasses.replace(calibration, second_threshold=None)
    assert Tracking(32, 4)(field, seeds, only)[1].is_empty
