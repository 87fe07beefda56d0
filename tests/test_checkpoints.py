"""Checkpoints: loading without code execution, all-or-nothing fitting, float16."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ifdefense.checkpoints import (
    CheckpointError,
    load_into,
    load_metadata,
    load_state,
    save_safetensors,
    shipped,
)


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.mark.parametrize("wrapper", [None, "model", "model_state_dict", "state_dict", "net"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrapped_and_prefixed_checkpoints_load(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    source = make()
    state: dict[str, object] = {prefix + name: value for name, value in source.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "w.pth")
    target = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    load_into(target, load_state(tmp_path / "w.pth"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


def test_safetensors_are_half_precision_and_come_back(tmp_path: Path) -> None:
    source = make()
    save_safetensors(source, tmp_path / "w.safetensors", {"seed": "0"})
    state = load_state(tmp_path / "w.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float16, torch.int64}
    target = make()
    load_into(target, state)
    assert target[0].weight.dtype == torch.float32  # type: ignore[index]
    assert torch.equal(target[0].weight, source[0].weight.half().float())  # type: ignore[index]
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_misfit_names_the_tensors_and_changes_nothing() -> None:
    module = make()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = dict(make().state_dict(), extra=torch.zeros(1))
    state["0.weight"] = torch.zeros(5, 3)
    del state["0.bias"]
    with pytest.raises(
        CheckpointError,
        match=r"3 tensors differ: 0.bias is missing; 0.weight is \(5, 3\), not \(4, 3\); extra",
    ):
        load_into(module, state, "w.pth")
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def files_of_public_code(module: nn.Module) -> dict[str, dict[str, object]]:
    """Checkpoints with the entries that the training programs of the field put beside the tensors."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    module(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    state, optimizer_state = module.state_dict(), optimizer.state_dict()
    return {
        # yanx27/Pointnet_Pointnet2_pytorch, train_classification.py
        "yanx27": {
            "epoch": 181,
            "instance_acc": np.mean([0.9, 0.8]),
            "class_acc": np.mean(np.ones((3, 2)), axis=0)[0],
            "model_state_dict": state,
            "optimizer_state_dict": optimizer_state,
        },
        # autonomousvision/occupancy_networks, im2mesh/checkpoints.py
        "occupancy": {
            "epoch_it": 7,
            "it": np.int64(310000),
            "loss_val_best": np.float64(0.731),
            "model": state,
            "optimizer": optimizer_state,
        },
        # ma-xu/pointMLP-pytorch, classification_ModelNet40/utils
        "pointmlp": {
            "net": {f"module.{name}": value for name, value in state.items()},
            "epoch": 300,
            "acc": 93.5,
            "best_test_acc": np.float32(94.1),
            "optimizer": optimizer_state,
        },
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("author", ["yanx27", "occupancy", "pointmlp"])
def test_public_checkpoints_load_as_their_code_writes_them(tmp_path: Path, author: str, legacy: bool) -> None:
    source = make()
    content = files_of_public_code(source)[author]
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    state = load_state(tmp_path / "w.pth")
    assert state.keys() == source.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in source.state_dict().items())


def test_numpy_scalars_are_read_under_the_names_of_numpy_1_and_2(tmp_path: Path) -> None:
    torch.save(
        {"a": np.float64(0.5), "model": make().state_dict()},
        tmp_path / "w.pth",
        _use_new_zipfile_serialization=False,
    )
    content = (tmp_path / "w.pth").read_bytes()
    modules = (b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert any(module in content for module in modules)
    for module in modules:
        (tmp_path / "w.pth").write_bytes(re.sub(rb"numpy\._?core\.multiarray", module, content))
        assert "0.weight" in load_state(tmp_path / "w.pth")


def test_numpy_arrays_and_objects_stay_refused(tmp_path: Path) -> None:
    for content in (np.ones(3), np.dtype("O"), np.ones(1, "f4,f4")[0]):
        torch.save({"extra": content, "model": make().state_dict()}, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match="is refused"):
            load_state(tmp_path / "w.pth")


def test_the_allowance_for_numpy_ends_with_the_call(tmp_path: Path) -> None:
    torch.save({"a": np.float64(0.5), "model": make().state_dict()}, tmp_path / "w.pth")
    load_state(tmp_path / "w.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "w.pth", weights_only=True)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path, suffix: str, value: float) -> None:
    module = make()
    with torch.no_grad():
        module[0].weight[1, 2] = value  # type: ignore[index]
    if suffix == ".pth":
        torch.save({"net": module.state_dict()}, tmp_path / "w.pth")
    else:
        save_safetensors(module, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"1 of the 12 values of 0\.weight are not finite"):
        load_state(tmp_path / f"w{suffix}")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"what is this", "is truncated or no checkpoint"),
    ],
)
def test_files_that_are_no_weights_are_said_to_be_what_they_are(
    tmp_path: Path, suffix: str, content: bytes, message: str
) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_state(path)
    assert path.name in str(caught.value)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch evil",)


class Disguised:
    """Calls a method of an allowed class, which is not allowed itself."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return np.dtype("f8").type.fromhex, ("0x1p3",)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    torch.save({"a": np.float64(1), "model": Disguised()}, tmp_path / "disguised.pth")
    for name in ("evil.pth", "raw.pth", "disguised.pth"):
        with pytest.raises(CheckpointError, match=f"{name} is refused.*would run") as caught:
            load_state(tmp_path / name)
        assert "weights_only" not in str(caught.value) and "trust" not in str(caught.value)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_broken_files_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_state(path)
    if suffix == ".pth":
        torch.save(make().state_dict(), path)
    else:
        save_safetensors(make(), path)
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=path.name):
            load_state(path)


@pytest.mark.parametrize("content", [{}, {"model": 3}, [torch.zeros(2)], {"a": torch.zeros(1), "b": "text"}])
def test_no_dict_of_tensors(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds no dict of tensors"):
        load_state(tmp_path / "w.pth")


def test_unknown_shipped_weights_list_what_there_is() -> None:
    with pytest.raises(ValueError, match="no weights named 'nothing' are shipped with ifdefense; there are:"):
        shipped("ifdefense", "nothing")


def test_values_beyond_half_precision_survive(tmp_path: Path) -> None:
    module = make()
    module[1].running_var.fill_(1e6)  # type: ignore[index,operator,union-attr]
    save_safetensors(module, tmp_path / "w.safetensors")
    state = load_state(tmp_path / "w.safetensors")
    assert state["1.running_var"].tolist() == [1e6] * 4 and state["0.weight"].dtype == torch.float16


def test_metadata_come_back(tmp_path: Path) -> None:
    save_safetensors(make(), tmp_path / "w.safetensors", {"network": "onet", "calibration": '{"box": 1.2}'})
    assert load_metadata(tmp_path / "w.safetensors") == {"network": "onet", "calibration": '{"box": 1.2}'}
    save_safetensors(make(), tmp_path / "bare.safetensors")
    torch.save(make().state_dict(), tmp_path / "w.pth")
    assert load_metadata(tmp_path / "bare.safetensors") == load_metadata(tmp_path / "w.pth") == {}
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_metadata(tmp_path / "other.safetensors")
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:20])
    with pytest.raises(CheckpointError, match=r"w\.safetensors is truncated or no checkpoint"):
        load_metadata(tmp_path / "w.safetensors")
