"""Structures of PyTorch3D and trimesh: purified as what they were, with their attributes."""

from __future__ import annotations

import copy
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import stand_in_pytorch3d
import torch
import trimesh
from conftest import sample_box
from quick import Pooled
from torch import Tensor

import ifdefense
from ifdefense import Defended, Mesh, purify
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.structures.registry import LIBRARIES, adapter_of

ROOT = Path(__file__).parent.parent
SIZES = (200, 120)


@pytest.fixture(scope="module")
def structures() -> Iterator[ModuleType]:
    with stand_in_pytorch3d.pytorch3d_structures() as module:
        yield module


def box(size: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(sample_box((1, 0.7, 0.5), size, np.random.default_rng(seed)))


def clouds() -> list[Tensor]:
    return [box(size, seed) for seed, size in enumerate(SIZES)]


def numbers() -> list[Tensor]:
    """Features that name their points."""
    return [torch.arange(size, dtype=torch.float32)[:, None] for size in SIZES]


def cube(subdivided: bool = True) -> trimesh.Trimesh:
    mesh = trimesh.creation.box((1, 0.8, 0.6))
    return mesh.subdivide() if subdivided else mesh


def on_the_cube(points: Tensor) -> Tensor:
    """The largest coordinate in units of the half sides: 1 on the surface."""
    return (points.abs() / torch.tensor([0.5, 0.4, 0.3])).amax(1)


# PyTorch3D


def test_pointclouds_come_back_with_features_and_normals(structures: ModuleType) -> None:
    given = clouds()
    normals = [torch.nn.functional.normalize(cloud) for cloud in given]
    value = structures.Pointclouds(given, normals=normals, features=numbers())
    before = [cloud.clone() for cloud in given]
    clean = purify(value, "sor", num_points=100, seed=2)
    assert type(clean) is structures.Pointclouds and len(clean) == 2
    for i, expected in enumerate(purify(given, "sor", num_points=100, seed=2)):
        index = clean.features_list()[i][:, 0].long()
        assert torch.equal(clean.points_list()[i], expected) and torch.equal(expected, given[i][index])
        assert torch.equal(clean.normals_list()[i], normals[i][index])
        assert torch.equal(given[i], before[i])
    assert clean.points_padded().shape == (2, 100, 3)


def test_new_points_have_the_features_of_the_nearest(structures: ModuleType) -> None:
    (cloud, _), (feature, _) = clouds(), numbers()
    clean = purify(structures.Pointclouds([cloud], features=[feature]), "sor-smooth", 90)
    (points,), (found,) = clean.points_list(), clean.features_list()
    assert torch.equal(found[:, 0].long(), torch.cdist(points, cloud).argmin(1))
    assert clean.normals_list() is None


def test_padded_pointclouds_without_attributes_and_their_gradients(structures: ModuleType) -> None:
    points = torch.stack([box(80, 0), box(80, 1)]).double().requires_grad_()
    clean = ifdefense.load("sor")(structures.Pointclouds(points), 50)
    assert clean.features_list() is None and clean.points_padded().dtype == torch.float64
    clean.points_padded().sum().backward()
    assert points.grad is not None and points.grad.sum() == 3 * 100
    assert len(ifdefense.load("sor").trace(structures.Pointclouds(points))) == 2


def meshes(structures: ModuleType, **options: Any) -> Any:
    mesh = cube()
    verts, faces = torch.tensor(mesh.vertices).float(), torch.tensor(mesh.faces)
    return structures.Meshes([verts, verts * 2], [faces, faces], **options)


def test_meshes_become_clouds(structures: ModuleType) -> None:
    value = meshes(structures)
    value.textures = stand_in_pytorch3d.TexturesVertex(value.verts_list())  # of a vertex, its place
    clean = purify(value, "sor")
    assert type(clean) is structures.Pointclouds
    for scale, points, normals, features in zip(
        (1, 2), clean.points_list(), clean.normals_list(), clean.features_list(), strict=True
    ):
        assert points.shape == (1024, 3) and points.dtype == torch.float32
        torch.testing.assert_close(on_the_cube(points / scale), torch.ones(1024))
        torch.testing.assert_close(features, points)
        assert ((normals * points).sum(1) > 0.29 * scale).all()  # outward, along an axis
        torch.testing.assert_close(normals.abs().amax(1), torch.ones(1024))
    assert purify(meshes(structures), "sor").features_list() is None


def test_samples_of_a_mesh_depend_on_the_seed_alone(structures: ModuleType) -> None:
    value = meshes(structures)
    first, other = (purify(value, "sor", 1500, seed=seed).points_list() for seed in (1, 2))
    assert len(first[0]) == 1500 and not torch.equal(first[0], other[0])
    assert len(torch.unique(first[0], dim=0)) > 1300, "more are sampled where more are asked for"
    torch.testing.assert_close(first[0] * 2, first[1])  # alone or in a batch
    assert torch.equal(ifdefense.load("sor")(value, 1500, 1).points_list()[0], first[0])


def test_gradients_pass_to_the_vertices_of_a_mesh(structures: ModuleType) -> None:
    mesh = cube()
    verts = torch.tensor(mesh.vertices).float().requires_grad_()
    clean = purify(structures.Meshes([verts], [torch.tensor(mesh.faces)]), "sor", 64)
    clean.points_list()[0].sum().backward()
    assert verts.grad is not None
    torch.testing.assert_close(verts.grad.sum(0), torch.full((3,), 64.0))


def test_our_mesh_becomes_theirs(structures: ModuleType) -> None:
    mesh = Mesh(cube().vertices, cube().faces)
    theirs = mesh.to_pytorch3d()
    assert isinstance(theirs, structures.Meshes) and len(theirs) == 1
    assert torch.equal(theirs.verts_list()[0], torch.tensor(mesh.vertices).float())
    assert torch.equal(theirs.faces_list()[0], torch.tensor(mesh.faces))


def test_the_stand_in_has_the_names_of_the_real_classes() -> None:
    real = pytest.importorskip("pytorch3d.structures", reason="PyTorch3D is not installed")
    for cls in (stand_in_pytorch3d.Pointclouds, stand_in_pytorch3d.Meshes):
        theirs = getattr(real, cls.__name__)
        for name, method in vars(cls).items():
            if inspect.isfunction(method):
                known = inspect.signature(getattr(theirs, name)).parameters
                assert (
                    list(inspect.signature(method).parameters)
                    == list(known)[: len(known)][: len(inspect.signature(method).parameters)]
                ), name


# trimesh


def test_a_point_cloud_of_trimesh_keeps_its_attributes() -> None:
    points = box(200).numpy()
    colours = np.random.default_rng(0).integers(0, 255, (200, 4), dtype=np.uint8)
    value = trimesh.PointCloud(points, colors=colours, metadata={"name": "box", "parts": [1]})
    value.weights = np.arange(200.0)
    before = value.hash()
    clean = purify(value, "sor", 150, seed=3)
    assert type(clean) is trimesh.PointCloud and clean.vertices.shape == (150, 3)
    np.testing.assert_array_equal(clean.vertices, purify(np.asarray(value.vertices), "sor", 150, seed=3))
    index = clean.weights.astype(int)
    np.testing.assert_array_equal(clean.vertices, value.vertices[index])
    np.testing.assert_array_equal(clean.colors, colours[index])
    clean.metadata["parts"].append(2)
    assert value.metadata == {"name": "box", "parts": [1]} and value.hash() == before


def test_a_point_cloud_without_colours_gets_none() -> None:
    value = trimesh.PointCloud(box(100).numpy())
    before = value.hash()
    clean = ifdefense.load("sor-smooth")(value, 80)
    assert not np.size(clean.colors) and clean.vertices.shape == (80, 3) and value.hash() == before


def test_a_mesh_of_trimesh_becomes_a_cloud() -> None:
    mesh = cube()
    place = np.asarray(mesh.vertices)
    mesh.visual.vertex_colors = np.column_stack([((place + 0.5) * 200).round(), [255] * len(place)]).astype(
        np.uint8
    )
    mesh.vertex_attributes = {"place": place.astype(np.float32), "number": np.arange(len(place))}
    mesh.metadata["name"] = "cube"
    clean = purify(mesh, "sor")
    assert type(clean) is trimesh.PointCloud and clean.metadata["name"] == "cube"
    points = torch.from_numpy(np.array(clean.vertices))
    assert points.shape == (1024, 3)
    torch.testing.assert_close(on_the_cube(points), torch.ones(1024, dtype=torch.float64))
    found = clean.vertex_attributes["place"]
    np.testing.assert_allclose(found, points, atol=1e-6)
    assert found.dtype == np.float32
    assert (
        np.abs(clean.colors[:, :3] - (np.asarray(points) + 0.5) * 200).max() <= 1
        and (clean.colors[:, 3] == 255).all()
    )
    far = np.linalg.norm(place[clean.vertex_attributes["number"]] - points.numpy(), axis=1)
    assert clean.vertex_attributes["number"].dtype.kind == "i" and far.max() < 0.45


def test_colours_of_faces_and_textures() -> None:
    mesh = cube(subdivided=False)
    mesh.visual.face_colors = [[10 * i, 0, 0, 255] for i in range(12)]
    clean = purify(mesh, "sor", 300)
    side = {
        tuple(row)
        for row in np.column_stack([np.asarray(clean.vertices).round(9).max(1), clean.colors[:, 0]])
    }
    assert {colour for _, colour in side} <= set(range(0, 120, 10)) and len(side) > 6
    from PIL import Image

    texture = trimesh.visual.TextureVisuals(
        uv=np.zeros((len(mesh.vertices), 2)), image=Image.new("RGB", (2, 2), (200, 100, 50))
    )
    textured = trimesh.Trimesh(mesh.vertices, mesh.faces, visual=texture, process=False)
    assert (purify(textured, "sor", 64).colors == [200, 100, 50, 255]).all()
    assert not np.size(purify(cube(), "sor", 64).colors)


# Both


def flat(structures: ModuleType) -> Any:
    return structures.Meshes([torch.zeros(3, 3)], [torch.tensor([[0, 1, 2]])])


ERRORS: dict[str, tuple[Callable[[ModuleType], Any], type[Exception], str]] = {
    "few points": (lambda s: s.Pointclouds([box(50), box(9)]), ValueError, "cloud 1 has 9 distinct points"),
    "in a list": (
        lambda s: [box(50), s.Pointclouds([box(50), box(9)])],
        ValueError,
        "cloud 1, cloud 1 has 9 distinct",
    ),
    "no area": (flat, ValueError, "cloud 0 cannot be sampled: the mesh has no area"),
    "no clouds": (lambda s: s.Pointclouds([]), ValueError, "the batch has no clouds"),
    "no points": (lambda s: trimesh.PointCloud(None), ValueError, "the cloud has 0 distinct points"),
    "no faces": (lambda s: [trimesh.Trimesh()], ValueError, "cloud 0 cannot be sampled: the mesh is empty"),
    "scene": (
        lambda s: trimesh.Scene([cube()]),
        TypeError,
        r"the cloud is a Scene: expected a PointCloud or a Trimesh, such as scene.to_mesh\(\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_purified(name: str, structures: ModuleType) -> None:
    make, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        purify(make(structures), "sor")


def test_arguments_are_checked_for_meshes_too() -> None:
    with pytest.raises(ValueError, match="num_points must be at least 1"):
        purify(cube(), "sor", 0)
    with pytest.raises(ValueError, match="seed must be at least 0"):
        ifdefense.load("sor")(cube(), seed=-1)


def test_lists_may_mix_structures(structures: ModuleType) -> None:
    given = [structures.Pointclouds(clouds()), trimesh.PointCloud(box(60).numpy()), box(70), cube()]
    clean = purify(given, "sor", 40)
    assert [type(each) for each in clean] == [
        structures.Pointclouds,
        trimesh.PointCloud,
        Tensor,
        trimesh.PointCloud,
    ]
    assert len(clean[0]) == 2


def test_a_defended_classifier_takes_them(structures: ModuleType) -> None:
    network = Pooled().eval()
    given = clouds()
    defended = Defended(network, ifdefense.load("sor"), seed=1, normalise=True)
    expected = torch.stack(
        [network(to_unit_sphere(purify(cloud, "sor", seed=1))[None])[0] for cloud in given]
    )
    torch.testing.assert_close(defended(structures.Pointclouds(given)), expected)
    torch.testing.assert_close(defended([structures.Pointclouds(given), given[0]]), expected[[0, 1, 0]])
    torch.testing.assert_close(defended(trimesh.PointCloud(given[0].numpy())), expected[0])
    equal = Defended(network, ifdefense.load("sor"), num_points=64, seed=1)
    torch.testing.assert_close(
        equal(structures.Pointclouds(given)), torch.cat([equal(cloud[None]) for cloud in given])
    )
    assert equal(cube()).shape == (5,) and equal(meshes(structures)).shape == (2, 5)
    clean = equal.purified(structures.Pointclouds(given), 1)
    assert isinstance(clean, structures.Pointclouds)
    torch.testing.assert_close(equal.classified(clean), equal(structures.Pointclouds(given)))


def test_the_transform_takes_them(structures: ModuleType) -> None:
    pytest.importorskip("torch_geometric", reason="ifdefense.transforms needs PyTorch Geometric")
    from ifdefense.transforms import Purify

    value = structures.Pointclouds(clouds())
    clean = Purify("sor", 40)(value)
    assert isinstance(clean, structures.Pointclouds)
    assert torch.equal(clean.points_padded(), purify(copy.copy(value), "sor", 40).points_padded())
    assert isinstance(Purify("sor", 40)(cube()), trimesh.PointCloud)


def test_the_example_of_the_document_runs() -> None:
    text = (ROOT / "docs" / "integration.md").read_text(encoding="utf-8")
    (block,) = (each for each in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "trimesh" in each)
    space: dict[str, Any] = {}
    exec(block, space)
    assert space["clean"].vertices.shape == (256, 3)
    assert (space["clean"].colors == [200, 100, 50, 255]).all()


def test_libraries_are_not_imported_to_recognise_their_structures() -> None:
    code = (
        "import sys, numpy as np, ifdefense\n"
        "ifdefense.purify(np.random.default_rng(0).normal(size=(50, 3)), 'sor')\n"
        "print(*{'pytorch3d', 'trimesh', 'torch_geometric'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == ""
    assert adapter_of(np.zeros((20, 3))) is None and set(LIBRARIES) >= {"PyTorch3D", "trimesh"}
