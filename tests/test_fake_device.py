"""The stand-in for an accelerator refuses what CUDA refuses, and counts."""

from __future__ import annotations

from collections.abc import Callable

import fake_device
import numpy as np
import pytest
import torch
from torch import Tensor, nn

MISTAKES: dict[str, tuple[Callable[[Tensor], object], type[Exception], str]] = {
    "two devices": (lambda x: x + torch.ones(3), RuntimeError, "same device"),
    "weights left behind": (lambda x: nn.Linear(3, 2)(x), RuntimeError, "same device"),
    "factory without a device": (lambda x: torch.cat([x, torch.zeros(1, 3)]), RuntimeError, "same device"),
    "device indices": (lambda x: torch.ones(4, 3)[x.argmax(0)], RuntimeError, "indices should be"),
    "numpy": (lambda x: x.numpy(), TypeError, "can't convert"),
    "np.asarray": (lambda x: np.asarray(x), TypeError, "can't convert"),
    "generator of the CPU": (
        lambda x: torch.rand(3, device=x.device, generator=torch.Generator()),
        RuntimeError,
        "for generator",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_refuses_what_an_accelerator_refuses(device, mistake):
    run, error, message = MISTAKES[mistake]
    x = torch.randn(4, 3).to(device)
    with pytest.raises(error, match=message if device.type == fake_device.NAME else None):
        run(x)


def test_computes_as_the_host_does(device):
    """Also in backward passes and in optimisers, whose parameters keep their identity."""
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    weight = net.weight
    expected = net(x).square().mean().item()
    net.to(device)
    optimiser = torch.optim.SGD([weight], lr=0.1)
    loss = net(x.to(device)).square().mean()
    loss.backward()
    optimiser.step()
    assert weight is net.weight and weight.device == device and weight.grad.device == device
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert net(x.to(device)).square().mean() < loss


def test_counts_launches_waits_and_copies(stand_in):
    with fake_device.watch() as seen:
        x = torch.arange(6.0).to(stand_in)
        y = (x * 2).view(2, 3)
        assert y[y > 4].cpu().tolist() == [6, 8, 10]
        assert y.sum().item() == 30
    assert {kind: seen.count(kind) for kind in fake_device.KINDS} == {
        "launch": 6,  # to the device, product, comparison, index, sum, item
        "wait": 2,  # the mask and the item
        "to host": 1,
        "to device": 1,
    }
    with fake_device.watch() as seen:
        torch.zeros(3)
    assert not seen


def test_draws_its_own_random_numbers(device):
    torch.manual_seed(3)
    theirs, ours = torch.rand(4, device=device), torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4), ours)
    assert torch.equal(torch.rand(4, device=device), theirs)
    assert not torch.equal(theirs.cpu(), ours)


@pytest.mark.parametrize("name", ["median", "kthvalue", "cumsum", "bincount"])
def test_refuses_what_varies_from_run_to_run_where_that_is_not_wanted(device, name):
    x = torch.rand(8, device=device)
    runs = {
        "median": lambda: x.median(0),
        "kthvalue": lambda: x.kthvalue(2),
        "cumsum": lambda: x.cumsum(0),
        "bincount": lambda: torch.bincount(x.long(), x),
    }
    runs[name]()
    torch.use_deterministic_algorithms(True)
    try:
        x.median()
        x.long().cumsum(0)
        with pytest.raises(RuntimeError, match="determinis"):
            runs[name]()
    finally:
        torch.use_deterministic_algorithms(False)


def test_lacks_float64_when_told_to(stand_in):
    with fake_device.without_float64(), pytest.raises(TypeError, match="doesn't support float64"):
        torch.zeros(3, device=stand_in).double()
    assert torch.zeros(3, device=stand_in).double().dtype == torch.float64
