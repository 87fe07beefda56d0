"""The Occupancy Network: published tensor names, folded decoder, loss."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ifdefense.checkpoints import load_into, load_state
from ifdefense.implicit.occupancy import (
    ConditionalBatchNorm,
    OccupancyConfig,
    OccupancyNetwork,
    ResnetBlockFC,
    occupancy_loss,
)

SMALL = OccupancyConfig(encoder=16, code=24, decoder=20)


def trained(config: OccupancyConfig = SMALL) -> OccupancyNetwork:
    """A network whose every tensor is far from its initial value, as after training."""
    torch.manual_seed(0)
    network = OccupancyNetwork(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(
            parameter, std=0.3 if parameter.ndim < 2 else 1.0 / math.sqrt(parameter.shape[1])
        )
    for module in network.modules():
        if isinstance(module, ConditionalBatchNorm):
            assert module.bn.running_var is not None and module.bn.running_mean is not None
            module.bn.running_var.uniform_(0.5, 2.0)
            module.bn.running_mean.normal_()
    return network.eval()


def published_tensors() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the public point-cloud checkpoint, written out from its layer list."""
    tensors: dict[str, tuple[int, ...]] = {"encoder.fc_pos.weight": (1024, 3), "encoder.fc_pos.bias": (1024,)}
    for block in range(5):
        at = f"encoder.block_{block}"
        tensors |= {
            f"{at}.fc_0.weight": (512, 1024),
            f"{at}.fc_0.bias": (512,),
            f"{at}.fc_1.weight": (512, 512),
        }
        tensors |= {f"{at}.fc_1.bias": (512,), f"{at}.shortcut.weight": (512, 1024)}
    tensors |= {"encoder.fc_c.weight": (512, 512), "encoder.fc_c.bias": (512,)}
    tensors |= {"decoder.fc_p.weight": (256, 3, 1), "decoder.fc_p.bias": (256,)}
    norms = [f"decoder.block{block}.bn_{norm}" for block in range(5) for norm in (0, 1)] + ["decoder.bn"]
    for at in norms:
        for conv in ("conv_gamma", "conv_beta"):
            tensors |= {f"{at}.{conv}.weight": (256, 512, 1), f"{at}.{conv}.bias": (256,)}
        tensors |= {
            f"{at}.bn.running_mean": (256,),
            f"{at}.bn.running_var": (256,),
            f"{at}.bn.num_batches_tracked": (),
        }
    for at in [f"decoder.block{block}.fc_{layer}" for block in range(5) for layer in (0, 1)]:
        tensors |= {f"{at}.weight": (256, 256, 1), f"{at}.bias": (256,)}
    return tensors | {"decoder.fc_out.weight": (1, 256, 1), "decoder.fc_out.bias": (1,)}


def test_default_network_has_the_published_tensors() -> None:
    network = OccupancyNetwork()
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == published_tensors()
    assert sum(parameter.numel() for parameter in network.parameters()) == 10_373_889


def test_a_public_checkpoint_loads_bare_and_wrapped(tmp_path: Path) -> None:
    source = trained()
    cloud, queries = torch.rand(1, 50, 3) - 0.5, torch.rand(1, 80, 3) - 0.5
    torch.save(source.state_dict(), tmp_path / "bare.pth")
    torch.save({"model": source.state_dict(), "epoch_it": 5, "loss_val_best": 1.0}, tmp_path / "official.pt")
    for name in ("bare.pth", "official.pt"):
        state = load_state(tmp_path / name)
        config = OccupancyConfig.of_state(state)
        assert config == SMALL
        network = OccupancyNetwork(config).eval()
        load_into(network, state)
        torch.testing.assert_close(network(cloud, queries), source(cloud, queries), rtol=0, atol=0)


def test_a_foreign_checkpoint_is_no_occupancy_network() -> None:
    with pytest.raises(ValueError, match=r"not an Occupancy Network: tensor 'encoder.fc_c.weight'"):
        OccupancyConfig.of_state({"feat.conv1.weight": torch.zeros(1)})


def test_block_with_pooled_features_equals_concatenation() -> None:
    torch.manual_seed(0)
    block = ResnetBlockFC(12, 5)
    torch.nn.init.normal_(block.fc_1.weight)
    x, pooled = torch.randn(2, 7, 8), torch.randn(2, 4)
    whole = torch.cat([x, pooled[:, None].expand(-1, 7, -1)], dim=-1)
    naive = block.shortcut(whole) + block.fc_1(F.relu(block.fc_0(F.relu(whole))))
    torch.testing.assert_close(block(x, pooled), naive)
    torch.testing.assert_close(block(whole), naive)


def test_encoder_does_not_see_the_order_of_points() -> None:
    network = trained()
    cloud = torch.rand(2, 40, 3)
    torch.testing.assert_close(network.encoder(cloud), network.encoder(cloud.flip(1)))


@pytest.mark.parametrize("config", [SMALL, OccupancyConfig(128, 256, 128)])
def test_folded_decoder_equals_the_training_one(config: OccupancyConfig) -> None:
    network = trained(config)
    clouds, queries = torch.rand(3, 60, 3) - 0.5, torch.rand(3, 3000, 3) - 0.5
    with torch.no_grad():
        slow = network(clouds, queries)
        fast = network.field(network.codes(clouds))(
            queries.reshape(-1, 3), torch.arange(3).repeat_interleave(3000)
        ).view(3, -1)
    assert slow.std() > 0.04
    assert (fast - slow).abs().max() < 1e-5 * max(1.0, slow.abs().max())


def test_field_of_uneven_and_absent_clouds() -> None:
    network = trained()
    clouds, queries = torch.rand(4, 30, 3), torch.rand(70, 3)
    cloud = torch.tensor([0] * 10 + [2] * 59 + [3])  # none for cloud 1
    with torch.no_grad():
        field = network.field(network.codes(clouds))
        values = field(queries, cloud)
        single = [
            network(clouds[None, index], queries[None, None, i]).item() for i, index in enumerate(cloud)
        ]
    torch.testing.assert_close(values, torch.tensor(single), rtol=1e-5, atol=1e-5)
    assert field(queries[:0], cloud[:0]).shape == (0,)


def test_loss_is_the_bernoulli_likelihood() -> None:
    logits = torch.tensor([[0.0, 2.0], [-1.0, 30.0]], dtype=torch.float64)
    occupied = torch.tensor([[True, False], [False, True]])
    probability = torch.where(occupied, logits.sigmoid(), (-logits).sigmoid())
    torch.testing.assert_close(occupancy_loss(logits, occupied), -probability.log().sum(1).mean())
    confident_and_wrong = occupancy_loss(torch.tensor([[500.0]]), torch.tensor([[False]]))
    assert confident_and_wrong == pytest.approx(500.0)
