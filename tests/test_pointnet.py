from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import classifiers
from classifiers import pointnet
from classifiers.layers import folded, max_pooled_linear
from classifiers.pointnet import PointNet, orthogonality_penalty
from ifdefense.checkpoints import save_safetensors

NORMS = ("weight", "bias", "running_mean", "running_var")
TRUNK = [(64, 128), (128, 1024)]
HEAD = [(1024, 512), (512, 256)]
REFERENCE = {  # convolutions, linear layers, and the channels of the batch norms
    "feat.stn.": ([(3, 64), *TRUNK], [*HEAD, (256, 9)], [64, 128, 1024, 512, 256]),
    "feat.": ([(3, 64), *TRUNK], [], [64, 128, 1024]),
    "feat.fstn.": ([(64, 64), *TRUNK], [*HEAD, (256, 4096)], [64, 128, 1024, 512, 256]),
    "": ([], [*HEAD, (256, 40)], [512, 256]),
}


def reference_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, (convolutions, linears, norms) in REFERENCE.items():
        for kind, layers, tail in (("conv", convolutions, (1,)), ("fc", linears, ())):
            for number, (inputs, outputs) in enumerate(layers, 1):
                shapes[f"{prefix}{kind}{number}.weight"] = (outputs, inputs, *tail)
                shapes[f"{prefix}{kind}{number}.bias"] = (outputs,)
        for number, channels in enumerate(norms, 1):
            shapes |= {f"{prefix}bn{number}.{name}": (channels,) for name in NORMS}
            shapes[f"{prefix}bn{number}.num_batches_tracked"] = ()
    return shapes


def randomise(module: nn.Module, seed: int) -> None:
    """Gives batch norms weights of both signs and running statistics that are not the initial ones."""
    torch.manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.weight.data.normal_()
            part.bias.data.normal_()
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)


def naive_pooled(x: Tensor, layer: nn.Conv1d, norm: nn.BatchNorm1d) -> Tensor:
    return norm(layer(x.mT)).amax(2)


class NaivePointNet:
    """The network as its authors' code writes it, on the tensors of ours."""

    def __init__(self, model: PointNet) -> None:
        self.model = model

    def trunk(self, net: nn.Module, x: Tensor) -> Tensor:
        x = net.bn2(net.conv2(net.bn1(net.conv1(x)).relu())).relu()
        return net.bn3(net.conv3(x)).relu().amax(2)

    def align(self, net: nn.Module, x: Tensor) -> Tensor:
        y = net.bn5(net.fc2(net.bn4(net.fc1(self.trunk(net, x))).relu())).relu()
        return net.fc3(y).view(-1, x.shape[1], x.shape[1]) + torch.eye(x.shape[1], dtype=x.dtype)

    def __call__(self, points: Tensor) -> Tensor:
        feat, x = self.model.feat, points.mT
        x = (x.mT @ self.align(feat.stn, x)).mT
        x = feat.bn1(feat.conv1(x)).relu()
        if feat.fstn is not None:
            x = (x.mT @ self.align(feat.fstn, x)).mT
        x = feat.bn3(feat.conv3(feat.bn2(feat.conv2(x)).relu())).amax(2)
        x = self.model.bn1(self.model.fc1(x)).relu()
        return self.model.fc3(self.model.bn2(self.model.fc2(x)).relu())


def test_tensors_are_those_of_the_public_checkpoints() -> None:
    state = PointNet().state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == reference_shapes()
    assert sum(p.numel() for p in PointNet().parameters()) == 3_471_473


@pytest.mark.parametrize("points", [1, 31, 32, 33, 100])
def test_max_pooled_linear_equals_the_plain_maximum(points: int) -> None:
    torch.manual_seed(points)
    x, weight = torch.randn(3, points, 5), torch.randn(7, 5)
    torch.testing.assert_close(max_pooled_linear(x, weight), (x @ weight.T).amax(1))


def test_max_pooled_linear_has_exact_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 40, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(max_pooled_linear, (x, weight))


def test_search_in_bfloat16_stays_close_and_is_exact_at_the_point_it_finds() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 200, 16), torch.randn(8, 16)
    scores = x @ weight.T
    found = max_pooled_linear(x, weight, torch.bfloat16)
    assert (found <= scores.amax(1) + 1e-5).all()
    assert (found >= scores.amax(1) - 0.05 * scores.std()).all()
    assert ((scores - found[:, None]).abs().amin(1) < 1e-5).all()


