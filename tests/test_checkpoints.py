"""Weights are read without running code, fit whole or not at all, and travel as float16."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

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


@pytest.mark.parametrize("wrapper", [None, "model", "model_state_dict", "state_dict"])
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


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch evil",)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pth", "raw.pth"):
        with pytest.raises(CheckpointError, match=f"{name} is refused"):
            load_state(tmp_path / name)
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
    with pytest.raises(CheckpointError, match=r"w\.safetensors is no complete safetensors file"):
        load_metadata(tmp_path / "w.safetensors")
