"""Contract of implicit networks: gradients, folding, batches, names, stored calibration."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ifdefense.checkpoints import CheckpointError, save_safetensors
from ifdefense.implicit.base import NETWORKS, Calibration, load_network
from ifdefense.implicit.convolutional import (
    ConvolutionalConfig,
    ConvolutionalNetwork,
    PlaneDecoder,
    PlaneEncoder,
)
from ifdefense.implicit.local import LocalConfig, LocalOccupancyNetwork
from ifdefense.implicit.occupancy import OccupancyConfig, OccupancyNetwork
from ifdefense.reconstruction.generative import GenerativeConfig, GenerativeOccupancyNetwork

SMALL = LocalConfig(
    width=8, coarse=8, values=6, heads=2, hidden=8, neighbours=5, moments=9, nearest=4, blocks=1
)


def made(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "local":
        network: Any = LocalOccupancyNetwork(SMALL)
    elif kind == "convolutional":
        network = ConvolutionalNetwork(ConvolutionalConfig(8, 6, 5, 3, 8, 12), Calibration(points=30))
    elif kind == "generative":
        network = GenerativeOccupancyNetwork(GenerativeConfig(8, 7, 8, 2, 5, 6), Calibration(points=40))
    else:
        network = OccupancyNetwork(OccupancyConfig(8, 8, 8, 2), Calibration(points=20))
    for parameter in network.parameters():  # large enough to see, statistics that are not those of the start
        nn.init.normal_(parameter, std=0.3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return network.eval()


@pytest.fixture(params=["convolutional", "generative", "local", "occupancy"])
def network(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


def clouds(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(size, 3, generator=generator) - 0.5 for size in sizes]


def queries(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    points = torch.rand(count, 3, generator=generator) - 0.5
    return points, torch.randint(0, 3, (count,), generator=generator).sort().values


def test_the_field_is_the_network(network: Any) -> None:
    given = clouds(40, 40, 40)
    points, _ = queries(30)
    batch = torch.stack(given)
    repeated = points[None].expand(3, -1, -1)
    if isinstance(network, GenerativeOccupancyNetwork):
        slow = network.decoder(repeated, network.encoder(batch), torch.zeros(3, 5))  # type: ignore[misc]
    else:
        slow = network(batch, repeated)
    whole = not isinstance(network, GenerativeOccupancyNetwork | LocalOccupancyNetwork)
    field = network.field(network.codes(batch) if whole else network.encode(given))
    with torch.no_grad():
        fast = field(points.repeat(3, 1), torch.arange(3).repeat_interleave(30)).view(3, 30)
    assert slow.std() > 0.01
    torch.testing.assert_close(fast, slow.detach(), rtol=1e-4, atol=1e-5)


def test_a_query_does_not_depend_on_its_batch(network: Any) -> None:
    given = clouds(40, 23, 31)
    points, owner = queries(60)
    with torch.no_grad():
        together = network.field(network.encode(given, 5))(points, owner)
        for index, cloud in enumerate(given):
            alone = network.field(network.encode([cloud], 5))
            rows = owner == index
            assert torch.equal(alone(points[rows], owner[rows] * 0), together[rows])
        assert network.field(network.encode(given, 5))(points[:0], owner[:0]).shape == (0,)


def test_gradients_are_those_of_finite_differences(network: Any) -> None:
    (cloud,) = clouds(40)
    network = network.double()
    points, owner = (part[:12] for part in queries(12))
    points, cloud, owner = points.double(), cloud.double(), owner * 0

    def total(points: Tensor, cloud: Tensor) -> Tensor:
        weights = torch.linspace(0.5, 1.5, len(points), dtype=torch.float64)
        return (network.field(network.encode([cloud], 3))(points, owner) * weights).sum()

    moved = points.clone().requires_grad_(), cloud.clone().requires_grad_()
    slopes = torch.autograd.grad(total(*moved), moved)
    generator = torch.Generator().manual_seed(3)
    for which in (0, 1):
        step = [torch.zeros_like(points), torch.zeros_like(cloud)]
        step[which] = 1e-6 * torch.randn(step[which].shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            ahead, behind = total(points + step[0], cloud + step[1]), total(points - step[0], cloud - step[1])
        expected = (slopes[which] * step[which]).sum() * 2
        assert float(ahead - behind) == pytest.approx(float(expected), rel=1e-3, abs=1e-12)
        assert slopes[which].abs().max() > 1e-4


def test_weights_carry_size_and_calibration(network: Any, tmp_path: Path) -> None:
    kind = next(name for name, path in NETWORKS.items() if path.endswith(f":{type(network).__name__}"))
    calibration = Calibration(box=1.3, threshold=0.4, second_threshold=0.1, offset=0.02, points=17)
    metadata = {
        "network": kind,
        "config": json.dumps(dataclasses.asdict(network.config)),
        **calibration.metadata(),
    }
    save_safetensors(network, tmp_path / "net.safetensors", metadata)
    again: Any = load_network(tmp_path / "net.safetensors")
    assert type(again) is type(network) and again.calibration == calibration
    assert again.config == network.config and not again.training
    assert again.state_dict().keys() == network.state_dict().keys()
    torch.testing.assert_close(again.state_dict(), network.state_dict(), rtol=1e-3, atol=1e-3)


def test_the_order_of_the_points_does_not_matter_to_the_local_network() -> None:
    network = made("local")
    (cloud,) = clouds(50)
    points, owner = queries(20)
    with torch.no_grad():
        one, other = (network.field(network.encode([c]))(points, owner * 0) for c in (cloud, cloud.flip(0)))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_neighbours_repeat_where_there_are_too_few() -> None:
    network = made("local")
    with torch.no_grad():
        logits = network.field(network.encode(clouds(2)))(*queries(5)[:1], torch.zeros(5, dtype=torch.int64))
    assert logits.isfinite().all()


def slow_planes(encoder: PlaneEncoder, clouds: Tensor) -> list[Tensor]:
    """Planes ``(B, C, R, R)`` by loops over pairs and cells, as the paper describes them."""
    size = encoder.resolution
    cell = ((clouds / 1.10001 + 0.5).clamp(0, 1 - 1e-5) * size).long()
    members = [cell[..., a] + size * cell[..., b] for a, b in ((0, 2), (0, 1), (1, 2))]
    x = encoder.blocks[0](encoder.fc_pos(clouds))
    for block in encoder.blocks[1:]:
        pooled = torch.zeros_like(x)
        for member in members:
            same = (member[:, :, None] == member[:, None, :])[..., None]
            pooled = pooled + torch.where(same, x[:, None], -torch.inf).amax(2)
        x = block(torch.cat([x, pooled], 2))
    x = encoder.fc_c(x)
    planes = []
    for member in members:
        image = torch.zeros(len(x), size**2, x.shape[2])
        for b in range(len(x)):
            for at in member[b].unique():
                image[b, at] = x[b, member[b] == at].mean(0)
        planes.append(encoder.unet(image.view(len(x), size, size, -1).permute(0, 3, 1, 2)))
    return planes


def slow_logits(decoder: PlaneDecoder, planes: list[Tensor], queries: Tensor) -> Tensor:
    """Logits with the library's interpolation of images."""
    place = (queries / 1.10001 + 0.5).clamp(0, 1 - 1e-5) * 2 - 1
    features = sum(
        F.grid_sample(plane, place[:, :, None, [a, b]], padding_mode="border", align_corners=True)[..., 0]
        for plane, (a, b) in zip(planes, ((0, 2), (0, 1), (1, 2)), strict=True)
    )
    x = decoder.fc_p(queries)
    for layer, block in zip(decoder.fc_c, decoder.blocks, strict=True):
        x = block(x + layer(features.transpose(1, 2)))  # type: ignore[union-attr]
    return decoder.fc_out(F.relu(x))[..., 0]  # type: ignore[no-any-return]


