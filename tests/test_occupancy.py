"""Ground-truth occupancy against analytic solids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.studies.labels import overlap
from ifdefense.data.errors import DataError
from ifdefense.geometry.mesh import Mesh
from ifdefense.implicit.base import load_network
from ifdefense.shapes.procedural import make_shape
from ifdefense.training.data.network_labels import grids_from_network
from ifdefense.training.data.solid_sources import POINTS, read_folder, solids_from_clouds
from ifdefense.training.data.solids import (
    BOX,
    OFFSET,
    RESOLUTION,
    STEP,
    OccupancySet,
    cell_centres,
    concatenate,
    distance_to_points,
    grid_from_cloud,
    grid_from_mesh,
    grid_from_shape,
    interpolate,
)

CELL = BOX / RESOLUTION


def sphere(count: int, radius: float = 0.5) -> NDArray[np.float64]:
    normal = np.random.default_rng(0).normal(size=(count, 3))
    return radius * normal / np.linalg.norm(normal, axis=1, keepdims=True)


def box_mesh() -> Mesh:
    corners = np.array(
        [[x, y, z] for x in (-0.5, 0.5) for y in (-0.3, 0.3) for z in (-0.2, 0.2)], dtype=np.float32
    )
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [face for a, b, c, d in quads for face in ((a, b, c), (a, c, d))]
    return Mesh(corners, np.array(faces, dtype=np.int64))


def box_samples(count: int) -> NDArray[np.float32]:
    from ifdefense.geometry.sampling import sample_surface

    return sample_surface(box_mesh(), count, generator=np.random.default_rng(0))[0]


def test_distance_equals_the_naive_one_up_to_the_limit() -> None:
    points = sphere(40)
    naive = np.linalg.norm(cell_centres()[:, None].astype(np.float64) - points[None], axis=-1).min(1)
    fast = distance_to_points(points, 0.07).ravel()
    np.testing.assert_allclose(fast, np.minimum(naive, 0.07), atol=1e-6)


def test_a_closed_cloud_becomes_a_solid() -> None:
    field = grid_from_cloud(sphere(1024, 0.45))
    radius = np.linalg.norm(cell_centres(), axis=1)
    inside = field.ravel() > 0
    # Rays slip through the holes of a random sampling: some cells of the inside are missed.
    assert inside[radius < 0.42].mean() > 0.88
    assert not inside[radius > 0.45 + OFFSET + 2 * CELL].any()


def test_an_open_sheet_stays_a_sheet() -> None:
    rng = np.random.default_rng(0)
    plate = np.stack([rng.uniform(-0.5, 0.5, 1024), rng.uniform(-0.5, 0.5, 1024), np.zeros(1024)], axis=1)
    field = grid_from_cloud(plate).ravel()
    x, y, z = np.abs(cell_centres()).T
    assert (field[(z < OFFSET - STEP) & (x < 0.45) & (y < 0.45)] > 0).mean() > 0.97
    assert not (field[z > OFFSET + CELL] > 0).any()


def test_space_between_legs_is_outside() -> None:
    rng = np.random.default_rng(0)
    feet = [(x, y) for x in (-0.4, 0.4) for y in (-0.4, 0.4)]
    legs = [np.c_[rng.normal(0, 0.01, (150, 2)) + foot, rng.uniform(-0.5, 0.4, 150)] for foot in feet]
    top = np.c_[rng.uniform(-0.5, 0.5, (424, 2)), np.full(424, 0.4)]
    cloud = np.concatenate([top, *legs])
    field = grid_from_cloud(cloud).ravel()
    x, y, z = cell_centres().T
    assert not (field[(np.abs(x) < 0.3) & (np.abs(y) < 0.3) & (z < 0.3)] > 0).any()


def test_a_network_sees_solids_better_than_planes_and_rays_do() -> None:
    network = load_network("local")
    seen, estimated = [], []
    for name in ("chair", "mug", "bottle", "table"):
        rng = np.random.default_rng(3)
        shape = make_shape(name, rng)
        cloud, truth = shape.sample_surface(1024, rng)[0], grid_from_shape(shape)
        seen.append(overlap(grids_from_network(network, [cloud])[0], truth))
        estimated.append(overlap(grid_from_cloud(cloud), truth))
    assert np.mean(seen) > 0.85
    assert np.mean(seen) > np.mean(estimated) + 0.05


def test_a_network_labels_a_batch_as_each_cloud_and_does_not_join_legs() -> None:
    network = load_network("local")
    rng = np.random.default_rng(0)
    feet = [(x, y) for x in (-0.4, 0.4) for y in (-0.4, 0.4)]
    legs = [np.c_[rng.normal(0, 0.01, (150, 2)) + foot, rng.uniform(-0.5, 0.4, 150)] for foot in feet]
    table = np.concatenate([np.c_[rng.uniform(-0.5, 0.5, (424, 2)), np.full(424, 0.4)], *legs])
    both = grids_from_network(network, [sphere(1024, 0.45), table])
    for grid, cloud in zip(both, (sphere(1024, 0.45), table), strict=True):
        np.testing.assert_array_equal(grid, grids_from_network(network, [cloud])[0])
    x, y, z = cell_centres().T
    assert not (both[1].ravel()[(np.abs(x) < 0.3) & (np.abs(y) < 0.3) & (z < 0.3)] > 0).any()
    assert (both[0].ravel()[np.linalg.norm(cell_centres(), axis=1) < 0.42] > 0).all()


def test_clouds_of_any_size_and_frame_become_a_set() -> None:
    clouds = [sphere(700) * 3 + 5, sphere(1024), sphere(5000)]
    data = solids_from_clouds(clouds, "balls", "estimated", seed=1)
    assert data.points.shape == (3, POINTS, 3) and data.sources == ("balls",)
    np.testing.assert_allclose(np.linalg.norm(data.points.astype(np.float64), axis=2), 0.5, atol=0.02)
    assert len(np.unique(data.points[0], axis=0)) == 700
    assert len(np.unique(data.points[2], axis=0)) == POINTS


def test_a_folder_of_clouds(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for index in range(12):
        np.save(tmp_path / f"{index:02}.npy", sphere(100) + index)
    np.save(tmp_path / "more" / "batch.npy", np.stack([sphere(80)] * 8))
    (tmp_path / ".hidden.npy").write_bytes(b"no cloud")
    (tmp_path / "notes.md").write_text("no cloud")
    found = read_folder(tmp_path)
    assert [len(cloud) for cloud in found] == [100] * 12 + [80] * 8
    np.testing.assert_allclose(found[7], sphere(100) + 7, atol=1e-5)
    np.save(tmp_path / "few.npy", sphere(10))
    with pytest.raises(DataError, match=r"few\.npy: cloud 0 has 10 points; at least 64 are needed"):
        read_folder(tmp_path)
    np.save(tmp_path / "few.npy", np.ones((70, 3)))
    with pytest.raises(DataError, match=r"few\.npy: all points of cloud 0 are equal"):
        read_folder(tmp_path)
    with pytest.raises(DataError, match="8 clouds in 1 files; at least 20 are needed"):
        read_folder(tmp_path / "more")


def test_shape_field_is_exact_near_the_surface() -> None:
    shape = make_shape("mug", np.random.default_rng(0))
    sdf = np.asarray(shape.sdf(cell_centres()))
    near = np.abs(sdf) < 0.1
    stored = grid_from_shape(shape).ravel() * STEP
    np.testing.assert_allclose(stored[near], OFFSET - sdf[near], atol=0.51 * STEP)


def test_mesh_field_of_a_box_and_of_a_box_turned_inside_out() -> None:
    pytest.importorskip("point_cloud_utils", reason="winding numbers come with the extra `train`")
    points = box_samples(30_000)
    field = grid_from_mesh(box_mesh(), points)
    assert field is not None
    outside = np.maximum(np.abs(cell_centres()) - [0.5, 0.3, 0.2], 0)
    distance = np.linalg.norm(outside, axis=1)
    assert (field.ravel()[distance == 0] > 0).all()
    assert not (field.ravel()[distance > OFFSET + CELL / 2] > 0).any()
    mesh = box_mesh()
    faces = mesh.faces.copy()
    faces[:6] = faces[:6, ::-1]  # half of the triangles face inwards
    assert grid_from_mesh(Mesh(mesh.vertices, faces), points) is None


def test_interpolation_is_exact_for_a_linear_field() -> None:
    centres = cell_centres().reshape(RESOLUTION, RESOLUTION, RESOLUTION, 3)
    linear = np.rint((centres @ np.array([40.0, -20.0, 60.0])) / 1.0)
    fields = torch.from_numpy(np.stack([np.zeros_like(linear), linear]).astype(np.int8))
    queries = torch.from_numpy(cell_centres()[::997]).view(1, -1, 3)
    values = interpolate(fields, torch.tensor([1]), queries)
    torch.testing.assert_close(values[0], torch.from_numpy(linear.ravel()[::997]).float(), rtol=0, atol=0.2)
    midway = (queries[:, :1] + queries[:, 1:2]) / 2
    assert interpolate(fields, torch.tensor([0]), midway).abs().max() < 1e-3
    far = interpolate(fields, torch.tensor([1]), torch.full((1, 1, 3), 0.9))
    assert far.item() == -127


def test_sets_join_and_survive_the_disk(tmp_path: Path) -> None:
    def one(name: str, count: int) -> OccupancySet:
        rng = np.random.default_rng(count)
        return OccupancySet(
            rng.normal(size=(count, 5, 3)).astype(np.float16),
            rng.integers(-127, 127, (count, 4, 4, 4)).astype(np.int8),
            np.zeros(count, dtype=np.int64),
            (name,),
        )

    whole = concatenate([one("a", 2), one("b", 3)])
    assert whole.source.tolist() == [0, 0, 1, 1, 1] and whole.sources == ("a", "b")
    whole.save(tmp_path / "set")
    back = OccupancySet.load(tmp_path / "set")
    assert back.sources == whole.sources and len(back) == 5
    np.testing.assert_array_equal(back.grids, whole.grids)
    np.testing.assert_array_equal(back.points, whole.points)
