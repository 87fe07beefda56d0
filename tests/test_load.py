"""Public checkpoints: names and shapes of the reference tables, and errors on misfits."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import classifiers
from classifiers import build, load
from classifiers.dgcnn import DGCNN
from ifdefense.checkpoints import save_safetensors
from ifdefense.data.cloudset import CloudSet
from ifdefense.data.modelnet import load_modelnet40
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.shapes.procedural import make_dataset

TABLES = [
    ("pointnet", "pointnet_yanx27"),
    ("pointnet", "pointnet_ifdefense"),
    ("pointnet2-ssg", "pointnet2_ssg_yanx27"),
    ("pointnet2-ssg", "pointnet2_ifdefense"),
    ("dgcnn", "dgcnn_antao97"),
    ("dgcnn", "dgcnn_ifdefense"),
    ("pointconv", "pointconv_ifdefense"),
]
MILLIONS = {"pointnet2-ssg": 1.48, "pct": 2.88, "pointmlp": 13.2, "pointmlp-elite": 0.72}


def table(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a public checkpoint, from beside the data; the test skips where they are not."""
    root = os.environ.get("IFDEFENSE_DATA")
    if not root:
        pytest.skip("IFDEFENSE_DATA is not set: this test reads the reference tables beside it")
    path = Path(root).parent / "reference" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    tensors = json.loads(path.read_text())["tensors"]
    return {tensor: tuple(shape) for tensor, shape in tensors.items()}


