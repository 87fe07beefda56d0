"""DGCNN against a naive implementation with explicit edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classifiers.dgcnn import DGCNN, nearest_features, smallest
from classifiers.layers import max_and_mean_pooled


def trained(neighbours: int = 6) -> DGCNN:
    """A network in double precision whose batch norms have both signs and statistics of their own."""
    torch.manual_seed(0)
    model = DGCNN(5, neighbours, dropout=0.0).double()
    for part in model.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            part.weight.data.uniform_(-1.5, 1.5)
            part.bias.data.normal_(std=0.3)
            part.running_mean.normal_(std=0.3)
            part.running_var.uniform_(0.5, 2)
    return model


def naive(model: DGCNN, points: Tensor) -> Tensor:
    """The paper's network: every edge feature, layer by layer."""
    x, parts = points, []
    for block in (model.conv1, model.conv2, model.conv3, model.conv4):
        k = min(model.neighbours, x.shape[1])
        with torch.no_grad():
            index = (x.unsqueeze(2) - x.unsqueeze(1)).norm(dim=3).argsort(2)[..., :k]
        neighbours = torch.stack([cloud[i] for cloud, i in zip(x, index, strict=True)])
        own = x.unsqueeze(2).expand_as(neighbours)
        edges = torch.cat([neighbours - own, own], 3).permute(0, 3, 1, 2)
        x = F.leaky_relu(block(edges), 0.2).amax(3).mT
        parts.append(x)
    x = F.leaky_relu(model.conv5(torch.cat(parts, 2).mT), 0.2)
    x = torch.cat([x.amax(2), x.mean(2)], 1)
    x = F.leaky_relu(model.bn6(model.linear1(x)), 0.2)
    return model.linear3(F.leaky_relu(model.bn7(model.linear2(x)), 0.2))


def clouds(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
def test_network_equals_its_naive_twin(training: bool) -> None:
    model = trained().train(training)
    points = clouds(3, 20, 3).requires_grad_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ours = model(points)
    inputs = [points, *model.parameters()]
    mine = torch.autograd.grad(ours.square().sum(), inputs, allow_unused=True, materialize_grads=True)
    updated = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(before)
    theirs = naive(model, points)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(updated[name], value, msg=name)
    naive_grads = torch.autograd.grad(theirs.square().sum(), inputs)
    for one, other in zip(mine, naive_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_nearest_features_are_those_of_sorting_also_far_from_the_origin() -> None:
    x = clouds(2, 30, 5)
    expected = torch.cdist(x, x).argsort(2)[..., :4].sort(2).values
    assert torch.equal(nearest_features((x + 100).float(), 4).sort(2).values, expected)


def test_maximum_and_mean_in_one_pass_have_exact_gradients() -> None:
    layer, norm = nn.Conv1d(3, 4, 1).double(), nn.BatchNorm1d(4).double().eval()
    x = clouds(2, 40, 3).requires_grad_()
    y = F.leaky_relu(norm(layer(x.mT)), 0.2)
    torch.testing.assert_close(max_and_mean_pooled(x, layer, norm, 0.2), torch.cat([y.amax(2), y.mean(2)], 1))
    inputs = (x, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(lambda *_: max_and_mean_pooled(x, layer, norm, 0.2), inputs)


def test_logits_of_small_clouds_do_not_depend_on_the_batch() -> None:
    model = trained(neighbours=20).float().eval()
    points = clouds(3, 16, 3).float()
    logits = model(points)
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    torch.testing.assert_close(model(points[1:2])[0], logits[1], rtol=1e-4, atol=1e-5)


def test_every_batch_norm_of_a_convolution_has_two_names() -> None:
    model = DGCNN(5)
    assert model.conv3[1] is model.bn3
    state = model.state_dict()
    assert state["conv3.1.bias"].data_ptr() != state["bn3.bias"].data_ptr()  # for safetensors
    state["bn3.bias"] = state["conv3.1.bias"] = torch.full((128,), 7.0)
    model.load_state_dict(state)
    assert (model.bn3.bias == 7).all()


@pytest.mark.parametrize(
    ("columns", "k", "group"), [(64, 3, 4), (67, 4, 8), (67, 67, 8), (9, 1, 16), (200, 12, 8)]
)
def test_smallest_columns_are_those_of_sorting(columns: int, k: int, group: int) -> None:
    values = clouds(50, columns)
    chosen = smallest(values, k, group)
    assert torch.equal(chosen.sort(1).values, values.argsort(1)[:, :k].sort(1).values)


def test_smallest_columns_with_ties_have_the_smallest_values() -> None:
    values = clouds(50, 100).mul(2).round()
    chosen = smallest(values, 9)
    assert all(len(set(row)) == 9 for row in chosen.tolist())
    assert torch.equal(values.gather(1, chosen).sort(1).values, values.sort(1).values[:, :9])


def test_small_clouds_have_neighbourhoods_in_proportion() -> None:
    model, points = trained(neighbours=20).eval(), clouds(2, 40, 3)
    model.sized_for(512)
    sparse = model(points)
    model.neighbours, model.sparsity = 10, 1.0
    assert torch.equal(sparse, model(points))
    model.neighbours = 20
    assert not torch.allclose(sparse, model(points))
    model.sized_for(1)
    fewest = model(points)
    model.neighbours, model.sparsity = 8, 1.0
    assert torch.equal(fewest, model(points))
