"""Contract of implicit networks: gradients, folding, batches, names, stored calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ifdefense.checkpoints import save_safetensors
from ifdefense.implicit.base import Calibration, load_network
from ifdefense.implicit.local import LocalConfig, LocalOccupancyNetwork
from ifdefense.implicit.occupancy import OccupancyConfig, OccupancyNetwork

SMALL = LocalConfig(
    width=8, coarse=8, values=6, heads=2, hidden=8, neighbours=5, moments=9, nearest=4, blocks=1
)


def made(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "local":
        network: Any = LocalOccupancyNetwork(SMALL)
    else:
        network = OccupancyNetwork(OccupancyConfig(8, 8, 8, 2), Calibration(points=20))
    for parameter in network.parameters():  # large enough to see, statistics that are not those of the start
        nn.init.normal_(parameter, std=0.3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return network.eval()


@pytest.fixture(params=["local", "occupancy"])
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
    slow = network(batch, points[None].expand(3, -1, -1))
    field = network.field(
        network.codes(batch) if isinstance(network, OccupancyNetwork) else network.encode(given)
    )
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
    kind = "local" if isinstance(network, LocalOccupancyNetwork) else "occupancy"
    calibration = Calibration(box=1.3, threshold=0.4, second_threshold=0.1, offset=0.02, points=17)
    save_safetensors(network, tmp_path / "net.safetensors", {"network": kind, **calibration.metadata()})
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


def test_unknown_networks_are_errors(tmp_path: Path) -> None:
    save_safetensors(made("local"), tmp_path / "net.safetensors", {"network": "voxel"})
    with pytest.raises(ValueError, match="unknown network 'voxel'; there are local, occupancy"):
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