@torch.no_grad()
def test_planes_are_those_of_the_paper() -> None:
    network = made("convolutional")
    batch = torch.stack(clouds(60, 60)) * 1.3  # some beyond the planes
    points = torch.stack(clouds(50, 50)) * 1.3
    planes = slow_planes(network.encoder, batch)
    rows = torch.stack([plane.flatten(2).transpose(1, 2) for plane in planes], 1).flatten(1, 2)
    torch.testing.assert_close(network.encoder(batch), rows, rtol=1e-4, atol=1e-4)
    logits = slow_logits(network.decoder, planes, points)
    assert logits.std() > 0.1
    torch.testing.assert_close(network(batch, points), logits, rtol=1e-4, atol=1e-4)


def test_a_public_convolutional_checkpoint_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = ConvolutionalNetwork()
    assert sum(parameter.numel() for parameter in network.parameters()) == 1978209
    state = network.state_dict()
    for name, shape in {
        "encoder.blocks.4.shortcut.weight": (32, 64),
        "encoder.unet.down_convs.3.conv1.weight": (256, 128, 3, 3),
        "encoder.unet.up_convs.0.upconv.weight": (256, 128, 2, 2),
        "encoder.unet.up_convs.2.conv1.weight": (32, 64, 3, 3),
        "encoder.unet.conv_final.bias": (32,),
        "decoder.fc_c.4.weight": (32, 32),
        "decoder.blocks.4.fc_1.bias": (32,),
    }.items():
        assert state[name].shape == shape, name
    assert len(state) == 99 and not any("decoder" in name and "shortcut" in name for name in state)
    torch.save({"model": state, "epoch_it": 3, "loss_val_best": np.float64(1)}, tmp_path / "model.pth")
    loaded: Any = load_network(tmp_path / "model.pth")
    assert loaded.config == ConvolutionalConfig() and loaded.calibration == Calibration(points=600)
    torch.testing.assert_close(loaded.state_dict(), state, rtol=0, atol=0)


def test_bad_convolutional_networks_are_errors(tmp_path: Path) -> None:
    network = made("convolutional")
    state = network.state_dict()
    with pytest.raises(ValueError, match="U-Net of 3 levels must be a multiple of 4, got 30"):
        ConvolutionalConfig(depth=3, resolution=30)
    with pytest.raises(ValueError, match="filters of the network must be positive, got 0"):
        ConvolutionalConfig(filters=0)
    with pytest.raises(ValueError, match=r"not a Convolutional .*: tensor 'encoder.fc_c.weight'"):
        ConvolutionalConfig.of_state({})
    for config in ("{", "[1]", '{"resolution": "many"}'):
        with pytest.raises(ValueError, match="the configuration of the weights cannot be read"):
            ConvolutionalNetwork.of_weights(state, {"config": config})
    del state["decoder.fc_c.2.bias"]
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"decoder.fc_c.2.bias is missing"):
        load_network(tmp_path / "model.pth")


def test_unknown_networks_are_errors(tmp_path: Path) -> None:
    save_safetensors(made("local"), tmp_path / "net.safetensors", {"network": "torus"})
    with pytest.raises(ValueError, match=f"unknown network 'torus'; there are {', '.join(NETWORKS)}"):
        load_network(tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="no weights named 'cloud'"):
        load_network("cloud")
    with pytest.raises(ValueError, match=r"not a local occupancy network: tensor 'decoder.attend.weight'"):
        LocalConfig.of_state({})


def test_a_folder_of_the_same_name_does_not_hide_shipped_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "local").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_network("local").source == "local"  # type: ignore[attr-defined]
