"""PCT against a naive implementation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from classifiers.pct import PCT, Neighbourhoods, OffsetAttention
from ifdefense.geometry.points import farthest_point_sampling


def clouds(*shape: int, seed: int = 3) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5


@pytest.mark.parametrize("training", [True, False])
def test_neighbourhoods_equal_their_naive_twin(training: bool) -> None:
    torch.manual_seed(0)
    level = Neighbourhoods(5, 4, 6).double().train(training)
    level.bn1.weight.data.uniform_(-1, 1)
    level.bn2.weight.data.uniform_(-1, 1)
    points, features = clouds(2, 9, 3), clouds(2, 9, 3, seed=4).requires_grad_()
    centres, ours = level(points, features)
    edges = []
    for b, chosen in enumerate(farthest_point_sampling(points, 5)):
        for c in chosen:
            near = (points[b] - points[b, c]).norm(dim=1).argsort()[:4]
            own = features[b, c].expand(4, -1)
            edges.append(torch.cat([features[b, near] - own, own], 1))
    x = level.bn1(level.conv1(torch.stack(edges).mT)).relu()
    theirs = level.bn2(level.conv2(x)).relu().amax(2).view(2, 5, 6)
    assert centres.shape == (2, 5, 3)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    mine, other = (torch.autograd.grad(y.square().sum(), features)[0] for y in (ours, theirs))
    torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)


def test_attention_equals_its_naive_twin() -> None:
    torch.manual_seed(0)
    layer = OffsetAttention(8).double().eval()
    x = clouds(2, 6, 8)
    y = x.mT
    energy = layer.q_conv(y).mT @ layer.k_conv(y)
    weights = energy.exp() / energy.exp().sum(2, keepdim=True)
    weights = weights / (weights.sum(1, keepdim=True) + 1e-9)
    offset = y - layer.v_conv(y) @ weights
    theirs = y + layer.after_norm(layer.trans_conv(offset)).relu()
    torch.testing.assert_close(layer(x), theirs.mT)


def test_query_and_key_share_their_weights() -> None:
    layer = PCT(4).pt_last.sa2
    assert layer.q_conv.weight is layer.k_conv.weight


@pytest.mark.parametrize("size", [16, 40])
def test_logits_do_not_depend_on_the_batch(size: int) -> None:
    torch.manual_seed(0)
    model = PCT(4).eval()
    points = clouds(2, size, 3).float()
    with torch.no_grad():
        logits = model(points)
        assert logits.shape == (2, 4)
        torch.testing.assert_close(model(points[1:])[0], logits[1], rtol=1e-4, atol=1e-5)


def test_training_and_evaluation_agree_on_statistics_of_the_batch() -> None:
    torch.manual_seed(0)
    model = PCT(4, dropout=0.0).double().train()
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm1d):
            part.momentum = 1.0
    points = clouds(8, 40, 3)
    before = model(points)
    # The running variance is unbiased, the batch's own is not.
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.BatchNorm1d):
            edges = 32 if name.startswith("gather_local") else 1
            rows = 8 if name in ("bn6", "bn7") else 8 * 40 * edges
            part.running_var.mul_((rows - 1) / rows)
    torch.testing.assert_close(model.eval()(points), before, rtol=1e-6, atol=1e-8)
