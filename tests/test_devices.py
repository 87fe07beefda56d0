"""Every public entry on an accelerator, or on the stand-in for one; ``--device cuda`` takes a real one."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
from collections.abc import Iterator

import fake_device
import numpy as np
import pytest
import torch
from attack_checks import SmallNet
from conftest import sample_box
from quick import quick
from torch import Tensor, nn

import attacks
import ifdefense
from benchmarks.suite import SUITE
from classifiers import NETWORKS, build, fold
from ifdefense import threads
from ifdefense.arguments import device_of
from ifdefense.corruptions.natural import CORRUPTIONS, corrupt
from ifdefense.geometry.gathering import add_rows
from ifdefense.geometry.points import lower_median
from ifdefense.purifiers.function import _pretrained
from ifdefense.purifiers.registry import METHODS
from ifdefense.timing import stage, timed

CLASSES, POINTS = 4, 24
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


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# Purifiers


@pytest.mark.parametrize("method", METHODS)
def test_purifies_clouds_on_the_device(method, device, clouds):
    """Also where CUDA may not vary from run to run, and at no point on the wrong device."""
    purifier = quick(method)
    expected = purifier(clouds, POINTS)
    with deterministic(), fake_device.watch() as seen:
        found = purifier.to(device)(clouds.to(device), POINTS)
    assert found.device == device
    close(found, expected)
    assert not {name for *_, name in seen} & {"index_add", "index_add_"}  # of a varying order on CUDA


@pytest.mark.parametrize("method", ["local-mesh", "onet-fill", "onet-opt", "sor-smooth"])
def test_purifies_on_a_device_without_float64(method, stand_in, clouds):
    """What needs it is done on the CPU."""
    purifier = quick(method)
    expected = purifier(clouds, POINTS)
    with fake_device.without_float64():
        found = purifier.to(stand_in)(clouds.to(stand_in), POINTS)
    assert found.device == stand_in
    close(found, expected)


def test_integers_on_a_device_without_float64_are_refused(stand_in):
    points = torch.randint(0, 100, (40, 3)).to(stand_in)
    with (
        fake_device.without_float64(),
        pytest.raises(
            TypeError, match="the cloud has dtype int64, which becomes float64, and device 'fake:0'"
        ),
    ):
        ifdefense.purify(points, "sor")


def test_one_network_serves_a_device_with_and_without_its_index(device, clouds):
    _pretrained.cache_clear()
    for name in (device.type, str(device)):
        ifdefense.purify(clouds, "sor-ae", POINTS, device=name)
    assert _pretrained.cache_info().misses == 1
    assert device_of(device.type) == device


def test_work_on_the_device_is_asked_for_by_one_thread(device, monkeypatch):
    def thread(part: Tensor) -> int:
        return threading.get_ident()

    monkeypatch.setattr(threads, "workers", lambda: 3)
    assert set(threads.parallel_map(thread, torch.zeros(6, device=device).split(1))) == {
        threading.get_ident()
    }
    assert threading.get_ident() not in threads.parallel_map(thread, torch.zeros(6).split(1))


def test_timed_stages_wait_for_the_device(stand_in, clouds):
    with fake_device.watch() as seen, timed(stand_in) as seconds, stage("some"):
        pass
    assert set(seconds) == {"some"} and seen.count("wait") == 2
    purifier = quick("sor-smooth")
    for call, waits in ((purifier.trace, True), (purifier, False)):
        with fake_device.watch() as seen:
            call(clouds.to(stand_in))
        assert bool({name for *_, name in seen} & {"synchronize"}) == waits


def test_the_transform_uses_its_device_with_the_first_data(device, clouds, monkeypatch):
    geometric = pytest.importorskip("torch_geometric.data")
    from ifdefense.transforms import Purify

    empty, used = torch.empty, []
    monkeypatch.setattr(
        torch, "empty", lambda *given, **options: used.append(given) or empty(*given, **options)
    )
    transform = Purify("sor", device=device.type)
    assert not used
    result = transform(geometric.Data(pos=clouds[0].to(device)))
    assert used and result.pos.device == device
    with pytest.raises(ValueError, match="device 'meta' cannot be used"):
        Purify("sor", device="meta")
    with pytest.raises(ValueError, match="device 'nowhere' cannot be used"):
        Purify("sor", device="nowhere")


# Operations


@pytest.mark.parametrize("size", [5, 6])
def test_the_lower_median(size, device):
    values = torch.randn(3, size, 2)
    with deterministic():
        found = lower_median(values.to(device), 1)
    assert torch.equal(found.cpu(), values.median(1, keepdim=True).values)


def test_rows_are_added_in_their_order(device):
    """Also those of segments without any; gradients pass."""
    index, rows = torch.tensor([4, 0, 4, 1, 4]), torch.randn(5, 3) * 1000
    total = torch.randn(6, 3)
    expected = total.index_add(0, index, rows)
    rows.requires_grad_()
    with deterministic():
        found = add_rows(total.to(device), index.to(device), rows.to(device))
        (slope,) = torch.autograd.grad((found * found.detach()).sum(), rows)
    close(found.detach(), expected)
    close(slope, expected[index])


# Attacks, classifiers, corruptions


def small(attack: attacks.Attack) -> attacks.Attack:
    names = {field.name for field in dataclasses.fields(attack)}
    return dataclasses.replace(attack, **{name: value for name, value in FAST.items() if name in names})


@pytest.mark.parametrize("name", SUITE)
def test_attacks_clouds_on_the_device(name, device, clouds):
    torch.manual_seed(0)
    model, entry = SmallNet().eval(), SUITE[name]
    attack = small(entry.attack())
    labels = model(clouds).argmax(1)
    targets = (labels + 1) % CLASSES if entry.targeted else None
    expected = attack(model, clouds, labels, targets)
    targets = None if targets is None else targets.to(device)
    with deterministic():
        result = attack(model.to(device), clouds.to(device), labels.to(device), targets)
    assert result.points.device == result.success.device == device
    close(result.points, expected.points)


def test_aof_on_a_device_without_float64(stand_in, clouds):
    model, labels = SmallNet().eval(), torch.tensor([0, 1])
    attack = attacks.AOF(restarts=1, iterations=2)
    expected = attack(model, clouds, labels)
    with fake_device.without_float64():
        found = attack(model.to(stand_in), clouds.to(stand_in), labels.to(stand_in))
    assert found.points.device == stand_in
    close(found.points, expected.points)


def logits_and_slope(model: nn.Module, points: Tensor) -> tuple[Tensor, Tensor]:
    points = points.clone().requires_grad_()
    logits = model(points)
    return logits.detach(), torch.autograd.grad(logits[:, 0].sum(), points)[0]


@pytest.mark.parametrize("network", NETWORKS)
def test_folded_classifiers_and_their_gradients_on_the_device(network, device, clouds):
    clouds = clouds[:, :64]
    torch.manual_seed(0)
    model = fold(build(network, CLASSES).eval())
    expected = logits_and_slope(model, clouds)
    with deterministic(), fake_device.watch() as seen:
        found = logits_and_slope(model.to(device), clouds.to(device))
    for one, other in zip(found, expected, strict=True):
        assert one.device == device
        close(one, other)
    assert not {name for *_, name in seen} & {"index_add", "index_add_"}


@pytest.mark.parametrize("network", ["pointnet", "dgcnn"])
def test_launches_of_a_folded_classifier_do_not_grow_with_the_batch(network, stand_in):
    model = fold(build(network, CLASSES).eval()).to(stand_in)
    launches = []
    for batch in (2, 8):
        with fake_device.watch() as seen:
            logits_and_slope(model, torch.randn(batch, 64, 3).to(stand_in))
        launches.append(seen.count("launch"))
        assert seen.count("wait") == 0
    assert launches[0] == launches[1] < 250, launches


@pytest.mark.parametrize("network", NETWORKS)
def test_classifiers_train_on_the_device(network, device, clouds):
    clouds = clouds[:, :64]
    torch.manual_seed(0)
    model = build(network, CLASSES).train()
    loss = nn.functional.cross_entropy(copy.deepcopy(model)(clouds), torch.tensor([0, 1]))
    with deterministic():
        model.to(device)
        found = nn.functional.cross_entropy(model(clouds.to(device)), torch.tensor([0, 1], device=device))
        found.backward()
    if not any(isinstance(part, nn.Dropout) for part in model.modules()):
        close(found.detach(), loss)
    slopes = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert slopes and all(slope.device == device for slope in slopes)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupts_clouds_on_the_device(name, device, clouds):
    expected = corrupt(clouds, name, 2)
    found = corrupt(clouds.to(device), name, 2)
    assert found.device == device
    close(found, expected)
    if device.type == fake_device.NAME:
        with fake_device.without_float64():
            close(corrupt(clouds.to(device), name, 2), expected)
