"""PointConv against a naive convolution, edge by edge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from classifiers.pointconv import DensityAbstraction, Network, PointConv, density
from ifdefense.geometry.points import farthest_point_sampling


def clouds(*shape: int, seed: int = 3) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5


def level(centres: int | None, training: bool) -> DensityAbstraction:
    """A level in double precision whose batch norms have statistics of their own."""
    torch.manual_seed(0)
    result = DensityAbstraction(centres, 4, 2, (4, 5, 6), 0.3).double().train(training)
    for part in result.modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            part.weight.data.uniform_(0.5, 1.5)
            part.bias.data.uniform_(0, 1)
            part.running_mean.normal_(std=0.1)
            part.running_var.uniform_(0.5, 2)
    return result


def naive_network(net: Network | DensityAbstraction, x: Tensor) -> Tensor:
    """Layers on ``(rows, C)``, as images of one column."""
    for layer, norm in zip(net.mlp_convs, net.mlp_bns, strict=True):
        flat = layer.weight.ndim == 3
        image = x.T.unsqueeze(0) if flat else x.T[None, :, :, None]
        x = norm(layer(image)).relu().reshape(-1, len(x)).T
    return x


def naive(net: DensityAbstraction, points: Tensor, features: Tensor) -> Tensor:
    """Equation 3: the sum over the neighbours of density times weights times features."""
    batch, count, _ = points.shape
    centres = points.mean(1, keepdim=True)
    if net.centres:
        chosen = farthest_point_sampling(points.detach(), net.centres)
        centres = torch.stack([cloud[index] for cloud, index in zip(points, chosen, strict=True)])
    dense = torch.stack([torch.stack([naive_density(p, cloud) for p in cloud]) for cloud in points])
    scale = naive_network(net.densitynet, dense.reshape(-1, 1)).view(batch, count)
    edges, offsets, scales = [], [], []
    for b in range(batch):
        for centre in centres[b]:
            distance = (points[b] - centre).norm(dim=1)
            near = distance.argsort()[: net.neighbours] if net.centres else torch.arange(count)
            offsets.append(points[b, near] - centre)
            edges.append(torch.cat([offsets[-1], features[b, near]], 1))
            scales.append(scale[b, near])
    k = len(edges[0])
    x = naive_network(net, torch.cat(edges)).unflatten(0, (-1, k))
    weights = naive_network(net.weightnet, torch.cat(offsets)).unflatten(0, (-1, k))
    product = torch.einsum("ek,ekc,ekw->ecw", torch.stack(scales), x, weights).flatten(1)
    return net.bn_linear(net.linear(product)).relu().view(batch, centres.shape[1], -1)


def naive_density(point: Tensor, cloud: Tensor) -> Tensor:
    squared = ((cloud - point) ** 2).sum(1)
    return (torch.exp(-squared / (2 * 0.3**2)) / (2.5 * 0.3)).mean()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("centres", [5, None])
def test_a_level_equals_its_naive_twin(training: bool, centres: int | None) -> None:
    net = level(centres, training)
    points, features = clouds(2, 9, 3).requires_grad_(), clouds(2, 9, 2, seed=4)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    _, ours = net(points, features)
    (mine,) = torch.autograd.grad(ours.square().sum(), points)
    net.load_state_dict(before)
    theirs = naive(net, points, features)
    assert ours.shape == (2, 5 if centres else 1, 6)
    assert ours.std() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    (other,) = torch.autograd.grad(theirs.square().sum(), points)
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_density_is_highest_where_the_points_are() -> None:
    crowd = torch.cat([torch.zeros(1, 9, 3), torch.ones(1, 1, 3)], 1)
    result = density(crowd, 0.1)
    torch.testing.assert_close(result[0, :9], torch.full((9,), 0.9 / 0.25))
    assert float(result[0, 9]) == pytest.approx(0.1 / 0.25)


def test_logits_of_small_clouds_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    model = PointConv(4).eval()
    points = clouds(2, 16, 3).float()
    with torch.no_grad():
        logits = model(points)
        assert logits.shape == (2, 4)
        torch.testing.assert_close(model(points[1:])[0], logits[1], rtol=1e-4, atol=1e-5)
