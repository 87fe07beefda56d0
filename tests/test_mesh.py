"""Meshes against closed forms: a cube, a tetrahedron, an octahedral sphere."""

from __future__ import annotations

import numpy as np
import pytest

from ifdefense.geometry.mesh import Mesh, normalised

CORNERS = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], np.float32)
CUBE_FACES = np.array(
    [
        [0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5],  # x = 0, x = 1
        [0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6],  # y = 0, y = 1
        [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3],  # z = 0, z = 1
    ]
)  # fmt: skip


@pytest.fixture
def cube() -> Mesh:
    return Mesh(CORNERS, CUBE_FACES)


def test_cube_has_its_closed_form_measures(cube: Mesh) -> None:
    assert cube.is_watertight
    assert not cube.is_empty
    assert cube.area == pytest.approx(6.0)
    assert cube.volume == pytest.approx(1.0)
    assert np.allclose(cube.face_areas(), 0.5)
    assert len(cube.edges()) == 18  # Euler: V - E + F = 2
    assert repr(cube) == "Mesh(vertices=8, faces=12)"


def test_normals_point_outwards(cube: Mesh) -> None:
    centres = cube.triangles().mean(axis=1) - 0.5
    assert np.array_equal(cube.face_normals(), np.sign(np.where(np.abs(centres) == 0.5, centres, 0)))
    outwards = normalised(CORNERS.astype(np.float64) - 0.5)
    assert (np.einsum("ij,ij->i", cube.vertex_normals(), outwards) > 0.8).all()


def test_edges_are_those_of_the_faces(cube: Mesh) -> None:
    naive = {tuple(sorted((int(f[i]), int(f[i - 1])))) for f in CUBE_FACES for i in range(3)}
    assert {tuple(map(int, edge)) for edge in cube.edges()} == naive


@pytest.mark.parametrize("broken", ["hole", "flipped", "doubled"])
def test_a_broken_cube_is_not_watertight(cube: Mesh, broken: str) -> None:
    faces = {
        "hole": CUBE_FACES[1:],
        "flipped": np.concatenate([CUBE_FACES[:1, ::-1], CUBE_FACES[1:]]),
        "doubled": np.concatenate([CUBE_FACES, CUBE_FACES[:1]]),
    }[broken]
    assert not Mesh(cube.vertices, faces).is_watertight


def test_turning_the_faces_turns_volume_and_normals(cube: Mesh) -> None:
    inside_out = Mesh(cube.vertices, cube.faces[:, ::-1])
    assert inside_out.volume == pytest.approx(-1.0)
    assert inside_out.is_watertight
    assert np.array_equal(inside_out.face_normals(), -cube.face_normals())


def test_volume_does_not_depend_on_the_origin(cube: Mesh) -> None:
    assert cube.transformed(2.0, [5.0, -3.0, 8.0]).volume == pytest.approx(8.0)


def test_transformed_scales_then_shifts(cube: Mesh) -> None:
    moved = cube.transformed(0.5, [1.0, 2.0, 3.0])
    assert np.array_equal(moved.vertices, CORNERS * 0.5 + np.array([1, 2, 3], np.float32))
    assert np.array_equal(cube.vertices, CORNERS)
    with pytest.raises(ValueError, match="positive factor, got -1"):
        cube.transformed(-1.0, [0, 0, 0])


def test_arrays_are_copied_and_read_only() -> None:
    vertices, faces = CORNERS.copy(), CUBE_FACES.copy()
    mesh = Mesh(vertices, faces)
    vertices[:] = 7
    faces[:] = 0
    assert np.array_equal(mesh.vertices, CORNERS)
    assert np.array_equal(mesh.faces, CUBE_FACES)
    with pytest.raises(ValueError, match="read-only"):
        mesh.vertices[0, 0] = 1.0


def test_empty_mesh() -> None:
    empty = Mesh.empty()
    assert empty.is_empty
    assert not empty.is_watertight
    assert empty.area == 0
    assert empty.volume == 0
    assert empty.edges().shape == (0, 2)


def test_a_face_without_area_has_zero_normal() -> None:
    line = Mesh(np.array([[0, 0, 0], [1, 0, 0], [2, 0, 0]], np.float32), np.array([[0, 1, 2]]))
    assert np.array_equal(line.face_normals(), np.zeros((1, 3)))
    assert np.array_equal(line.vertex_normals(), np.zeros((3, 3)))


def test_to_trimesh_keeps_order_and_agrees(cube: Mesh) -> None:
    other = cube.to_trimesh()
    assert np.array_equal(other.vertices, CORNERS)
    assert np.array_equal(other.faces, CUBE_FACES)
    assert other.is_watertight
    assert other.volume == pytest.approx(cube.volume)
    assert np.allclose(other.face_normals, cube.face_normals())


@pytest.mark.parametrize(
    ("vertices", "faces", "message"),
    [
        (np.zeros((4, 2)), np.zeros((1, 3), int), r"vertices must have shape \(V, 3\), got \(4, 2\)"),
        (np.zeros((4, 3)), np.zeros((1, 4), int), r"faces must have shape \(F, 3\), got \(1, 4\)"),
        (np.array([[0, 0, 0], [0, np.nan, 0]]), np.zeros((0, 3), int), "vertex 1 is not finite"),
        (np.zeros((3, 3)), np.array([[0, 1, 2], [0, 1, 3]]), r"face 1 names a vertex outside 0\.\.2"),
        (np.zeros((3, 3)), np.array([[0, 1, -1]]), r"face 0 names a vertex outside 0\.\.2"),
    ],
)
def test_errors_say_what_is_wrong(vertices: np.ndarray, faces: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mesh(vertices, faces)
