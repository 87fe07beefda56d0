"""Checkpoints of training programs and wrappers: keys, prefixes, what else is in the file, and misfits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import classifiers
from ifdefense.checkpoints import CheckpointError, load_into, load_state, load_weights
from ifdefense.implicit.base import load_network
from ifdefense.implicit.convolutional import ConvolutionalConfig, ConvolutionalNetwork
from ifdefense.implicit.occupancy import OccupancyConfig, OccupancyNetwork
from ifdefense.point_networks.autoencoder import AutoEncoder
from ifdefense.point_networks.punet import PUNet

State = dict[str, Tensor]


def occupancy() -> nn.Module:
    return OccupancyNetwork(OccupancyConfig(code=8, encoder=8, decoder=8))


def convolutional() -> nn.Module:
    return ConvolutionalNetwork(ConvolutionalConfig(encoder=8, features=8, filters=8, depth=2, decoder=8))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[Path], Any]]] = {
    "auto-encoder": (lambda: AutoEncoder(8, 20), AutoEncoder.load),
    "classifier": (
        lambda: classifiers.build("pointmlp-elite", 5),
        lambda path: classifiers.load("pointmlp-elite", path),
    ),
    "occupancy": (occupancy, load_network),
    "convolutional": (convolutional, load_network),
    "pu-net": (PUNet, PUNet.load),
}


def state_of(name: str, seed: int = 0) -> State:
    torch.manual_seed(seed)
    return dict(NETWORKS[name][0]().state_dict())


def check(name: str, path: Path, expected: Mapping[str, Tensor]) -> None:
    """The network of a file has the expected tensors."""
    loaded = NETWORKS[name][1](path).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, expected[tensor]) for tensor, value in loaded.items())


def under(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + name: value for name, value in state.items()}


PREFIXES = [
    "_orig_mod.",
    "module._orig_mod.",
    "module.",
    "model.",
    "net.",
    "backbone.",
    "model._orig_mod.module.",
    "anything.of.mine.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", ["auto-encoder", "classifier"])
def test_any_prefix_is_stripped(name: str, prefix: str, tmp_path: Path) -> None:
    state = state_of(name)
    torch.save(under(prefix, state), tmp_path / "a.pth")
    check(name, tmp_path / "a.pth", state)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "net", "model", "ema", "best", "a/b"])
@pytest.mark.parametrize("name", ["auto-encoder", "classifier"])
def test_any_key_is_opened(name: str, key: str, tmp_path: Path) -> None:
    state = state_of(name)
    torch.save({key: {"weights": under("module.", state)}, "epoch": 3}, tmp_path / "a.pth")
    check(name, tmp_path / "a.pth", state)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_loader_knows_wrappers(name: str, tmp_path: Path) -> None:
    state = state_of(name)
    save_file(under("backbone._orig_mod.", state), tmp_path / "a.safetensors")
    check(name, tmp_path / "a.safetensors", state)
    torch.save({"nested": {"here": under("model.", state)}}, tmp_path / "a.pth")
    check(name, tmp_path / "a.pth", state)


def test_a_compiled_part_of_a_network(tmp_path: Path) -> None:
    state = state_of("auto-encoder")
    names = {name: name.replace("decoder.", "decoder._orig_mod.") for name in state}
    torch.save({names[name]: value for name, value in state.items()}, tmp_path / "a.pth")
    check("auto-encoder", tmp_path / "a.pth", state)


def test_public_names_are_found_behind_a_prefix(tmp_path: Path) -> None:
    state = dict(classifiers.build("pointnet", 3, feature_transform=False).state_dict())
    # As IF-Defense has it: a layer and its batch norm together.
    together = {"fc1.": "fc1.0.", "bn1.": "fc1.1."}
    renamed = {together.get(name[:4], name[:4]) + name[4:]: value for name, value in state.items()}
    assert "fc1.1.running_mean" in renamed
    torch.save({"state_dict": under("model.", renamed)}, tmp_path / "a.pth")
    loaded = classifiers.load("pointnet", tmp_path / "a.pth").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


class Lightning(nn.Module):
    """Shape of a module of PyTorch Lightning, with what its state dict holds beside the network."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.criterion = nn.CrossEntropyLoss(torch.ones(5))
        self.metrics = nn.BatchNorm1d(2)
        self.loss_fn = nn.Linear(2, 2)


