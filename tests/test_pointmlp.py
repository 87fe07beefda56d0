"""PointMLP against a naive implementation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from classifiers.pointmlp import Grouper, PointMLP, Residual, Stage
from ifdefense.geometry.points import knn


def clouds(*shape: int, seed: int = 3) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5


@pytest.mark.parametrize("training", [True, False])
def test_a_stage_equals_its_naive_twin(training: bool) -> None:
    torch.manual_seed(0)
    grouper, stage = Grouper(4).double(), Stage(4, 6, 1, 5).double().train(training)
    grouper.affine_alpha.data.normal_()
    grouper.affine_beta.data.normal_()
    points, features = clouds(2, 9, 3), clouds(2, 9, 4, seed=4).requires_grad_()
    index = knn(points[:, :5], points, 3)[1]
    own = features[:, :5]
    ours = stage(grouper, features, own, index)
    offsets = torch.stack([f[i] for f, i in zip(features, index, strict=True)]) - own.unsqueeze(2)
    spread = torch.stack([cloud.std() for cloud in offsets]).view(2, 1, 1, 1) + 1e-5
    edges = grouper.affine_alpha * offsets / spread + grouper.affine_beta
    edges = torch.cat([edges, own.unsqueeze(2).expand(-1, -1, 3, -1)], 3).flatten(0, 1).mT
    x = stage.transfer.net(edges).relu()
    block = stage.operation[0]
    x = (block.net2(block.net1(x).relu()) + x).relu()
    theirs = x.amax(2).view(2, 5, 6)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    mine, other = (
        torch.autograd.grad(y.square().sum(), features, retain_graph=True)[0] for y in (ours, theirs)
    )
    torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)


def test_a_residual_block_without_weights_is_a_relu() -> None:
    block = Residual(3, 2).eval()
    torch.nn.init.zeros_(block.net2[0].weight)
    x = torch.randn(2, 5, 3)
    assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize("size", [16, 50])
def test_logits_do_not_depend_on_the_batch(size: int) -> None:
    torch.manual_seed(0)
    model = PointMLP(4, elite=True).eval()
    points = torch.stack([clouds(size, 3), 3 * clouds(size, 3, seed=5)]).float()  # another spread
    before = points.clone()
    with torch.no_grad():
        logits = model(points)
        assert logits.shape == (2, 4)
        torch.testing.assert_close(model(points[:1])[0], logits[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(points, before)
