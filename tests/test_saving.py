"""Purifiers as folders: what was saved is loaded again, bit for bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from quick import CLOUDS, quick
from torch import Tensor

import ifdefense
from ifdefense import Compose, Purifier, purify
from ifdefense.checkpoints import CheckpointError, load_tensors
from ifdefense.purifiers.base import Outcome
from ifdefense.purifiers.filters import RandomisedInput, StatisticalOutlierRemoval
from ifdefense.purifiers.function import _pretrained
from ifdefense.purifiers.registry import METHODS
from ifdefense.purifiers.surface import SurfacePurifier


class Shrunk(Purifier):
    """A purifier of somebody else."""

    name = "shrunk"

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def run(self, clouds: list[Tensor], counts: Any, seed: int) -> list[Outcome]:
        return [Outcome(cloud * self.factor) for cloud in clouds]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_saved_and_loaded(method: str, tmp_path: Path) -> None:
    purifier = quick(method)
    purifier.save(tmp_path / "saved")
    again = ifdefense.load(tmp_path / "saved")
    assert torch.equal(again(CLOUDS, 24, seed=3), purifier(CLOUDS, 24, seed=3))
    assert again.spec() == purifier.spec() and again.name == method and not again.training
    assert not any(weight.requires_grad for weight in again.parameters())
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    expected = {"purifier.json", "weights.safetensors"} if list(purifier.parameters()) else {"purifier.json"}
    assert files == expected and [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_weights_that_were_tuned_are_saved(tmp_path: Path) -> None:
    purifier = quick("local-mesh")
    with torch.no_grad():
        for weight in purifier.parameters():
            weight *= 1.0001  # no longer float16
    purifier.save(tmp_path / "tuned")
    again = ifdefense.load(tmp_path / "tuned")
    for name, value in purifier.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert torch.equal(again(CLOUDS, 24), purifier(CLOUDS, 24))


def test_networks_that_are_shared_are_shared_afterwards(tmp_path: Path) -> None:
    quick("local-mesh").save(tmp_path / "saved")
    surface = ifdefense.load(tmp_path / "saved").parts[-1]  # type: ignore[index, union-attr]
    assert isinstance(surface, SurfacePurifier)
    assert surface.restorer.mesh.repair.network.local is surface.network  # type: ignore[attr-defined]


def test_axes_and_settings_are_saved(tmp_path: Path) -> None:
    purifier = quick("onet-mesh")
    network = purifier.parts[-1].network  # type: ignore[index, union-attr]
    network.up_axis, network.views = "y", 2
    purifier.save(tmp_path / "saved")
    again = ifdefense.load(tmp_path / "saved")
    assert again.parts[-1].network.up_axis == "y"  # type: ignore[index, union-attr]
    assert torch.equal(again(CLOUDS, 24), purifier(CLOUDS, 24))


def test_chains_with_purifiers_of_others(tmp_path: Path) -> None:
    chain = Compose([Shrunk(0.5), StatisticalOutlierRemoval(3), RandomisedInput(0.7, 0.0)], "mine")
    chain.save(str(tmp_path / "a" / "b"))
    again = purify(CLOUDS, str(tmp_path / "a" / "b"))
    assert torch.equal(again, chain(CLOUDS))


def test_purify_notices_that_a_folder_has_changed(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    Compose([Shrunk(0.5)]).save(folder)
    _pretrained.cache_clear()
    before = purify(CLOUDS, folder)
    path = folder / "purifier.json"
    path.write_text(path.read_text().replace("0.5", "0.25"))
    assert not torch.equal(purify(CLOUDS, folder), before)


# What cannot be saved


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_nothing_is_overwritten(taken: str, tmp_path: Path) -> None:
    target = tmp_path / "saved"
    if taken == "file":
        target.write_text("mine")
    else:
        quick("sor").save(target)
    before = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    with pytest.raises(FileExistsError, match="saved exists and is not an empty folder; nothing was saved"):
        quick("srs").save(target)
    assert [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()] == before


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    quick("sor").save(tmp_path)
    assert ifdefense.load(tmp_path).name == "sor"


class Lambda(Purifier):
    name = "lambda"

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def run(self, clouds: list[Tensor], counts: Any, seed: int) -> list[Outcome]:
        return [Outcome(self.function(cloud)) for cloud in clouds]


def test_parts_that_cannot_be_described(tmp_path: Path) -> None:
    class Local(Shrunk):
        pass

    with pytest.raises(TypeError, match="lambda cannot be saved: a function cannot be described"):
        Lambda(lambda cloud: cloud).save(tmp_path / "saved")
    with pytest.raises(TypeError, match=r"shrunk cannot be saved: \S+<locals>.Local cannot be imported"):
        Local(0.5).save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


# What cannot be loaded


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    quick("sor-ae").save(tmp_path / "saved")
    return tmp_path / "saved"


def changed(folder: Path, **changes: Any) -> None:
    path = folder / "purifier.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spec_of(folder: Path) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads((folder / "purifier.json").read_text())["purifier"]
    return spec


def test_folders_that_are_foreign_or_damaged(saved: Path) -> None:
    (saved / "other").mkdir()
    with pytest.raises(ValueError, match=r"other is not a saved purifier: it has no purifier.json"):
        ifdefense.load(saved / "other")
    path, text = saved / "purifier.json", (saved / "purifier.json").read_text()
    for content, message in (
        (text[:-20], r"purifier.json is damaged: Expecting"),
        ("[]", r"purifier.json does not describe a purifier"),
        ('{"name": "other"}', r"purifier.json does not describe a purifier"),
        ('{"format": 99}', r"was saved by a later version of ifdefense, \?"),
        ('{"format": 1, "purifier": {}}', "is damaged: its networks and its purifier do not fit"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            ifdefense.load(saved)


def test_weights_that_are_missing_damaged_or_others(saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = saved / "weights.safetensors"
    tensors = load_tensors(path)
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first] + 1}, path)
    with pytest.raises(CheckpointError, match=r"the weights in \S+ differ from those in purifier.json"):
        ifdefense.load(saved)
    save_file({name: value for name, value in tensors.items() if name != first}, path)
    with pytest.raises(CheckpointError, match="does not fit AutoEncoder: 1 tensors differ"):
        ifdefense.load(saved)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"weights.safetensors is truncated or no checkpoint"):
        ifdefense.load(saved)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at \S+weights.safetensors"):
        ifdefense.load(saved)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        ("subprocess:Popen", "subprocess:Popen is not the class of a part of a purifier"),
        ("ifdefense.cli:main", "ifdefense.cli:main is not the class"),
        ("ifdefense.devices:torch.nn.Linear", "torch.nn.Linear is not the class"),
        ("ifdefense.nowhere:Purifier", "there is no class ifdefense.nowhere:Purifier"),
        (
            "unheard_of:Purifier",
            "there is no class unheard_of:Purifier: import unheard_of first, if you trust",
        ),
        ("ifdefense.restorers.mesh:MeshRestorer", "holds a MeshRestorer, not a purifier"),
    ],
)
def test_a_folder_runs_no_code_but_that_of_purifiers(cls: str, message: str, tmp_path: Path) -> None:
    import subprocess  # the module of one of them is there  # noqa: F401

    quick("sor").save(tmp_path)
    changed(tmp_path, purifier={"class": cls, "options": {}})
    with pytest.raises(ValueError, match=message):
        ifdefense.load(tmp_path)


def test_options_that_do_not_fit_name_the_folder(tmp_path: Path) -> None:
    quick("srs").save(tmp_path)
    for options in ({"drop": 9, "of": 1}, {"drop": 9, "shape": 1}):
        changed(tmp_path, purifier=spec_of(tmp_path) | {"options": options})
        with pytest.raises(ValueError, match=rf"{tmp_path}\S* cannot be loaded: .*(cannot drop 9|shape)"):
            ifdefense.load(tmp_path)


def test_the_example_of_the_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / "docs" / "integration.md").read_text(encoding="utf-8")
    (block,) = (each for each in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if ".save(" in each)
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {"points": CLOUDS}
    exec(block.replace("onet-mesh", "sor-ae"), space)
    assert torch.equal(space["clean"], space["chain"](CLOUDS))
