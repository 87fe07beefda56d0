"""Networks of PyTorch Geometric as classifiers: logits, gradients, attacks, defences and the benchmark."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks import FGM, PGD
from benchmarks.cells import Cell
from benchmarks.clouds import load_clouds
from benchmarks.shards import Store, Task, run_shard
from classifiers import from_geometric
from ifdefense import Defended, load
from ifdefense.provenance import digest

pytest.importorskip(
    "torch_geometric", reason="PyTorch Geometric is not installed: pip install torch-geometric"
)

from torch_geometric.data import Batch, Data
from torch_geometric.nn import MLP, PointNetConv, PointTransformerConv, global_max_pool

from ifdefense.transforms import KNNGraph

CLASSES = 4


class PointNet(nn.Module):
    """Two layers of PointNet++ without sampling."""

    def __init__(self) -> None:
        super().__init__()
        self.first = PointNetConv(MLP([3, 8, 8], norm=None), MLP([8, 8], norm=None))
        self.second = PointNetConv(MLP([11, 8], norm=None))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, data: Data) -> Tensor:
        found = self.first(None, data.pos, data.edge_index)
        found = self.second(found, data.pos, data.edge_index)
        return self.head(global_max_pool(found, data.batch))


class PointTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.conv = nn.Linear(3, 8), PointTransformerConv(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, data: Data) -> tuple[Tensor, None]:
        found = self.conv(self.enter(data.pos), data.pos, data.edge_index)
        return self.head(global_max_pool(found, data.batch)), None


@pytest.fixture(params=[PointNet, PointTransformer], ids=lambda cls: cls.__name__)
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = request.param()
    return made.eval()


def clouds(count: int = 3, size: int = 40) -> Tensor:
    points = torch.randn(count, size, 3, generator=torch.Generator().manual_seed(1))
    return points / points.norm(dim=2, keepdim=True)


def first_of(returned: Any) -> Tensor:
    return returned[0] if isinstance(returned, tuple) else returned


# The graph


@pytest.mark.parametrize("loop", [False, True])
def test_edges_come_from_the_nearest_points(loop: bool) -> None:
    (points,) = clouds(1)
    data = Data(pos=points)
    graph = KNNGraph(5, loop)(data)
    distances = torch.cdist(points, points) + (0 if loop else torch.diag(torch.full((40,), 9.0)))
    assert torch.equal(graph.edge_index[1], torch.arange(40).repeat_interleave(5))
    assert torch.equal(graph.edge_index[0].view(40, 5), distances.topk(5, largest=False).indices)
    assert "edge_index" not in data and graph.edge_attr is None


def test_edges_stay_within_their_clouds() -> None:
    parts = [Data(pos=cloud[:size]) for cloud, size in zip(clouds(3), (40, 3, 25), strict=True)]
    ours = KNNGraph(4)(Batch.from_data_list(parts))
    theirs = Batch.from_data_list([KNNGraph(4)(part) for part in parts])
    assert torch.equal(ours.edge_index, theirs.edge_index)
    assert ours.edge_index.shape[1] == 40 * 4 + 3 * 2 + 25 * 4  # a small cloud has all edges
    assert torch.equal(ours.batch[ours.edge_index[0]], ours.batch[ours.edge_index[1]])
    assert KNNGraph(4)(Data(pos=torch.zeros(0, 3))).edge_index.shape == (2, 0)


def test_equal_points_are_no_loops() -> None:
    source, target = KNNGraph(3)(Data(pos=torch.zeros(10, 3))).edge_index
    assert (source != target).all() and torch.equal(target, torch.arange(10).repeat_interleave(3))


def test_arguments_of_the_graph() -> None:
    assert str(KNNGraph(8)) == "KNNGraph(k=8, loop=False)"
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        KNNGraph(0)


# The classifier


def test_logits_and_gradients_are_those_of_the_network(network: nn.Module) -> None:
    points = clouds().requires_grad_()
    model = from_geometric(network, KNNGraph(6))
    logits = model(points)
    (gradients,) = torch.autograd.grad(logits[:, 1].sum(), points)
    for i in range(3):
        cloud = points[i].detach().requires_grad_()
        data = Batch.from_data_list([KNNGraph(6)(Data(pos=cloud))])
        expected = first_of(network(data))
        torch.testing.assert_close(logits[i : i + 1], expected)
        (gradient,) = torch.autograd.grad(expected[0, 1], cloud)
        torch.testing.assert_close(gradients[i], gradient)
    assert gradients.abs().amax((1, 2)).gt(0).all()


def test_attacks_and_defences_take_it(network: nn.Module) -> None:
    model, points = from_geometric(network, KNNGraph(6)), clouds()
    labels = model(points).argmax(1)
    for attack in (PGD("linf", epsilon=0.3, iterations=4), FGM("l2", epsilon=0.5)):
        result = attack(model, points, labels)
        before, after = (model(each).gather(1, labels[:, None]).mean() for each in (points, result.points))
        assert after < before and result.points.shape == points.shape
    defended = Defended(model, load("sor"), seed=0)
    assert defended(points).shape == (3, CLASSES)


def test_further_columns_are_features() -> None:
    class Features(nn.Module):
        def forward(self, data: Data) -> Tensor:
            return global_max_pool(data.x, data.batch)

    points = torch.cat([clouds(), torch.rand(3, 40, 2)], 2)
    torch.testing.assert_close(from_geometric(Features())(points), points[..., 3:].amax(1))


def test_it_has_the_axis_of_the_network_and_travels(network: nn.Module) -> None:
    network.up_axis = "y"  # type: ignore[assignment]
    model = from_geometric(network, KNNGraph(6))
    assert model.up_axis == "y" and from_geometric(nn.Identity()).up_axis is None
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(clouds()), model(clouds()))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((3,), TypeError, "model must be callable, got int"),
        ((nn.Identity(), "graph"), TypeError, "transform must be callable, got str"),
    ],
)
def test_arguments(given: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_geometric(*given)


def test_without_logits_the_error_says_so() -> None:
    with pytest.raises(ValueError, match=r"must return logits of shape \(3, C\), it returned \(120, 3\)"):
        from_geometric(lambda data: data.pos)(clouds())


# The benchmark, which keys its cache by the classifier


class NotYetBuilt(PointNetConv):
    """Only `test_digests_do_not_depend_on_what_was_built_before` makes some."""


def test_digests_do_not_depend_on_what_was_built_before() -> None:
    first, second = (from_geometric(NotYetBuilt(), KNNGraph(6)) for _ in range(2))
    assert digest(first) == digest(second) != digest(from_geometric(NotYetBuilt(), KNNGraph(7)))


def test_the_benchmark_takes_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = PointNet().eval()
    network.head = nn.Linear(8, 16)
    model = from_geometric(network, KNNGraph(6))
    labelled = load_clouds(clouds=2, num_points=64)
    task = Task(
        "scored", Cell("pyg", "apgd-linf", "sor", "static"), 0, labelled, model, "sor", effort="quick"
    )
    run_shard(task, Store(tmp_path))
    assert task.attacked is not None
    scored, made = Store(tmp_path).read(task.path), Store(tmp_path).read(task.attacked.path)
    assert scored is not None and scored["predicted"].shape == (5, 2)
    assert made is not None and not np.array_equal(made["points"], labelled.points)
