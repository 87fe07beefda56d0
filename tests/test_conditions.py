"""Networks conditioned on voxels and on images, the renderer behind the images, and their training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, nn

from benchmarks.studies import conditions as bench
from ifdefense.checkpoints import save_safetensors
from ifdefense.cli import main
from ifdefense.geometry.mesh import Mesh
from ifdefense.implicit.base import Calibration, load_network
from ifdefense.reconstruction import examples, recipes
from ifdefense.reconstruction.conditions import (
    VOXEL_BOX,
    VOXELS,
    BasicBlock,
    ConditionConfig,
    ImageNetwork,
    Resnet18,
    VoxelNetwork,
    at_queries,
    voxel_centres,
    voxelise,
)
from ifdefense.reconstruction.examples import ImageSampler, PairSampler, QueryOptions, VoxelSampler
from ifdefense.reconstruction.rendering import AMBIENT, Camera, render
from ifdefense.shapes import procedural
from ifdefense.shapes.procedural import Shape, make_shape
from ifdefense.shapes.sdf import Part, Placed, RoundedBox, Solid
from ifdefense.training.data.solid_sources import solids_from_procedural

VOXEL = ConditionConfig(width=2, code=5, decoder=8, frequencies=1)
LOCAL = ConditionConfig(width=2, code=5, decoder=8, frequencies=1, local=3)
IMAGE = ConditionConfig(width=4, code=6, decoder=8)


def made(config: ConditionConfig, kind: Any = VoxelNetwork) -> Any:
    torch.manual_seed(0)
    network = kind(config)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return network.eval()


def given(network: Any, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (VOXELS,) * 3 if isinstance(network, VoxelNetwork) else (40, 40, 3)
    values = torch.rand(count, *shape, generator=generator)
    return (values > 0.6).float() if isinstance(network, VoxelNetwork) else values


def ball(radius: float = 0.3) -> Shape:
    """A ball in the unit cube's frame, which makes its diameter 1; ``radius`` does not matter."""
    return Shape("ball", 0, Solid([Part(Placed(RoundedBox((0, 0, 0), radius), np.zeros(3)))]))


NETWORKS = [(VOXEL, VoxelNetwork), (LOCAL, VoxelNetwork), (IMAGE, ImageNetwork)]


@pytest.mark.parametrize(("config", "kind"), NETWORKS)
@torch.no_grad()
def test_the_field_is_the_network_for_any_batch(config: ConditionConfig, kind: Any) -> None:
    network = made(config, kind)
    inputs = given(network, 3)
    points = torch.rand(20, 3, generator=torch.Generator().manual_seed(2)) * 1.2 - 0.6
    slow = network(inputs, points.expand(3, -1, -1))
    owner = torch.arange(60) // 20
    field = network.field(network.encode(list(inputs)))
    fast = field(points.repeat(3, 1), owner)
    assert slow.std() > 0.01 and (slow[0] - slow[1]).abs().max() > 1e-4
    torch.testing.assert_close(fast.view(3, 20), slow, rtol=1e-3, atol=1e-4)
    alone = network.field(network.encode([inputs[1]]))(points, owner[:20])
    assert torch.equal(alone, fast[20:40])


@pytest.mark.parametrize(("config", "kind"), NETWORKS)
def test_weights_carry_their_sizes(config: ConditionConfig, kind: Any, tmp_path: Path) -> None:
    network = made(config, kind)
    for name, metadata in (("a", {}), ("b", Calibration(box=1.3, points=None).metadata())):
        save_safetensors(network, tmp_path / f"{name}.safetensors", metadata)
        again: Any = load_network(tmp_path / f"{name}.safetensors")  # told by its tensors
        assert type(again) is kind and again.config == config
        assert again.calibration == Calibration(box=1.3 if metadata else 1.1, points=None)
        torch.testing.assert_close(again.state_dict(), network.state_dict(), rtol=1e-3, atol=1e-3)


def test_names_are_those_of_the_public_code() -> None:
    state = VoxelNetwork().state_dict()
    for name, shape in {
        "encoder.conv_in.weight": (32, 1, 3, 3, 3),
        "encoder.conv_0.weight": (64, 32, 3, 3, 3),
        "encoder.conv_3.weight": (512, 256, 3, 3, 3),
        "encoder.fc.weight": (256, 4096),
        "decoder.bn.conv_gamma.weight": (256, 256, 1),
    }.items():
        assert state[name].shape == shape, name
    assert len([name for name in state if name.startswith("encoder.")]) == 12
    assert not any("fc_z" in name for name in state)


