"""The generative network: names of the public code, the KL, draws from the prior, paths between shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ifdefense.checkpoints import save_safetensors
from ifdefense.implicit.base import Calibration, load_network
from ifdefense.implicit.occupancy import ConditionalDecoder, OccupancyField, occupancy_loss
from ifdefense.reconstruction.generative import (
    GenerativeConfig,
    GenerativeOccupancyNetwork,
    LatentEncoder,
    generative_loss,
    kl_divergence,
)
from ifdefense.stages.extraction import ExtractionOptions, extract_meshes

FREE = GenerativeConfig(encoder=0, decoder=8, latent=5, hidden=6, frequencies=1)
GIVEN = GenerativeConfig(encoder=8, code=7, decoder=8, latent=5, hidden=6)


def made(config: GenerativeConfig) -> GenerativeOccupancyNetwork:
    torch.manual_seed(0)
    network = GenerativeOccupancyNetwork(config, Calibration(points=20))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return network.eval()


def pairs(batch: int = 2, count: int = 40) -> tuple[Tensor, Tensor]:
    points = torch.rand(batch, count, 3, generator=torch.Generator().manual_seed(1)) - 0.5
    return points, points.norm(dim=-1) < 0.4


def test_names_and_shapes_are_those_of_the_public_code() -> None:
    state = GenerativeOccupancyNetwork().state_dict()
    for name, shape in {
        "decoder.fc_z.weight": (256, 128),
        "decoder.fc_z.bias": (256,),
        "encoder.block_4.shortcut.weight": (512, 1024),
        "encoder_latent.fc_pos.weight": (128, 3),
        "encoder_latent.fc_c.weight": (128, 512),
        "encoder_latent.fc_0.weight": (128, 1),
        "encoder_latent.fc_1.weight": (128, 128),
        "encoder_latent.fc_2.weight": (128, 256),
        "encoder_latent.fc_3.weight": (128, 256),
        "encoder_latent.fc_mean.weight": (128, 128),
        "encoder_latent.fc_logstd.bias": (128,),
    }.items():
        assert state[name].shape == shape, name
    assert len([name for name in state if name.startswith("encoder_latent.")]) == 16
    parameters = GenerativeOccupancyNetwork().parameters()
    assert sum(parameter.numel() for parameter in parameters) == 10588673


def test_kl_is_that_of_the_library_and_of_a_monte_carlo_estimate() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, log_std = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) * 0.7
    found = kl_divergence(mean, log_std)
    one = torch.distributions.Normal(mean, log_std.exp())
    zero = torch.distributions.Normal(torch.zeros_like(mean), 1.0)
    torch.testing.assert_close(found, torch.distributions.kl_divergence(one, zero).sum(-1))
    noise = torch.randn(200_000, 3, 4, generator=generator, dtype=torch.float64)
    drawn = mean + log_std.exp() * noise
    estimate = (one.log_prob(drawn) - zero.log_prob(drawn)).sum(-1)
    error = estimate.std(0) / len(noise) ** 0.5
    assert ((estimate.mean(0) - found).abs() < 4 * error).all()
    assert (error < 0.05).all()
    assert kl_divergence(torch.zeros(1, 6), torch.zeros(1, 6)).item() == 0


def test_the_order_of_the_pairs_does_not_matter() -> None:
    network = made(FREE)
    points, occupied = pairs()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = network.posterior(points, occupied)
        shuffled = network.posterior(points[:, order], occupied[:, order])
        other = network.posterior(points, ~occupied)
    for one, again, different in zip(whole, shuffled, other, strict=True):
        torch.testing.assert_close(one, again, rtol=1e-5, atol=1e-6)
        assert (one - different).abs().max() > 1e-2


def test_the_latent_encoder_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    encoder = LatentEncoder(3, 2, 4)
    points, occupied = pairs(1, 5)
    code = torch.randn(1, 2)
    rows = torch.stack(
        [
            encoder.fc_0(o.float()[None]) + encoder.fc_pos(p) + encoder.fc_c(code[0])  # type: ignore[misc]
            for p, o in zip(points[0], occupied[0], strict=True)
        ]
    )
    rows = torch.stack([encoder.fc_1(row.relu()) for row in rows])
    for layer in (encoder.fc_2, encoder.fc_3):
        most = rows.max(0).values
        rows = torch.stack([layer(torch.cat([row, most]).relu()) for row in rows])
    most = rows.max(0).values
    mean, log_std = encoder(points, occupied, code)
    torch.testing.assert_close(mean[0], encoder.fc_mean(most))
    torch.testing.assert_close(log_std[0], encoder.fc_logstd(most))


@torch.no_grad()
def test_the_field_is_the_decoder() -> None:
    points, _ = pairs(2, 30)
    for latent_width, given in ((0, None), (5, torch.randn(2, 5)), (5, torch.randn(2, 30, 5))):
        torch.manual_seed(3)
        decoder = ConditionalDecoder(4, 8, 1, latent_width).eval()
        nn.init.normal_(decoder.bn.bn.running_mean)  # type: ignore[arg-type]
        code = torch.randn(2, 4)
        slow = decoder(points, code, given)
        local: Any = given
        if given is not None and given.ndim == 3:
            local = [lambda _, row=row: row for row in given]
        fast = OccupancyField(decoder, code, local)(points.flatten(0, 1), torch.arange(60) // 30)
        assert slow.std() > 0.01
        torch.testing.assert_close(fast.view(2, 30), slow, rtol=1e-4, atol=1e-5)


def test_a_latent_leaves_the_decoder_without_one_as_it_was() -> None:
    torch.manual_seed(0)
    plain = ConditionalDecoder(4, 8, 1)
    assert not any("fc_z" in name for name in plain.state_dict())
    wide = ConditionalDecoder(4, 8, 1, 3)
    wide.load_state_dict(plain.state_dict() | {"fc_z.weight": torch.zeros(8, 3), "fc_z.bias": torch.zeros(8)})
    points, code = pairs()[0], torch.randn(2, 4)
    torch.testing.assert_close(wide(points, code, torch.randn(2, 3)), plain(points, code), rtol=0, atol=0)


@torch.no_grad()
def test_samples_depend_on_the_seed_alone() -> None:
    network = made(FREE)
    points = pairs(1, 20)[0][0]
    owner = torch.zeros(20, dtype=torch.int64)
    few, many = network.sample(2, 7), network.sample(5, 7)
    for number in (0, 1):
        assert torch.equal(few(points, owner + number), many(points, owner + number))
    assert not torch.equal(few(points, owner), network.sample(1, 8)(points, owner))
    assert network.latents(0).shape == (0, 5)
    latents = network.latents(4000, 1)
    assert latents.mean().abs() < 0.03 and abs(float(latents.std()) - 1) < 0.03


@torch.no_grad()
def test_a_path_has_its_ends_and_its_middle() -> None:
    network = made(FREE)
    points = pairs(1, 20)[0][0]
    owner = torch.zeros(20, dtype=torch.int64)
    a, b = network.latents(2, 3)
    path = network.interpolate(a, b, 3)
    for number, latent in enumerate((a, (a + b) / 2, b)):
        expected = network.decode(latent[None])(points, owner)
        torch.testing.assert_close(path(points, owner + number), expected, rtol=1e-5, atol=1e-6)
    meshes = extract_meshes(path, 3, ExtractionOptions(resolution=16, coarse=8))
    assert len(meshes) == 3


@torch.no_grad()
def test_a_conditioned_network_sees_the_cloud() -> None:
    network = made(GIVEN)
    cloud, other = torch.rand(2, 20, 3, generator=torch.Generator().manual_seed(4)) - 0.5
    points, occupied = pairs(1, 20)
    owner = torch.zeros(20, dtype=torch.int64)
    code = network.encode([cloud])
    at_zero = network.field(code)(points[0], owner)
    assert torch.equal(at_zero, network.decode(torch.zeros(1, 5), code)(points[0], owner))
    assert not torch.equal(at_zero, network.field(network.encode([other]))(points[0], owner))
    samples = network.sample(3, 1, code)(points[0].repeat(3, 1), owner.repeat(3) + torch.arange(60) // 20)
    assert samples.view(3, 20).std(0).max() > 1e-3
    mean, _ = network.posterior(points, occupied, cloud[None])
    logits = network(points, occupied, points, cloud[None])
    torch.testing.assert_close(network.decode(mean, code)(points[0], owner), logits[0], rtol=1e-4, atol=1e-5)


def test_the_loss_is_cross_entropy_and_kl() -> None:
    network = made(FREE).train()
    points, occupied = pairs()
    parts = []
    for weight in (0.0, 1.0, 3.0):
        torch.manual_seed(5)
        parts.append(generative_loss(network, (points, occupied, points), occupied, weight))
    mean, log_std = network.posterior(points, occupied)
    torch.manual_seed(5)
    latent = mean + log_std.exp() * torch.randn_like(mean)
    expected = occupancy_loss(network.decoder(points, latent, latent), occupied)
    torch.testing.assert_close(parts[0], expected)
    divergence = kl_divergence(mean, log_std).mean()
    torch.testing.assert_close(parts[1] - parts[0], divergence)
    torch.testing.assert_close(parts[2] - parts[0], 3 * divergence)
    parts[1].backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("config", [FREE, GIVEN])
def test_weights_carry_their_sizes(config: GenerativeConfig, tmp_path: Path) -> None:
    network = made(config)
    save_safetensors(network, tmp_path / "a.safetensors", Calibration(box=1.3).metadata())
    again: Any = load_network(tmp_path / "a.safetensors")  # told by its tensors
    assert isinstance(again, GenerativeOccupancyNetwork)
    assert again.config.encoder == config.encoder and again.config.latent == config.latent
    assert again.calibration.box == 1.3
    torch.testing.assert_close(again.state_dict(), network.state_dict(), rtol=1e-3, atol=1e-3)


def test_what_cannot_be_is_an_error() -> None:
    free, given = made(FREE), made(GIVEN)
    points, occupied = pairs()
    with pytest.raises(ValueError, match="not conditioned on clouds, but got some"):
        free(points, occupied, points, points)
    with pytest.raises(ValueError, match="conditioned on clouds, but got none"):
        given(points, occupied, points)
    with pytest.raises(ValueError, match="not conditioned on clouds"):
        free.encode([points[0]])
    with pytest.raises(ValueError, match="pass the code of a cloud"):
        given.sample(2)
    with pytest.raises(ValueError, match="not conditioned, but got a code"):
        free.sample(2, code=torch.zeros(1, 7))
    with pytest.raises(ValueError, match=r"latents must be \(B, 5\), got \(1, 4\)"):
        free.decode(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="needs at least 2 steps, got 1"):
        free.interpolate(torch.zeros(5), torch.zeros(5), 1)
    with pytest.raises(ValueError, match=r"latents must be \(5,\), got \(5,\) and \(1, 5\)"):
        free.interpolate(torch.zeros(5), torch.zeros(1, 5), 3)
    with pytest.raises(ValueError, match="cannot be negative, got -1"):
        free.sample(-1)
    with pytest.raises(ValueError, match="latent of the network must be positive, got 0"):
        GenerativeConfig(latent=0)
    with pytest.raises(ValueError, match=r"tensor 'encoder_latent.fc_mean.weight' is missing"):
        GenerativeConfig.of_state({})