def test_what_a_training_leaves_in_the_file_does_not_matter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    network = AutoEncoder(8, 20)
    module = Lightning(network)
    adam = torch.optim.Adam(module.parameters())
    network(torch.randn(2, 9, 3)).sum().backward()
    adam.step()
    content = {
        "epoch": 3,
        "best": np.float64(0.5),
        "worst": torch.tensor(torch.inf),
        "pytorch-lightning_version": "2.0",
        "state_dict": {**module.state_dict(), "_extra_state": None},
        "optimizer_states": [adam.state_dict()],
        "optimizer": adam.state_dict(),
        "lr_schedulers": [torch.optim.lr_scheduler.StepLR(adam, 1).state_dict()],
        "callbacks": {"EarlyStopping": {"best_score": torch.tensor(torch.nan)}},
    }
    torch.save(content, tmp_path / "a.ckpt")
    with caplog.at_level(logging.INFO):
        check("auto-encoder", tmp_path / "a.ckpt", network.state_dict())
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "are ignored: criterion.weight, metrics.weight, metrics.bias, … (8)" in caplog.text


def test_moving_averages_load(tmp_path: Path) -> None:
    network = AutoEncoder(8, 20)
    average = AveragedModel(network)
    average.update_parameters(network)
    assert "n_averaged" in average.state_dict()
    torch.save(average.state_dict(), tmp_path / "a.pth")
    check("auto-encoder", tmp_path / "a.pth", network.state_dict())


@pytest.mark.parametrize(
    ("content", "places"),
    [
        (
            lambda a, b: {"state_dict": under("teacher.", a) | under("student.", b)},
            "under 'state_dict.teacher' and under 'state_dict.student'",
        ),
        (lambda a, b: {"model": a, "ema": under("module.", b)}, "under 'model' and under 'ema.module'"),
        (lambda a, b: a | under("teacher.", b), "at the top and under 'teacher'"),
    ],
)
def test_two_networks_are_an_error_that_names_them(
    content: Callable[[State, State], Any], places: str, tmp_path: Path
) -> None:
    one, other = state_of("auto-encoder"), state_of("auto-encoder", seed=1)
    torch.save(content(one, other), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=f"several networks that fit, {places}"):
        AutoEncoder.load(tmp_path / "a.pth")
    torch.save(under("net.", one) | under("alias.", one), tmp_path / "b.pth")
    check("auto-encoder", tmp_path / "b.pth", one)


def test_another_network_beside_is_no_candidate(tmp_path: Path) -> None:
    state = state_of("classifier")
    teacher = classifiers.build("pointnet2-ssg", 5).state_dict()
    torch.save(under("student.", state) | under("teacher.", teacher), tmp_path / "a.pth")
    check("classifier", tmp_path / "a.pth", state)


def test_misfits_list_names_found_and_expected(tmp_path: Path) -> None:
    state = under("model.", state_of("auto-encoder"))
    torch.save(state, tmp_path / "a.pth")
    found = r"its tensors are model\.encoder\.0\.weight, model\.encoder\.0\.bias, model\.encoder\.2.*\(14\)"
    expected = r"expected are bn1\.weight, bn1\.bias, bn1\.running_mean, … \(70\)"
    with pytest.raises(CheckpointError, match=f"is not a DGCNN: tensor .* is missing; {found}; {expected}"):
        classifiers.load("dgcnn", tmp_path / "a.pth")
    expected = r"expected are decoder\.fc_p\.weight, decoder\.fc_out\.weight"
    with pytest.raises(
        CheckpointError, match=f"is not a network of the kind 'occupancy': .*; {found}; {expected}"
    ):
        load_network(tmp_path / "a.pth")
    del state["model.decoder.4.bias"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(
        CheckpointError, match=r"1 tensors differ: decoder\.4\.bias is missing; its .*encoder"
    ):
        load_weights(AutoEncoder(8, 20), tmp_path / "a.pth")


def test_what_lies_inside_of_the_prefix_must_be_the_networks(tmp_path: Path) -> None:
    state = under("model.", state_of("auto-encoder") | {"criterion.weight": torch.ones(5)})
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"1 tensors differ: criterion\.weight is unexpected"):
        AutoEncoder.load(tmp_path / "a.pth")


def test_a_file_without_end_is_read_to_a_depth(tmp_path: Path) -> None:
    state = state_of("auto-encoder")
    loop: dict[str, Any] = {"state_dict": state}
    loop["self"] = loop
    torch.save(loop, tmp_path / "loop.pth")
    check("auto-encoder", tmp_path / "loop.pth", state)
    deep: dict[str, Any] = {"state_dict": state}
    for _ in range(300):
        deep = {"a" * 100: deep}
    torch.save(deep, tmp_path / "deep.pth")
    with pytest.raises(CheckpointError, match="holds no dict of tensors"):
        AutoEncoder.load(tmp_path / "deep.pth")


def test_weights_to_start_from_may_be_wrapped(tmp_path: Path) -> None:
    state = state_of("occupancy")
    torch.save({"ema": under("_orig_mod.", state)}, tmp_path / "a.pth")
    network = cast(nn.Module, occupancy())
    load_weights(network, tmp_path / "a.pth")
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    load_into(network, load_state(tmp_path / "a.pth", tuple(state)))
