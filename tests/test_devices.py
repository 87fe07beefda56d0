"""Every public entry on an accelerator, or on the stand-in for one; ``--device cuda`` takes a real one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from attack_checks import SmallNet
from conftest import sample_box
from torch import Tensor, nn

import attacks
import ifdefense
from benchmarks.suite import SUITE
from classifiers import NETWORKS, build, fold
from ifdefense.corruptions.natural import CORRUPTIONS, corrupt
from ifdefense.purifiers.registry import METHODS

CLASSES = 4
FAST = {"iterations": 3, "searches": 1, "restarts": 1, "queries": 6, "polish": 0, "refine": False, "num": 20}
"""Settings with which an attack takes a moment, where it has them."""


@pytest.fixture(scope="module")
def clouds() -> Tensor:
    """Two boxes of 128 points."""
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.stack([sample_box(sides, 128, rng) for sides in ((1, 0.6, 0.4), (1, 1, 0.8))]))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_purifies_clouds_on_the_device(method, device, clouds):
    result = ifdefense.purify(clouds.to(device), method)
    assert result.device == device
    close(result, ifdefense.purify(clouds, method))


def small(attack: attacks.Attack) -> attacks.Attack:
    names = {field.name for field in dataclasses.fields(attack)}
    return dataclasses.replace(attack, **{name: value for name, value in FAST.items() if name in names})


@pytest.mark.parametrize("name", SUITE)
def test_attacks_clouds_on_the_device(name, device, clouds):
    torch.manual_seed(0)
    model = SmallNet().eval()
    entry = SUITE[name]
    attack = small(entry.attack())
    labels = model(clouds).argmax(1)
    targets = (labels + 1) % CLASSES if entry.targeted else None
    expected = attack(model, clouds, labels, targets)
    result = attack(
        model.to(device),
        clouds.to(device),
        labels.to(device),
        None if targets is None else targets.to(device),
    )
    assert result.points.device == result.success.device == device
    close(result.points, expected.points)


@pytest.mark.parametrize("folded", [False, True], ids=["whole", "folded"])
@pytest.mark.parametrize("network", NETWORKS)
def test_classifiers_and_their_gradients_on_the_device(network, folded, device, clouds):
    torch.manual_seed(0)
    model = build(network, CLASSES).eval()
    if folded:
        model = fold(model)

    def logits_and_slope(net: nn.Module, points: Tensor) -> tuple[Tensor, Tensor]:
        points = points.clone().requires_grad_()
        logits = net(points)
        return logits.detach(), torch.autograd.grad(logits[:, 0].sum(), points)[0]

    expected = logits_and_slope(model, clouds)
    found = logits_and_slope(model.to(device), clouds.to(device))
    for one, other in zip(found, expected, strict=True):
        assert one.device == device
        close(one, other)


@pytest.mark.parametrize("network", NETWORKS)
def test_classifiers_train_on_the_device(network, device, clouds):
    torch.manual_seed(0)
    model = build(network, CLASSES).to(device).train()
    nn.functional.cross_entropy(model(clouds.to(device)), torch.tensor([0, 1], device=device)).backward()
    slopes = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert slopes and all(slope.device == device for slope in slopes)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupts_clouds_on_the_device(name, device, clouds):
    found = corrupt(clouds.to(device), name, 2)
    assert found.device == device
    close(found, corrupt(clouds, name, 2))