@pytest.mark.parametrize("training", [True, False])
def test_folded_and_pooled_layer_has_the_gradients_of_batch_norm(training: bool) -> None:
    layer, norm = nn.Conv1d(4, 6, 1).double(), nn.BatchNorm1d(6).double()
    randomise(nn.ModuleList([layer, norm]), seed=1)
    assert (norm.weight < 0).any()
    assert (norm.weight > 0).any()
    norm.train(training)
    x = torch.randn(3, 20, 4, dtype=torch.float64, requires_grad=True)
    parameters = (x, layer.weight, layer.bias, norm.weight, norm.bias)

    def fast(*_: Tensor) -> Tensor:
        return pointnet._pooled(x, layer, norm, None)

    assert torch.autograd.gradcheck(fast, parameters)
    direction = torch.randn(3, 6, dtype=torch.float64)
    ours = torch.autograd.grad(
        (fast() * direction).sum(), parameters, allow_unused=True, materialize_grads=True
    )
    naive = torch.autograd.grad((naive_pooled(x, layer, norm) * direction).sum(), parameters)
    for mine, theirs in zip(ours, naive, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def test_folding_updates_running_statistics_as_batch_norm_does() -> None:
    layer, ours, theirs = nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6), nn.BatchNorm1d(6)
    x = torch.randn(3, 20, 4) + 2
    for _ in range(3):
        folded(layer, ours, x)
        theirs(layer(x.mT))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("feature_transform", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_network_equals_its_naive_twin(feature_transform: bool, training: bool) -> None:
    model = PointNet(5, feature_transform, dropout=0.0).double()
    randomise(model, seed=2)
    model.train(training)
    points = torch.randn(4, 50, 3, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ours = model(points)
    updated = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(before)
    torch.testing.assert_close(ours, NaivePointNet(model)(points), rtol=1e-7, atol=1e-8)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(updated[name], value, msg=name)


def test_evaluation_does_not_depend_on_the_batch_or_the_order_of_points() -> None:
    model = PointNet(5).eval()
    points = torch.randn(3, 33, 3)
    logits = model(points)
    torch.testing.assert_close(model(points[1:2])[0], logits[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(points[:, torch.randperm(33)]), logits, rtol=1e-4, atol=1e-5)


def test_orthogonality_penalty_vanishes_on_rotations_only() -> None:
    rotations = torch.linalg.qr(torch.randn(3, 8, 8))[0]
    assert orthogonality_penalty(rotations) < 1e-5
    assert orthogonality_penalty(2 * rotations) == pytest.approx(
        3 * F.normalize(torch.ones(8), dim=0).sum().item()
    )


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 5), (2, 5, 4)])
def test_points_of_another_layout_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected points of shape \(B, N, 3\)"):
        PointNet(5)(torch.zeros(shape))


@pytest.mark.parametrize("wrapper", [None, "model_state_dict", "model", "state_dict"])
def test_public_checkpoints_load(tmp_path: Path, wrapper: str | None) -> None:
    model = PointNet(7)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "a.pth")
    loaded = classifiers.load("pointnet", weights=tmp_path / "a.pth")
    assert not loaded.training
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_safetensors_load_without_a_feature_transform(tmp_path: Path) -> None:
    save_safetensors(PointNet(7, feature_transform=False), tmp_path / "a.safetensors")
    loaded = classifiers.load("pointnet", weights=tmp_path / "a.safetensors")
    assert isinstance(loaded, PointNet)
    assert loaded.feat.fstn is None


def test_misfits_are_named(tmp_path: Path) -> None:
    state = PointNet(7).state_dict()
    state["fc1.weight"] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"fc1\.weight is \(3, 3\), not \(512, 1024\)"):
        classifiers.load("pointnet", weights=tmp_path / "a.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"not a PointNet: tensor fc3\.bias is missing"):
        classifiers.load("pointnet", weights=tmp_path / "b.pth")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown classifier 'resnet'"):
        classifiers.load("resnet")
    with pytest.raises(ValueError, match="no weights named 'pointnet-mnist'"):
        classifiers.load("pointnet-mnist")
