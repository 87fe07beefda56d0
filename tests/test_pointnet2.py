"""PointNet++ and its neighbourhood layers against naive implementations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from classifiers import neighbourhoods
from classifiers.neighbourhoods import batched_neighbour_max, group_max_linear, rows_of
from classifiers.pointnet2 import MultiScaleAbstraction, PointNet2, Scale, SetAbstraction
from ifdefense.geometry.points import farthest_point_sampling


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Gives batch norms weights of both signs and running statistics that are not the initial ones."""
    torch.manual_seed(seed)
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            part.weight.data.uniform_(-1.5, 1.5)
            part.bias.data.normal_(std=0.3)
            part.running_mean.normal_(std=0.3)
            part.running_var.uniform_(0.5, 2)


def clouds(*shape: int, seed: int = 3) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5


def naive_balls(points: Tensor, features: Tensor | None, centres: int, scale: Scale, first: bool) -> Tensor:
    """Edge features ``(B, C, S, k)`` of one cloud after the other, by loops."""
    batches = []
    for b, cloud in enumerate(points):
        chosen = farthest_point_sampling(points[b : b + 1].detach(), min(centres, len(cloud)))[0].tolist()
        chosen = list(range(len(cloud))) if len(cloud) <= centres else chosen
        rows = []
        for c in chosen:
            near = [j for j in range(len(cloud)) if (cloud[j] - cloud[c]).norm() < scale.radius]
            near = (near + [near[0]] * scale.neighbours)[: scale.neighbours]
            edges = []
            for j in near:
                offset = cloud[j] - cloud[c]
                parts = [offset] if features is None else [offset, features[b, j]]
                edges.append(torch.cat(parts if first else parts[::-1]))
            rows.append(torch.stack(edges))
        batches.append(torch.stack(rows))
    return torch.stack(batches).permute(0, 3, 1, 2)


def naive_layers(x: Tensor, convolutions: nn.ModuleList, norms: nn.ModuleList) -> Tensor:
    for layer, norm in zip(convolutions, norms, strict=True):
        x = norm(layer(x)).relu()
    return x.amax(3).mT


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_features", [True, False])
@pytest.mark.parametrize("centres", [6, 100])
def test_a_level_equals_its_naive_twin(training: bool, with_features: bool, centres: int) -> None:
    scale = Scale(0.5, 5, (4, 6, 8))
    level = SetAbstraction(centres, scale, 2 if with_features else 0).double().train(training)
    randomise(level)
    points = clouds(2, 12, 3).requires_grad_()
    features = clouds(2, 12, 2, seed=4).requires_grad_() if with_features else None
    before = {name: value.clone() for name, value in level.state_dict().items()}
    _, ours = level(points, features)
    inputs = [points, *level.parameters()] + ([] if features is None else [features])
    direction = clouds(*ours.shape, seed=5)
    mine = torch.autograd.grad((ours * direction).sum(), inputs, allow_unused=True, materialize_grads=True)
    updated = {name: value.clone() for name, value in level.state_dict().items()}
    level.load_state_dict(before)
    theirs = naive_layers(naive_balls(points, features, centres, scale, True), level.mlp_convs, level.mlp_bns)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    for name, value in level.state_dict().items():
        torch.testing.assert_close(updated[name], value, msg=name)
    naive = torch.autograd.grad((theirs * direction).sum(), inputs)
    for one, other in zip(mine, naive, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_a_level_of_several_scales_equals_its_naive_twin() -> None:
    scales = (Scale(0.4, 3, (4, 4, 6)), Scale(0.7, 6, (4, 5, 7)))
    level = MultiScaleAbstraction(6, scales, 2).double().eval()
    randomise(level)
    points, features = clouds(2, 12, 3), clouds(2, 12, 2, seed=4)
    centres, ours = level(points, features)
    assert centres.shape == (2, 6, 3)
    blocks = zip(scales, level.conv_blocks, level.bn_blocks, strict=True)
    theirs = [naive_layers(naive_balls(points, features, 6, s, False), c, n) for s, c, n in blocks]
    torch.testing.assert_close(ours, torch.cat(theirs, 2), rtol=1e-7, atol=1e-9)


def test_the_last_level_pools_everything() -> None:
    level = SetAbstraction(None, Scale(1.0, 0, (4, 6, 8)), 2).double().eval()
    randomise(level)
    points, features = clouds(2, 12, 3), clouds(2, 12, 2, seed=4)
    whole = torch.cat([points, features], 2).mT.unsqueeze(2)
    theirs = naive_layers(whole, level.mlp_convs, level.mlp_bns).squeeze(1)
    torch.testing.assert_close(level(points, features)[1], theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("multi_scale", [False, True])
@pytest.mark.parametrize("size", [16, 130])
def test_logits_of_any_size_do_not_depend_on_the_batch(multi_scale: bool, size: int) -> None:
    torch.manual_seed(0)
    model = PointNet2(4, multi_scale).double().eval()
    randomise(model)
    points = clouds(2, size, 3)
    before = points.clone()
    with torch.no_grad():
        together, alone = model(points), model(points[1:])
    assert together.shape == (2, 4)
    assert (together[0] - together[1]).abs().max() > 1e-6
    torch.testing.assert_close(alone[0], together[1], rtol=1e-10, atol=1e-12)
    assert torch.equal(points, before)


def test_points_of_another_layout_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected points of shape \(B, N, 3\), got \(2, 3, 50\)"):
        PointNet2(4)(torch.zeros(2, 3, 50))


@pytest.mark.parametrize("chunk", [1, 1 << 18])
def test_maximum_over_groups_is_exact_in_any_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbourhoods, "numbers_per_block", lambda _: chunk)
    x, weight = clouds(2, 3, 5, 4).requires_grad_(), clouds(6, 4, seed=1).requires_grad_()
    torch.testing.assert_close(group_max_linear(x, weight), (x @ weight.T).amax(2))
    assert torch.autograd.gradcheck(group_max_linear, (x, weight))


def test_the_first_of_equal_members_takes_the_gradient() -> None:
    x = torch.ones(1, 1, 3, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(group_max_linear(x, torch.ones(4, 2)).sum(), x)
    assert grad[0, 0].tolist() == [[4, 4], [0, 0], [0, 0]]


def test_maximum_over_neighbours_is_exact() -> None:
    values = clouds(2, 7, 4).requires_grad_()
    index = torch.randint(7, (2, 5, 3), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(batched_neighbour_max(values, index), rows_of(values, index).amax(2))
    assert torch.autograd.gradcheck(lambda x: batched_neighbour_max(x, index), (values,))


def test_small_clouds_have_centres_and_neighbours_in_proportion() -> None:
    torch.manual_seed(0)
    model, points = PointNet2(5).double().eval(), clouds(2, 300, 3)
    sizes = []
    for level in (model.sa1, model.sa2):
        level.register_forward_hook(lambda _, inputs, outputs: sizes.append(outputs[1].shape[1]))
    whole = model(points)
    model.sized_for(256)
    sparse = model(points)
    model.sized_for(1024)
    assert torch.equal(model(points), whole)
    assert not torch.allclose(sparse, whole)
    assert sizes == [300, 128, 128, 32, 300, 128]