def test_resnet_is_that_of_torchvision() -> None:
    network = Resnet18()
    state = network.state_dict()
    # 11,689,512 parameters with the last layer of 1,000 classes.
    assert sum(p.numel() for p in network.parameters()) + 512 * 1000 + 1000 == 11689512
    assert len(state) == 120
    for name, shape in {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_mean": (64,),
        "layer1.1.conv2.weight": (64, 64, 3, 3),
        "layer2.0.downsample.0.weight": (128, 64, 1, 1),
        "layer2.0.downsample.1.num_batches_tracked": (),
        "layer4.1.bn2.bias": (512,),
    }.items():
        assert state[name].shape == shape, name
    assert not any("layer1.0.downsample" in name for name in state)
    sizes: list[tuple[int, ...]] = []
    for module in (network.layer1, network.layer2, network.layer3, network.layer4):
        module.register_forward_hook(lambda *a: sizes.append(tuple(a[2].shape[1:])))
    assert network.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 512)
    assert sizes == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]
    assert ImageNetwork(ConditionConfig(width=64, code=512)).encoder.fc is None


def test_a_block_is_two_convolutions_and_a_shortcut() -> None:
    torch.manual_seed(0)
    block = BasicBlock(3, 5, 2).eval()
    x = torch.randn(2, 3, 8, 8)
    hidden = F.conv2d(x, block.conv1.weight, stride=2, padding=1) / (1 + 1e-5) ** 0.5
    hidden = F.conv2d(hidden.relu(), block.conv2.weight, padding=1) / (1 + 1e-5) ** 0.5
    assert block.downsample is not None
    short = F.conv2d(x, block.downsample[0].weight, stride=2) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(block(x), (hidden + short).relu())


def test_features_of_cells_are_interpolated_in_the_right_place() -> None:
    centres = voxel_centres()
    local = centres.permute(3, 0, 1, 2)[None]  # the feature of a cell is its centre
    points = (torch.rand(1, 50, 3, generator=torch.Generator().manual_seed(0)) - 0.5) * 0.9
    torch.testing.assert_close(at_queries(local, points), points, rtol=1e-4, atol=1e-5)


def test_voxels_of_a_ball() -> None:
    voxels = voxelise(ball().sdf)
    inside = voxel_centres().norm(dim=-1)
    half = VOXEL_BOX / VOXELS / 2
    assert voxels[inside < 0.5 + 0.9 * half].all()
    assert not voxels[inside > 0.5 + 1.1 * half].any()


def test_wrong_inputs_are_errors() -> None:
    with pytest.raises(ValueError, match=r"voxels must be \(B, 32, 32, 32\), got \(1, 16, 16, 16\)"):
        made(VOXEL).encode([torch.zeros(16, 16, 16)])
    with pytest.raises(ValueError, match=r"images must be \(B, H, W, 3\), got \(1, 3, 40, 40\)"):
        made(IMAGE, ImageNetwork).encode([torch.zeros(3, 40, 40)])
    with pytest.raises(ValueError, match="code of the network must be positive, got 0"):
        ConditionConfig(code=0)
    with pytest.raises(ValueError, match="local must be 0"):
        ImageNetwork(LOCAL)
    with pytest.raises(ValueError, match=r"not a VoxelNetwork: tensor 'encoder.conv_in.weight' is missing"):
        VoxelNetwork.of_weights({}, {})


def test_a_rendered_ball_has_the_depth_and_the_light_of_a_ball() -> None:
    camera = Camera(azimuth=40, elevation=20)
    seen = render(ball(), camera, 33)
    origin, ways = (part.astype(np.float64) for part in camera.rays(33))
    along = -ways @ origin
    missed = np.linalg.norm(origin + along[..., None] * ways, axis=-1)  # of the ray from the centre
    hit = missed < 0.495
    depth = along - np.sqrt(np.maximum(0.25 - missed**2, 0))
    # A ray that grazes the ball stops a tolerance in front of it, which is far along the ray.
    well = missed < 0.45
    np.testing.assert_allclose(seen.depth[well], depth[well], atol=5e-3)
    assert np.isfinite(seen.depth[hit]).all() and np.isinf(seen.depth[missed > 0.505]).all()
    assert (seen.image[missed > 0.505] == 0).all() and (seen.image[hit] >= AMBIENT - 1e-6).all()
    normals = (origin + depth[..., None] * ways) / 0.5
    light = np.array([0.8, 0.2, 0.55]) / np.linalg.norm([0.8, 0.2, 0.55])
    blue = AMBIENT + (1 - AMBIENT) * (normals @ camera.axes().T @ light).clip(0, 1)
    np.testing.assert_allclose(seen.image[well][:, 2], blue[well], atol=0.02)
    assert seen.image[16, 24, 2] > seen.image[16, 24, 0]  # lit blue on the right


