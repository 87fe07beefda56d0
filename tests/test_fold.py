"""Folded networks against the originals."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from classifiers import NETWORKS, build, fold


def trained(network: str) -> nn.Module:
    """A network in evaluation mode whose batch norms have both signs and statistics of their own."""
    torch.manual_seed(0)
    model = build(network, 5)
    for part in model.modules():
        if isinstance(part, _BatchNorm):
            nn.init.uniform_(part.weight, -1.5, 1.5)
            nn.init.normal_(part.bias, std=0.3)
            assert part.running_mean is not None and part.running_var is not None
            part.running_mean.normal_(std=0.3)
            part.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.mark.parametrize("network", NETWORKS)
def test_folded_networks_equal_themselves_and_leave_the_model_alone(network: str) -> None:
    model = trained(network)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    points = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(1)) / 3
    with torch.no_grad():
        expected = model(points)
        result = fold(model)
        found = result(points)
    assert expected.std() > 1e-3
    assert (found - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))
    assert not any(isinstance(part, _BatchNorm) for part in result.modules())
    assert not result.training
    assert not any(parameter.requires_grad for parameter in result.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("network", ["pointnet", "pointnet2-ssg", "dgcnn"])
def test_folded_networks_have_the_same_gradients(network: str) -> None:
    model = trained(network).double()
    points = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 3
    points.requires_grad_()
    expected, found = (
        torch.autograd.grad(net(points).square().sum(), points)[0] for net in (model, fold(model))
    )
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-13)


def test_folding_a_training_model_and_folding_twice() -> None:
    model = trained("pointnet")
    once = fold(model.train())
    assert model.training
    points = torch.randn(2, 20, 3)
    assert torch.equal(fold(once)(points), once(points))


def test_norms_behind_no_known_layer_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="Sequential has batch norms without a known layer before them: 1"):
        fold(model)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_trained_under_autocast(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, 8)
    points = torch.nn.functional.normalize(torch.randn(4, 64, 3), dim=2).requires_grad_()
    for mode in (False, True):
        model.train(mode)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(points).float()
        if not mode:
            full = model(points)
            assert (logits - full).norm() < 0.1 * full.norm()
        torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
        for value in (points, *model.parameters()):
            assert value.grad is not None and value.grad.isfinite().all()
        assert points.grad is not None and points.grad.any()