def tensors_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A different constant for every tensor."""
    return {name: torch.full(shape, float(number)) for number, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize(("network", "name"), TABLES, ids=[name for _, name in TABLES])
def test_every_tensor_of_a_reference_table_finds_its_place(network: str, name: str) -> None:
    shapes = table(name)
    state = classifiers.canonical(network, tensors_of(shapes))
    plain = {"feature_transform": False} if name == "pointnet_ifdefense" else {}
    with torch.device("meta"):
        own = build(network, **plain).state_dict()
    assert {tensor: tuple(value.shape) for tensor, value in state.items()} == {
        tensor: tuple(value.shape) for tensor, value in own.items()
    }
    if not name.endswith("_ifdefense") or network in ("pointnet2-ssg", "pointconv"):
        assert shapes.keys() == own.keys()


@pytest.mark.parametrize("network", MILLIONS)
def test_sizes_are_the_published_ones(network: str) -> None:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build(network).parameters())
    assert count / 1e6 == pytest.approx(MILLIONS[network], rel=0.01)


@pytest.mark.parametrize("name", ["pointnet_ifdefense", "dgcnn_ifdefense"])
def test_a_checkpoint_in_if_defences_naming_loads_as_it_was(name: str, tmp_path: Path) -> None:
    network = name.partition("_")[0]
    shapes = table(name)
    state = tensors_of(shapes)
    if network == "dgcnn":  # one batch norm under two names
        for alias, own in {f"conv{i}.1": f"bn{i}" for i in range(1, 6)}.items():
            state |= {f"{alias}.{k.rpartition('.')[2]}": v for k, v in state.items() if k.startswith(own)}
        for alias, own in {"linear1.1": "bn6", "linear2.1": "bn7"}.items():
            state |= {f"{alias}.{k.rpartition('.')[2]}": v for k, v in state.items() if k.startswith(own)}
    torch.save({f"module.{tensor}": value for tensor, value in state.items()}, tmp_path / "a.pth")
    loaded = load(network, tmp_path / "a.pth").state_dict()
    for tensor, value in classifiers.canonical(network, state).items():
        assert torch.equal(loaded[tensor], value), tensor
    if network == "pointnet":
        assert torch.equal(loaded["feat.stn.bn5.bias"], state["feat.stn.fc2.1.bias"])
        assert torch.equal(loaded["feat.bn3.running_var"], state["feat.conv3.1.running_var"])
        assert torch.equal(loaded["bn1.weight"], state["fc1.1.weight"])


@pytest.mark.parametrize("network", ["pointnet2-msg", "dgcnn", "pct", "pointmlp-elite"])
def test_our_own_files_load(network: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(network, 7).half().float()  # files are in half precision
    save_safetensors(model, tmp_path / "a.safetensors")
    loaded = load(network, tmp_path / "a.safetensors")
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("wrapper", [None, "model_state_dict", "state_dict"])
def test_wrapped_checkpoints_load(wrapper: str | None, tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in build("pointnet2-ssg", 5).state_dict().items()}
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "a.pth")
    assert load("pointnet2-ssg", tmp_path / "a.pth").get_parameter("fc3.bias").shape == (5,)


def test_a_network_with_normals_is_refused_by_its_tensor(tmp_path: Path) -> None:
    state = build("pointnet2-ssg").state_dict()
    state["sa1.mlp_convs.0.weight"] = torch.zeros(64, 6, 1, 1)
    torch.save(state, tmp_path / "a.pth")
    message = r"sa1\.mlp_convs\.0\.weight is \(64, 6, 1, 1\), not \(64, 3, 1, 1\)"
    with pytest.raises(ValueError, match=message):
        load("pointnet2-ssg", tmp_path / "a.pth")


def test_another_network_is_refused_by_what_is_missing(tmp_path: Path) -> None:
    torch.save(build("pointnet2-ssg").state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"is not a DGCNN: tensor linear3\.bias is missing"):
        load("dgcnn", tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"does not fit PointNet2: \d+ tensors differ: sa1\.bn_blocks"):
        load("pointnet2-msg", tmp_path / "a.pth")


class Payload(nn.Module):
    """A module, which only a pickle that runs code can hold."""


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(Payload(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="is refused: it does not contain only tensors"):
        load("dgcnn", tmp_path / "a.pth")


def test_unknown_networks_are_refused() -> None:
    with pytest.raises(
        ValueError, match="unknown classifier 'pointnet3'; there are: pointnet, pointnet2-ssg"
    ):
        build("pointnet3")
    with pytest.raises(ValueError, match="no weights named 'pct' are shipped"):
        load("pct")
    with pytest.raises(ValueError, match="unknown classifier 'pctx'"):
        load("pctx")


SHIPPED = {
    "pointnet-modelnet40",
    "pointnet-modelnet40-hybrid",
    "dgcnn-modelnet40-adversarial",
    "pointnet2-ssg-modelnet40",
    "dgcnn-modelnet40",
    "dgcnn-modelnet40-hybrid",
}


PROCEDURAL = {"pointnet-procedural", "dgcnn-small-procedural"}


def test_every_shipped_file_has_a_card_and_together_they_are_small() -> None:
    folder = Path(classifiers.__file__).parent / "weights"
    files = sorted(folder.glob("*.safetensors"))
    assert {file.stem for file in files} == SHIPPED | PROCEDURAL
    assert all("* command: `" in file.with_suffix(".md").read_text() for file in files)
    others = Path(folder.parents[1], "ifdefense").rglob("*.safetensors")
    assert sum(file.stat().st_size for file in [*files, *others]) < 50e6


@pytest.fixture(scope="module")
def validation(data_root: Path) -> CloudSet:
    """Every 25th cloud."""
    whole = load_modelnet40(data_root, "validation")
    return whole[np.arange(0, len(whole.labels), 25)]


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_classifiers_know_validation_clouds(name: str, validation: CloudSet) -> None:
    fast = name.startswith("pointnet-")
    clouds = validation if fast else validation[np.arange(1, len(validation.labels), 2)]
    points = to_unit_sphere(torch.from_numpy(clouds.points))
    with torch.no_grad():
        predicted = classifiers.fold(classifiers.load(name))(points).argmax(1)
    bound = 0.75 if name.endswith("-adversarial") else 0.8  # robust, and less accurate on clean clouds
    assert (predicted == torch.from_numpy(clouds.labels)).double().mean() > bound


@pytest.mark.parametrize("name", sorted(PROCEDURAL))
def test_procedural_classifiers_know_clouds_of_other_seeds(name: str) -> None:
    clouds = make_dataset(4, 1024, seed=3)
    points = to_unit_sphere(torch.from_numpy(clouds.points))
    with torch.no_grad():
        predicted = classifiers.fold(classifiers.load(name))(points).argmax(1)
    assert (predicted == torch.from_numpy(clouds.labels)).double().mean() > 0.95


def test_the_small_dgcnn_is_small() -> None:
    path = Path(classifiers.__file__).parent / "weights" / "dgcnn-small-procedural.safetensors"
    assert path.stat().st_size < 150_000
    model = classifiers.load("dgcnn-small-procedural")
    assert isinstance(model, DGCNN) and model.neighbours == 10
