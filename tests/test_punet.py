"""PU-Net: against a naive twin, public weights, training; purifiers of networks that map clouds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import sample_box
from torch import Tensor, nn

import ifdefense
from ifdefense import Purifier, purify
from ifdefense.checkpoints import CheckpointError, save_safetensors
from ifdefense.geometry.points import (
    ball_query,
    chamfer_distance,
    farthest_point_sampling,
    gather,
    group,
    three_interpolate,
)
from ifdefense.implicit.base import load_network
from ifdefense.point_networks.autoencoder import AutoEncoder
from ifdefense.point_networks.base import PointNetwork
from ifdefense.point_networks.punet import NEIGHBOURS, RADII, PUNet
from ifdefense.purifiers.mapped import MappedPurifier
from ifdefense.purifiers.pretrained import dup_net
from ifdefense.purifiers.specs import rebuild
from ifdefense.restorers.optimised import Repulsion
from ifdefense.training.data.surfaces import DenseSurfaces, from_procedural
from ifdefense.training.examples.upsampling import UpsamplingSampler
from ifdefense.training.recipes import punet as train
from ifdefense.training.recipes.punet import (
    PUNetOptions,
    PUNetRun,
    repulsion,
    spacing,
    start_at_the_input,
    upsampling_loss,
)

SIDES = (1.0, 0.6, 0.4)


def reference(name: str) -> Path:
    """A file beside the data; the test skips where it is not."""
    root = os.environ.get("IFDEFENSE_DATA")
    if not root:
        pytest.skip("IFDEFENSE_DATA is not set: this test reads the reference files beside it")
    path = Path(root).parent / "reference" / name
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    return path


def sphere(count: int, seed: int = 0) -> Tensor:
    """Points ``(1, count, 3)`` on the sphere of radius 0.5."""
    points = torch.randn(1, count, 3, generator=torch.Generator().manual_seed(seed))
    return points / points.norm(dim=-1, keepdim=True) / 2


def box(count: int, seed: int = 1) -> Tensor:
    """Points ``(1, count, 3)`` on a box."""
    return torch.from_numpy(sample_box(SIDES, count, np.random.default_rng(seed)))[None]


def off_sphere(points: Tensor) -> Tensor:
    return (points.norm(dim=-1) - 0.5).abs()


def off_box(points: Tensor) -> Tensor:
    beyond = points.abs() - torch.tensor(SIDES) / 2
    return (beyond.clamp_min(0).norm(dim=-1) + beyond.amax(-1).clamp_max(0)).abs()


def twin(network: PUNet, points: Tensor) -> Tensor:
    """PU-Net as it is written down: padded groups and convolutions of all of their points."""

    def applied(layers: nn.Module, x: Tensor) -> Tensor:
        for layer in layers.values():  # type: ignore[operator]
            x = layer["conv"](x).relu()
        return x

    size = points.shape[1]
    points = gather(points, farthest_point_sampling(points, size))
    level, features = points, None
    found = [points.transpose(1, 2)[..., None]]
    for depth, module in enumerate(network.SA_modules):
        centre = gather(level, farthest_point_sampling(level, max(1, size >> depth)))
        index = ball_query(centre, level, RADII[depth], NEIGHBOURS)
        grouped = group(level, features, centre, index).permute(0, 3, 1, 2)
        features = applied(module["mlps"][0], grouped).amax(3).transpose(1, 2)  # type: ignore[index]
        level = centre
        if depth == 0:
            found.append(features.transpose(1, 2)[..., None])
        else:
            up = three_interpolate(points, level, features).transpose(1, 2)[..., None]
            found.append(applied(network.FP_Modules[depth - 1]["mlp"], up))  # type: ignore[index]
    joined = torch.cat(found, 1)
    expanded = torch.cat([applied(branch, joined) for branch in network.FC_Modules], 2)
    last = network.pcd_layer[1]["layer0"]["conv"]  # type: ignore[index]
    return last(applied(network.pcd_layer[0], expanded))[..., 0].transpose(1, 2)


@pytest.fixture(scope="module")
def network() -> PUNet:
    torch.manual_seed(0)
    return PUNet().double().eval()


@pytest.mark.parametrize("size", [1, 2, 7, 200])
def test_it_equals_its_naive_twin(network: PUNet, size: int) -> None:
    points = 2 * sphere(size).double()
    result = network(points)
    assert result.shape == (1, 4 * size, 3)
    torch.testing.assert_close(result, twin(network, points))


def test_gradients_equal_those_of_its_naive_twin(network: PUNet) -> None:
    points = (2 * sphere(60)).double().requires_grad_()
    (found,) = torch.autograd.grad(network(points).square().sum(), points)
    (expected,) = torch.autograd.grad(twin(network, points).square().sum(), points)
    # Weights of the interpolation are held fixed.
    torch.testing.assert_close(found, expected)


def test_clouds_of_a_batch_do_not_see_each_other(network: PUNet) -> None:
    points = torch.cat([2 * sphere(50), 2 * sphere(50, 1)]).double()
    together = network(points)
    apart = torch.cat([network(part) for part in points.split(1)])
    torch.testing.assert_close(together, apart)


def test_tensors_are_those_of_the_public_checkpoint() -> None:
    shapes = json.loads(reference("punet_x4.json").read_text())["tensors"]
    own = {name: list(value.shape) for name, value in PUNet().state_dict().items()}
    assert own == shapes
    public = torch.load(reference("punet_x4.pth"), map_location="cpu", weights_only=True)
    loaded = PUNet.load(reference("punet_x4.pth")).state_dict()
    assert loaded.keys() == public.keys()
    assert all(torch.equal(value, public[name]) for name, value in loaded.items())


def test_misfits_are_named(tmp_path: Path) -> None:
    save_safetensors(AutoEncoder(8, 20), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit PUNet: .* tensors differ"):
        PUNet.load(tmp_path / "a.safetensors")
    save_safetensors(PUNet(), tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit AutoEncoder: .*tensors differ"):
        AutoEncoder.load(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="no weights named 'none' are shipped"):
        PUNet.load("none")


def upsampled(weights: str | Path, points: Tensor) -> Tensor:
    """All 4,096 points, in the frame of the input."""
    return MappedPurifier(PUNet.load(weights))(points, 4096)


def jittered(points: Tensor) -> Tensor:
    """As many points as PU-Net makes, by noise that hardly leaves its allowance of 0.02."""
    noise = torch.randn(4, *points.shape[1:], generator=torch.Generator().manual_seed(5))
    return (points + 0.005 * noise).flatten(0, 1)[None]


def test_public_weights_upsample_a_sphere_and_a_box() -> None:
    path = reference("punet_x4.pth")
    for points, off in ((sphere(1024), off_sphere), (box(1024), off_box)):
        found = upsampled(path, points)
        assert found.shape == (1, 4096, 3)
        # Their errors are what they are: 0.008 and 0.010 in the mean, 0.042 at most.
        assert off(found).mean() < 0.02 and off(found).max() < 0.05
        assert spacing(found) > 1.4 * spacing(jittered(points))


def test_shipped_weights_stay_on_a_sphere_and_a_box_and_are_even() -> None:
    for points, off in ((sphere(1024), off_sphere), (box(1024), off_box)):
        found = upsampled("punet", points)
        assert off(found).mean() < 0.01 and off(found).max() < 0.03
        assert spacing(found) > 1.4 * spacing(jittered(points))


# The purifier


class Doubled(PointNetwork):
    """Every point twice, the second time on the other side."""

    points = 100

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(-1.0))

    @classmethod
    def of_state(cls, state: object) -> Doubled:
        return cls()

    def forward(self, points: Tensor) -> Tensor:
        assert points.shape[1] <= 100
        norm = points.norm(dim=-1).amax(1)
        torch.testing.assert_close(norm, torch.ones_like(norm))
        assert points.mean(1).abs().max() < 1e-5
        return torch.cat([points, points * self.factor], 1)


@pytest.mark.parametrize("sampling", ["farthest", "random"])
@pytest.mark.parametrize("count", [1, 60, 200, 450])
def test_a_network_sees_the_unit_sphere_and_any_number_of_points_comes_back(
    sampling: str, count: int
) -> None:
    points = 3 * sphere(300) + 7
    purifier = MappedPurifier(Doubled().requires_grad_(False), sampling=sampling)  # type: ignore[arg-type]
    found = purifier(points, count)
    assert found.shape == (1, count, 3)
    assert len(torch.unique(found[0], dim=0)) == min(count, 200)
    assert ((found - 7).norm(dim=-1) - 1.5).abs().max() < 0.6  # the mean of the points is not the centre


def test_the_farthest_points_are_more_even_than_random_ones() -> None:
    points = sphere(90)
    even, some = (
        MappedPurifier(Doubled().requires_grad_(False), sampling=kind)(points, 60)
        for kind in ("farthest", "random")
    )
    assert spacing(even) > 1.3 * spacing(some)


def test_gradients_pass_the_purifier() -> None:
    points = sphere(80).double().requires_grad_()
    purifier = MappedPurifier(Doubled().requires_grad_(False), sampling="random")
    found = purifier(points, 160, seed=2)
    (slope,) = torch.autograd.grad(found[0].square().sum(), points)
    assert torch.isfinite(slope).all() and (slope.norm(dim=-1) > 0).all()
    assert not purifier(points.detach(), 160).requires_grad


def test_unknown_sampling_is_named() -> None:
    with pytest.raises(ValueError, match="sampling must be one of farthest, random, got 'nearest'"):
        MappedPurifier(Doubled().requires_grad_(False), sampling="nearest")  # type: ignore[arg-type]


def test_dup_net_takes_own_weights_and_is_rebuilt(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = PUNet()
    start_at_the_input(network, share=0.0)
    save_safetensors(network, tmp_path / "own.safetensors")
    purifier = dup_net(tmp_path / "own.safetensors")
    points = sphere(300) * 4 + 1
    found = purifier(points, 200, seed=3)
    spec = json.loads(json.dumps(purifier.spec()))
    assert torch.equal(rebuild(spec)(points, 200, seed=3), found)
    nn.init.ones_(network.pcd_layer[1]["layer0"]["conv"].bias)  # type: ignore[index]
    save_safetensors(network, tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match="are not those that are described"):
        rebuild(spec)


def test_the_auto_encoder_rebuilds_a_chair_and_drops_what_is_no_chair() -> None:
    from ifdefense.shapes.procedural import make_shape

    rng = np.random.default_rng(0)
    chair = make_shape("chair", rng).sample_surface(1024, rng)[0].astype(np.float32)
    found = purify(chair, "sor-ae")
    assert found.shape == chair.shape
    own = torch.from_numpy(np.stack([chair, found]))
    assert float(chamfer_distance(own[:1], own[1:], squared=False)) / 2 < 0.05
    attacked = np.concatenate([chair, rng.uniform(-0.5, 0.5, (60, 3)).astype(np.float32)])
    cleaned = torch.from_numpy(np.asarray(purify(attacked, "sor-ae", num_points=1024)))
    assert float(chamfer_distance(cleaned[None], own[1:], squared=False)) / 2 < 0.03
    assert isinstance(ifdefense.load("sor-ae"), Purifier)


# Training


def test_a_network_starts_at_its_input() -> None:
    torch.manual_seed(0)
    network = PUNet()
    start_at_the_input(network, share=0.0)
    points = 2 * sphere(64)
    order = farthest_point_sampling(points, 64)
    torch.testing.assert_close(network(points), gather(points, order).repeat(1, 4, 1))


def test_repulsion_is_that_of_the_restorer() -> None:
    points = (0.2 * sphere(40)).double().requires_grad_()
    options = Repulsion()
    (slope,) = torch.autograd.grad(repulsion(points, options) * 40, points)
    near = options.near(points.detach()[0], [40])
    torch.testing.assert_close(slope[0], options.gradient(points.detach()[0], near))


def test_the_loss_is_reconstruction_and_repulsion() -> None:
    points, target = sphere(40).expand(2, -1, -1), torch.cat([sphere(60, 1), box(60)])
    expected = 100 * chamfer_distance(points, target).mean()
    torch.testing.assert_close(upsampling_loss(points, target, 0.0), expected)
    torch.testing.assert_close(upsampling_loss(points, target, 2.0), expected + 2 * repulsion(points))


def test_spacing_of_a_grid_is_its_step() -> None:
    grid = torch.cartesian_prod(*[torch.arange(4) * 0.25] * 3)[None]
    torch.testing.assert_close(spacing(grid), torch.tensor([0.25]))


TINY = PUNetOptions(steps=6, batch_size=2, points=32)


@pytest.fixture(scope="module")
def surfaces() -> DenseSurfaces:
    return from_procedural(per_class=5, samples=400)


def run(folder: Path, surfaces: DenseSurfaces, options: PUNetOptions = TINY) -> PUNetRun:
    torch.manual_seed(0)
    model = PUNet()
    start_at_the_input(model)
    examples = UpsamplingSampler({"procedural": surfaces}, options, {"procedural": 1.0})
    return PUNetRun(model, examples, options, 3, folder)


def test_examples_are_a_noisy_part_and_an_even_one(surfaces: DenseSurfaces) -> None:
    examples = UpsamplingSampler({"procedural": surfaces}, TINY, {"procedural": 1.0})
    points, target = examples.draw(torch.Generator().manual_seed(0))
    again, _ = examples.draw(torch.Generator().manual_seed(0))
    assert torch.equal(points, again)
    assert points.shape == (2, 32, 3) and target.shape == (2, 128, 3)
    torch.testing.assert_close(points.norm(dim=-1).amax(1), torch.ones(2))
    assert points.mean(1).abs().max() < 1e-6
    assert (chamfer_distance(points, target, squared=False) < 0.8).all()
    (clean, _), *_ = examples.validation(2)
    assert torch.equal(clean, examples.validation(2)[0].points)
    with pytest.raises(ValueError, match="procedural has 400 samples per surface, too few"):
        UpsamplingSampler({"procedural": surfaces}, PUNetOptions(), {"procedural": 1.0})
    with pytest.raises(ValueError, match="the mix names"):
        UpsamplingSampler({"procedural": surfaces}, TINY, {"meshes": 1.0})


def test_training_learns_and_resumes_bit_for_bit(tmp_path: Path, surfaces: DenseSurfaces) -> None:
    whole = run(tmp_path / "whole", surfaces)
    before = whole._validate()["objective"]
    best = whole()
    assert best["objective"] < before
    part = run(tmp_path / "parts", surfaces)
    part(stop_after=3)
    resumed = run(tmp_path / "parts", surfaces)
    assert resumed.resume() and resumed.position == 3
    assert resumed() == best
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_the_command_trains_and_exports_with_a_card(
    tmp_path: Path, surfaces: DenseSurfaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "collect", lambda *arguments: surfaces)
    monkeypatch.setattr(train, "PUNetOptions", lambda **settings: PUNetOptions(points=32, **settings))
    out = tmp_path / "punet.safetensors"
    args = ["--steps", "2", "--batch-size", "2", "--every", "1", "--run", str(tmp_path / "run")]
    outcome = CliRunner().invoke(train.train_command, [*args, "--out", str(out)])
    assert outcome.exit_code == 0, outcome.output
    assert PUNet.load(out)(2 * sphere(30)).shape == (1, 120, 3)
    with pytest.raises(ValueError, match="unknown network 'punet'"):
        load_network(out)
    text = out.with_suffix(".md").read_text()
    assert "procedural (weight 1" in text and "of that of farthest-point samples" in text
    outcome = CliRunner().invoke(train.train_command, [*args, "--out", str(out)])
    assert outcome.exit_code == 1 and "--force replaces it" in outcome.output
