"""Purifiers and clouds on different devices: clouds go to the weights, and results come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from quick import CLOUDS, Pooled, quick
from torch import Tensor

from attacks.defence_aware.model import EOT, DefenceAware
from ifdefense import Compose, Defended, Purifier, purify
from ifdefense.cli import main
from ifdefense.purifiers import loading
from ifdefense.purifiers.filters import StatisticalOutlierRemoval

POINTS = 24
METHODS = ["local-mesh", "local-random", "onet-opt", "sor-ae", "sor"]
"""One of each kind of network, filter and restorer."""


@pytest.fixture(scope="module", params=METHODS)
def pair(request: pytest.FixtureRequest, device: torch.device) -> tuple[Purifier, Purifier]:
    """A method on the CPU and on the device."""
    return quick(request.param), quick(request.param).to(device)


def assert_close(result: Tensor | np.ndarray, expected: Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(result).cpu(), expected.cpu(), rtol=0, atol=1e-4)


def test_clouds_go_to_the_weights_and_results_come_back(
    pair: tuple[Purifier, Purifier], device: torch.device
) -> None:
    here, there = pair
    expected = here(CLOUDS, POINTS)
    array = there(CLOUDS.numpy(), POINTS)
    assert isinstance(array, np.ndarray) and array.dtype == np.float32
    assert_close(array, expected)
    for purifier, clouds in ((there, CLOUDS.double()), (here, CLOUDS.to(device)), (there, CLOUDS.to(device))):
        result = purifier(clouds, POINTS)
        assert result.device == clouds.device and result.dtype == clouds.dtype
        assert_close(result, expected.to(clouds.dtype))
        (outcome,) = purifier.outcomes([clouds[0]], POINTS)
        assert {
            value.device for value in (outcome.points, outcome.index, outcome.kept) if value is not None
        } == {clouds.device}
    mixed = there([CLOUDS[0].numpy(), CLOUDS[1], CLOUDS[0].to(device)], POINTS)
    assert isinstance(mixed[0], np.ndarray) and mixed[1].device.type == "cpu" and mixed[2].device == device


def test_traces_and_defended_classifiers(pair: tuple[Purifier, Purifier], device: torch.device) -> None:
    here, there = pair
    expected = here(CLOUDS, POINTS)
    assert_close(there.trace(CLOUDS.numpy(), POINTS)[0].purified, expected[0])
    assert_close(here.trace(CLOUDS.to(device), POINTS)[0].purified, expected[0])
    classifier = Pooled()
    logits = Defended(classifier, here, num_points=POINTS, seed=0)(CLOUDS)
    assert_close(Defended(classifier, there, num_points=POINTS, seed=0)(CLOUDS.numpy()), logits)
    moved = Defended(classifier.to(device), here, num_points=POINTS, seed=0)(CLOUDS.numpy())
    assert moved.device == device
    assert_close(moved, logits)


def test_gradients_come_back_through_a_purifier_left_behind(
    pair: tuple[Purifier, Purifier], device: torch.device
) -> None:
    for purifier, place in zip(pair, (device, torch.device("cpu")), strict=True):
        points = CLOUDS.clone().to(place).requires_grad_()
        model = DefenceAware(Pooled().to(place), purifier, num_points=POINTS, eot=EOT(samples=1))
        logits = model(points)
        (gradient,) = torch.autograd.grad(logits.sum(), points)
        assert logits.device == gradient.device == place
        assert gradient.cpu().any()


def test_attributes_and_data_of_pyg_come_back(device: torch.device) -> None:
    geometric = pytest.importorskip("torch_geometric.data")
    purifier = quick("local-mesh").to(device)
    columns = torch.cat([CLOUDS, torch.arange(160.0).expand(2, 160)[..., None]], 2)
    result = purifier(columns, POINTS)
    assert result.shape == (2, POINTS, 4) and result.device.type == "cpu"
    assert set(result[..., 3].flatten().tolist()) <= set(range(160))
    data = geometric.Batch.from_data_list([geometric.Data(pos=cloud) for cloud in CLOUDS])
    clean = purifier(data, POINTS)
    assert clean.pos.device.type == clean.batch.device.type == "cpu"
    assert torch.equal(clean.pos.view(2, POINTS, 3), result[..., :3])


def test_parts_of_a_chain_may_be_on_different_devices(device: torch.device) -> None:
    part, other = quick("sor-ae"), quick("sor-ae").to(device)
    mixed = Compose([StatisticalOutlierRemoval(), part, other], "mixed")
    together = Compose([StatisticalOutlierRemoval(), part, part], "together")
    assert_close(mixed(CLOUDS, POINTS), together(CLOUDS, POINTS))


@pytest.mark.parametrize("method", ["local-mesh", "sor"])
def test_a_method_by_name_computes_where_it_is_told_to(method: str, device: torch.device) -> None:
    result = purify(CLOUDS, method, POINTS, device=device)
    assert result.device.type == "cpu"
    assert_close(result, purify(CLOUDS, method, POINTS))


def test_the_command_line_purifies_on_a_device(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    purifier = quick("local-mesh")
    expected = purifier(CLOUDS[0], POINTS)
    monkeypatch.setattr(loading, "load", lambda name, device: purifier.to(device))
    source, target = tmp_path / "cloud.npy", tmp_path / "clean.npy"
    np.save(source, CLOUDS[0].numpy())
    result: Any = CliRunner().invoke(
        main, ["purify", str(source), "-o", str(target), "--device", str(device), "--num-points", "24"]
    )
    assert result.exit_code == 0, result.output
    assert "1 of 1 files done" in result.output
    assert next(purifier.parameters()).device == device
    assert_close(np.load(target), expected)