class Mirrored(Shape):
    """A solid, mirrored along x."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.extent = shape, shape.extent

    def sdf(self, points: Any) -> Any:
        return self.shape.sdf(points * np.float32([-1, 1, 1]))


def test_a_mirrored_solid_gives_the_mirrored_image() -> None:
    shape = make_shape("chair", np.random.default_rng(3))
    image = render(shape, Camera(35, 20), 32).image
    mirrored = render(Mirrored(shape), Camera(-35, 20), 32).image
    differ = np.abs(image[:, ::-1, ::-1] - mirrored).max(-1)
    # Rounding decides on which side of an edge a normal is taken.
    assert (differ > 0.02).mean() < 0.05 and (differ > 0.3).mean() < 0.005
    assert np.abs(image[:, ::-1] - mirrored).max() > 0.1  # red and blue are exchanged
    assert (image.max(-1) > 0).mean() > 0.05


def test_cameras_look_where_they_say() -> None:
    np.testing.assert_allclose(Camera(0, 0).axes(), [[1, 0, 0], [0, 0, 1], [0, -1, 0]], atol=1e-12)
    np.testing.assert_allclose(Camera(90, 0).axes()[2], [1, 0, 0], atol=1e-12)
    axes = Camera(70, 33).axes()
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(axes) == pytest.approx(1)
    with pytest.raises(ValueError, match="within 89 degrees, got 90"):
        Camera(0, 90)
    with pytest.raises(ValueError, match=r"outside of the unit cube, got distance 0\.5"):
        Camera(distance=0.5)
    with pytest.raises(ValueError, match="from 0 to 180 degrees, got 180"):
        Camera(view=180)
    with pytest.raises(ValueError, match="at least one pixel, got a size of 0"):
        render(ball(), size=0)


@pytest.fixture(scope="module")
def solids() -> Any:
    return solids_from_procedural(1, 5)


def test_examples_agree_with_the_solids(solids: Any) -> None:
    shapes = [make_shape(name, np.random.default_rng([5, i, 0])) for i, name in enumerate(procedural.CLASSES)]
    options = QueryOptions(batch_size=6, queries=80)
    sampler = VoxelSampler(solids, options)
    exact = torch.stack([voxelise(shape.sdf) for shape in shapes])
    assert (exact == sampler.voxels).float().mean() > 0.995
    assert (exact & sampler.voxels).sum() / (exact | sampler.voxels).sum() > 0.97
    generator = torch.Generator().manual_seed(0)
    voxels, queries, labels = sampler.draw(generator)
    # Mirrored or not, a query deep inside lies in an occupied cell, one far outside in an empty one.
    cell = ((queries / VOXEL_BOX + 0.5) * VOXELS).floor().long().clamp(0, VOXELS - 1)
    found = voxels[torch.arange(6)[:, None], cell[..., 0], cell[..., 1], cell[..., 2]]
    assert ((found > 0) == labels).float().mean() > 0.9
    points, occupied, queries, labels = PairSampler(solids, options).draw(generator)
    assert points.shape == queries.shape == (6, 80, 3) and occupied.dtype == torch.float32
    assert 0.05 < occupied.mean() < 0.8
    index = torch.arange(16)
    places = (torch.rand(16, 3000, 3, generator=generator) - 0.5) * 1.1
    for offset in (0.0, 0.015, 0.03):
        thick = VoxelSampler(solids, QueryOptions(offset=offset)).inside(index, places)
        truth = torch.stack([shape.sdf(at) < offset for shape, at in zip(shapes, places, strict=True)])
        assert (thick & truth).sum() / (thick | truth).sum() > 0.93


def test_images_are_mirrored_with_their_solids(solids: Any) -> None:
    images = np.random.default_rng(0).integers(0, 256, (16, 2, 8, 8, 3)).astype(np.uint8)
    sampler = ImageSampler(solids, QueryOptions(batch_size=4), images)
    index, sign = torch.arange(4), torch.ones(4, 3)
    (plain,) = sampler.given(index, sign, torch.Generator().manual_seed(1))
    sign[::2, 0] = -1
    (turned,) = sampler.given(index, sign, torch.Generator().manual_seed(1))
    assert torch.equal(turned[1::2], plain[1::2])
    assert torch.equal(turned[::2], plain[::2].flip(2, 3))
    batch = sampler.validation()["iou"]
    assert len(batch) == 1 and batch[0][1].shape == (16, 2048, 3)


@pytest.mark.parametrize("kind", ["generative", "voxel", "image"])
def test_the_commands_train_resume_and_export(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (examples, recipes):
        monkeypatch.setattr(module, "HELD_PER_CLASS", 1)
    for module in (examples, recipes, procedural):
        monkeypatch.setattr(module, "CLASSES", ("bottle", "table"))
    widths = {"generative": "3 6 8", "voxel": "2 5 8", "image": "4 5 8"}[kind].split()
    line = ["train", kind, "--run", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    line += [
        "--per-class",
        "1",
        "--batch-size",
        "2",
        "--queries",
        "32",
        "--every",
        "2",
        "--widths",
        *widths,
        "--no-progress",
    ]
    line += ["--size", "32", "--views", "1"] if kind == "image" else []
    first = CliRunner().invoke(main, [*line, "--steps", "2"])
    assert first.exit_code == 0, first.output
    weights = tmp_path / "net.safetensors"
    second = CliRunner().invoke(main, [*line, "--steps", "4", "--out", str(weights)])
    assert second.exit_code == 0, second.output
    assert "validation IoU: 0." in second.output
    network: Any = load_network(weights)
    assert type(network).__name__.lower().startswith(kind)
    assert network.calibration == Calibration(1.1, 0.5, 0.2, 0.03 if kind == "generative" else 0.015, None)
    card = weights.with_suffix(".md").read_text()
    assert "2 procedural solids of 2 classes" in card and "of 4, chosen by validation" in card


def test_parts_of_meshes() -> None:
    sheet = Mesh(np.eye(3, dtype=np.float32), np.array([[0, 1, 2]]))
    two = Mesh(np.concatenate([np.eye(3), np.eye(3) + 1, np.zeros((1, 3))]), np.array([[0, 1, 2], [3, 4, 5]]))
    assert [bench.parts(mesh) for mesh in (Mesh.empty(), sheet, two)] == [0, 1, 2]


@torch.no_grad()
def test_measurement_of_exact_fields() -> None:
    class Exact:
        """Knows the solid."""

        calibration = Calibration(1.1, 0.5, 0.2, 0.015, None)
        decoder = None

        def encode(self, voxels: Any) -> Any:
            return voxels[0]

        def field(self, code: Tensor) -> Any:
            assert code.shape == (VOXELS,) * 3
            return lambda points, cloud: 50 * (self.calibration.offset + 0.5 - points.norm(dim=-1))

    means, by_class = bench.figures("voxel", Exact(), [ball()], 512, 0)
    assert means["iou"] == 1 and means["missing"] == 0 and by_class == {procedural.CLASSES[0]: 1}
    assert 0.05 < means["chamfer"] < 0.4 and means["normals"] > 0.98  # the floor of so few samples


def test_prior_counts_parts_and_empty_meshes() -> None:
    class Balls:
        """One ball for a positive latent, two for a negative one, none for a large one."""

        calibration = Calibration(1.1, 0.5, None, 0.0, None)

        def latents(self, count: int, seed: int) -> Tensor:
            assert (count, seed) == (6, 7)
            return torch.tensor([[0.5], [-0.5], [0.4], [9.0], [0.5], [9.0]])

        def decode(self, latent: Tensor) -> Any:
            def field(points: Tensor, cloud: Tensor) -> Tensor:
                value = latent[cloud, 0]
                apart = torch.where(value < 0, 0.3, 0.0)[:, None] * torch.eye(3)[0]
                near = torch.minimum((points - apart).norm(dim=-1), (points + apart).norm(dim=-1))
                return torch.where(value > 5, -1.0, 100 * (0.2 - near))

            return field

    found = bench.prior(Balls(), 4, 1, 3, 7)  # type: ignore[arg-type]
    assert found["closed"] == 0.5 and found["parts"] == {"0": 1, "1": 2, "2": 1}
    assert found["interpolated"] == 3 and found["empty"] == 1
    row = {"iou": 0.9, "chamfer": 0.1, "normals": 0.95, "parameters": 2_500_000}
    result = {"rows": {"voxel": row}, "solids": 64, "samples": 512, "date": "2026-01-01", "prior": found}
    text = bench.table(result)
    assert "| 32³ voxels | 2.50 | 0.900 | 0.100 | 0.950 |" in text
    assert "50.0% of 4 samples" in text and "1 of 3 interpolated meshes are empty" in text
