"""Point operations against naive implementations, and independence of the batch."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from ifdefense.geometry import points as operations
from ifdefense.geometry.points import (
    ball_query,
    chamfer_distance,
    farthest_point_sampling,
    gather,
    group,
    knn,
    nearest_neighbour,
    spread_sampling,
    squared_distances,
    three_interpolate,
)


def cloud(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive_squared_distances(a: Tensor, b: Tensor) -> Tensor:
    result = a.new_zeros(a.shape[0], a.shape[1], b.shape[1])
    for c, i, j in itertools.product(*map(range, result.shape)):
        result[c, i, j] = ((a[c, i] - b[c, j]) ** 2).sum()
    return result


def naive_farthest(points: Tensor, num: int, start: int) -> list[int]:
    chosen = [start]
    while len(chosen) < num:
        distances = [min(float(((p - points[c]) ** 2).sum()) for c in chosen) for p in points]
        chosen.append(max(range(len(points)), key=distances.__getitem__))
    return chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squared_distances_equal_the_naive_twin(dtype: torch.dtype) -> None:
    a, b = cloud(2, 7, 3, dtype=dtype), cloud(2, 5, 3, seed=1, dtype=dtype)
    result = squared_distances(a, b)
    assert result.dtype == dtype
    assert torch.allclose(result, naive_squared_distances(a, b))


def test_squared_distances_keep_their_precision_far_from_the_origin() -> None:
    near = cloud(1, 50, 3, dtype=torch.float64)
    far = (near + 1000.0).float()
    exact = squared_distances(far.double(), far.double())
    assert torch.allclose(squared_distances(far, far).double(), exact, rtol=1e-5, atol=0)


def test_squared_distances_pass_gradcheck() -> None:
    a = cloud(1, 4, 3, dtype=torch.float64).requires_grad_()
    b = cloud(1, 3, 3, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(squared_distances, (a, b))


@pytest.mark.parametrize("k", [1, 4, 9])
@pytest.mark.parametrize("limit", [1, 40, 1 << 20])
def test_knn_equals_sorting_all_distances_for_any_chunk(
    k: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(operations._CHUNK, "cpu", limit)
    query, source = cloud(3, 11, 3), cloud(3, 9, 3, seed=1)
    distances, index = knn(query, source, k)
    expected = squared_distances(query, source).sort(dim=-1)
    assert torch.equal(distances, expected.values[..., :k])
    assert torch.equal(index, expected.indices[..., :k])


def test_knn_finds_the_point_itself_first() -> None:
    points = cloud(2, 20, 3)
    distances, index = knn(points, points, 2)
    assert torch.equal(index[..., 0], torch.arange(20).expand(2, -1))
    assert (distances[..., 0] == 0).all()
    assert (distances[..., 1] > 0).all()


@pytest.mark.parametrize("start", [0, 5])
def test_farthest_point_sampling_equals_the_naive_twin(start: int) -> None:
    points = cloud(2, 40, 3)
    result = farthest_point_sampling(points, 12, start=start)
    assert result.tolist() == [naive_farthest(p, 12, start) for p in points]


def test_every_cloud_can_have_a_first_point_of_its_own() -> None:
    points = cloud(3, 40, 3, seed=5)
    first = torch.tensor([7, 0, 39])
    result = farthest_point_sampling(points, 12, start=first)
    assert result.tolist() == [naive_farthest(p, 12, int(i)) for p, i in zip(points, first, strict=True)]
    with pytest.raises(ValueError, match=r"start must lie in 0\.\.39"):
        farthest_point_sampling(points, 12, start=first + 1)


def test_farthest_points_of_a_cube_are_its_corners() -> None:
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)))
    filled = torch.cat([corners[:1], cloud(100, 3) * 0.6 + 0.2, corners[1:]])
    index = farthest_point_sampling(filled[None], 8)[0]
    assert {tuple(p) for p in filled[index].tolist()} == {tuple(p) for p in corners.tolist()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_farthest_point_sampling_does_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    points = cloud(5, 301, 3, dtype=dtype)
    together = farthest_point_sampling(points, 77)
    assert together.dtype == torch.int64
    for b in range(5):
        assert torch.equal(together[b], farthest_point_sampling(points[b : b + 1], 77)[0])


def test_a_prefix_of_farthest_points_is_a_sample_too() -> None:
    points = cloud(2, 60, 3)
    longer = farthest_point_sampling(points, 30)
    assert torch.equal(longer[:, :10], farthest_point_sampling(points, 10))
    assert all(row.unique().numel() == 30 for row in longer)


def test_farthest_point_sampling_leaves_its_input_alone() -> None:
    points = cloud(2, 60, 3)
    before = points.clone()
    farthest_point_sampling(points, 30)
    assert torch.equal(points, before)


def test_gather_takes_rows_of_each_cloud() -> None:
    points, index = cloud(2, 6, 3), torch.tensor([[[0, 5], [2, 2]], [[1, 3], [4, 0]]])
    result = gather(points, index)
    assert result.shape == (2, 2, 2, 3)
    for b, i, j in itertools.product(range(2), repeat=3):
        assert torch.equal(result[b, i, j], points[b, index[b, i, j]])


def test_chamfer_distance_of_a_shifted_grid_is_twice_the_shift() -> None:
    grid = torch.cartesian_prod(*[torch.arange(4.0)] * 3)[None]
    shifted = grid + torch.tensor([0.25, 0.0, 0.0])
    assert torch.allclose(chamfer_distance(grid, shifted), torch.tensor([2 * 0.25**2]))
    assert torch.allclose(chamfer_distance(grid, shifted, squared=False), torch.tensor([0.5]))


def test_chamfer_distance_is_symmetric_and_sees_both_sides() -> None:
    a, b = cloud(3, 20, 3), cloud(3, 31, 3, seed=1)
    assert torch.allclose(chamfer_distance(a, b), chamfer_distance(b, a))
    full = squared_distances(a, b)
    assert torch.allclose(chamfer_distance(a, b), full.amin(2).mean(1) + full.amin(1).mean(1))
    assert torch.equal(chamfer_distance(a, a), torch.zeros(3))


def test_a_tree_finds_the_same_nearest_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = cloud(2, 40, 3), cloud(2, 60, 3, seed=1)

    def found(pairs: int) -> tuple[Tensor, ...]:
        monkeypatch.setattr(operations, "_NEAREST_TREE", pairs)
        query, source = a.clone().requires_grad_(), b.clone().requires_grad_()
        squared, index = nearest_neighbour(query, source)
        slopes = torch.autograd.grad(squared.sqrt().mean(), (query, source))
        return squared, index, *slopes, chamfer_distance(query, source)

    all_pairs, tree = found(1 << 20), found(0)
    pairs = squared_distances(a, b)
    assert torch.equal(all_pairs[1], pairs.argmin(2))
    torch.testing.assert_close(all_pairs[0], pairs.amin(2))
    assert all(torch.equal(one, other) for one, other in zip(all_pairs, tree, strict=True))


def test_chamfer_distance_of_equal_clouds_has_no_slope() -> None:
    a = cloud(2, 20, 3).requires_grad_()
    for squared in (True, False):
        (slope,) = torch.autograd.grad(chamfer_distance(a, a.detach().flip(1), squared=squared).sum(), a)
        assert torch.equal(slope, torch.zeros_like(a))


def test_chamfer_distance_passes_gradcheck() -> None:
    a = cloud(1, 5, 3, dtype=torch.float64).requires_grad_()
    b = cloud(1, 4, 3, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(chamfer_distance, (a, b))


def test_chamfer_distance_has_the_gradient_of_all_pairs() -> None:
    a, b = cloud(2, 9, 3).requires_grad_(), cloud(2, 7, 3, seed=1).requires_grad_()
    pairs = squared_distances(a, b)
    expected = torch.autograd.grad((pairs.amin(2).mean(1) + pairs.amin(1).mean(1)).sum(), (a, b))
    found = torch.autograd.grad(chamfer_distance(a, b).sum(), (a, b))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_three_interpolate_equals_the_naive_twin(size: int) -> None:
    query, source, features = cloud(2, 5, 3), cloud(2, size, 3, seed=1), cloud(2, size, 4, seed=2)
    result = three_interpolate(query, source, features)
    for b, i in itertools.product(range(2), range(5)):
        distance = (source[b] - query[b, i]).square().sum(1)
        nearest = distance.argsort()[:3]
        weight = 1 / distance[nearest]
        expected = (features[b, nearest] * weight[:, None]).sum(0) / weight.sum()
        torch.testing.assert_close(result[b, i], expected)
    torch.testing.assert_close(three_interpolate(source, source, features), features)


def test_errors_say_what_is_wrong() -> None:
    points = cloud(2, 10, 3)
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.10, .* got 11"):
        knn(points, points, 11)
    with pytest.raises(ValueError, match=r"takes 1\.\.10 of 10 points, asked for 11"):
        farthest_point_sampling(points, 11)
    with pytest.raises(ValueError, match=r"start must lie in 0\.\.9, got 10"):
        farthest_point_sampling(points, 3, start=10)
    with pytest.raises(ValueError, match=r"agree in B and D, got \(2, 10, 3\) and \(1, 10, 3\)"):
        squared_distances(points, points[:1])
    with pytest.raises(ValueError, match=r"float tensor \(B, N, D\), got \(10, 3\)"):
        chamfer_distance(points[0], points[0])
    with pytest.raises(ValueError, match=r"of torch\.int64"):
        farthest_point_sampling(points.long(), 3)


def naive_ball(query: Tensor, source: Tensor, radius: float, k: int) -> list[int]:
    distance = (source - query).norm(dim=1).tolist()
    inside = [j for j, d in enumerate(distance) if d < radius] or [distance.index(min(distance))]
    return (inside + inside[:1] * k)[:k]


@pytest.mark.parametrize("radius", [0.01, 0.3, 10.0])
@pytest.mark.parametrize("k", [1, 4, 20])
@pytest.mark.parametrize("limit", [1, 40, 1 << 20])
def test_ball_query_equals_the_naive_twin(
    radius: float, k: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(operations._CHUNK, "cpu", limit)
    query, source = cloud(2, 8, 3), cloud(2, 11, 3, seed=1)
    index = ball_query(query, source, radius, k)
    assert index.dtype == torch.int64
    expected = [[naive_ball(q, s, radius, k) for q in c] for c, s in zip(query, source, strict=True)]
    assert index.tolist() == expected


def test_balls_are_open_and_an_empty_one_takes_the_nearest_point() -> None:
    source = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [3, 0, 0]]])
    query = torch.tensor([[[0.0, 0, 0], [2.25, 0, 0]]])
    assert ball_query(query, source, 1.0, 2).tolist() == [[[0, 0], [2, 2]]]
    assert ball_query(query, source, 0.5, 2).tolist() == [[[0, 0], [2, 2]]]


@pytest.mark.parametrize(("radius", "k"), [(0.0, 3), (-1.0, 3), (1.0, 0)])
def test_balls_of_no_size_are_refused(radius: float, k: int) -> None:
    with pytest.raises(ValueError, match=f"radius and k must be positive, got {radius} and {k}"):
        ball_query(cloud(1, 2, 3), cloud(1, 2, 3), radius, k)


def test_a_ball_query_among_no_points_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one source point"):
        ball_query(cloud(1, 2, 3), torch.zeros(1, 0, 3), 1.0, 1)


def test_groups_hold_offsets_and_features_side_by_side() -> None:
    points, features = cloud(2, 6, 3), cloud(2, 6, 2, seed=1)
    centre, index = points[:, :2], torch.tensor([[[0, 5, 5], [2, 2, 1]], [[1, 3, 0], [4, 0, 0]]])
    result = group(points, features, centre, index)
    assert result.shape == (2, 2, 3, 5)
    for b, i, j in itertools.product(range(2), range(2), range(3)):
        row = index[b, i, j]
        assert torch.equal(result[b, i, j, :3], points[b, row] - centre[b, i])
        assert torch.equal(result[b, i, j, 3:], features[b, row])
    assert torch.equal(group(points, None, centre, index), result[..., :3])


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A pytorch3d whose kernels are loops that keep to its documented results; yields the calls."""
    calls: list[str] = []

    def ball(p1: Tensor, p2: Tensor, K: int, radius: float, return_nn: bool) -> SimpleNamespace:
        calls.append("ball_query")
        assert not return_nn
        index = torch.full((*p1.shape[:2], K), -1)
        for b, i in itertools.product(range(p1.shape[0]), range(p1.shape[1])):
            inside = [j for j, p in enumerate(p2[b]) if ((p - p1[b, i]) ** 2).sum() < radius**2][:K]
            index[b, i, : len(inside)] = torch.tensor(inside, dtype=torch.int64)
        return SimpleNamespace(idx=index)

    def nearest(p1: Tensor, p2: Tensor, K: int, return_sorted: bool) -> SimpleNamespace:
        calls.append("knn_points")
        assert return_sorted
        found = naive_squared_distances(p1, p2).sort(dim=2)
        return SimpleNamespace(dists=found.values[..., :K], idx=found.indices[..., :K])

    def farthest(points: Tensor, K: int, random_start_point: bool) -> tuple[Tensor, Tensor]:
        calls.append("sample_farthest_points")
        assert not random_start_point
        index = torch.tensor([naive_farthest(p, K, 0) for p in points])
        return gather(points, index), index

    module = ModuleType("pytorch3d.ops")
    module.__dict__.update(ball_query=ball, knn_points=nearest, sample_farthest_points=farthest)
    monkeypatch.setitem(sys.modules, "pytorch3d", ModuleType("pytorch3d"))
    monkeypatch.setitem(sys.modules, "pytorch3d.ops", module)
    operations._pytorch3d.cache_clear()
    monkeypatch.setattr(operations, "_KERNEL_DEVICES", {"cpu"})  # as if this were a GPU
    yield calls
    operations._pytorch3d.cache_clear()


def results() -> list[Tensor]:
    query, source = cloud(2, 6, 3), cloud(2, 9, 3, seed=1)
    balls = [ball_query(query, source, radius, 4) for radius in (0.01, 0.4)]
    started = farthest_point_sampling(source, 5, start=torch.tensor([4, 0]))
    return [*balls, *knn(query, source, 3), farthest_point_sampling(source, 5), started]


def test_results_do_not_change_where_pytorch3d_is_installed(stand_in: list[str]) -> None:
    theirs = results()
    assert {"ball_query", "knn_points", "sample_farthest_points"} == set(stand_in)
    del sys.modules["pytorch3d.ops"], sys.modules["pytorch3d"]
    operations._pytorch3d.cache_clear()
    if operations._pytorch3d() is not None:
        pytest.skip("pytorch3d is installed: there is no path without it to compare with")
    for one, other in zip(results(), theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_double_precision_stays_here(stand_in: list[str]) -> None:
    points = cloud(1, 9, 3, dtype=torch.float64)
    knn(points, points, 2)
    ball_query(points, points, 0.3, 2)
    farthest_point_sampling(points, 3)
    assert stand_in == []


def test_on_a_cpu_results_do_not_depend_on_pytorch3d(
    stand_in: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "_KERNEL_DEVICES", {"cuda"})
    results()
    assert stand_in == []


def test_pytorch3d_itself_gives_the_same_results(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytorch3d.ops", reason="pytorch3d is not installed")
    monkeypatch.setattr(operations, "_KERNEL_DEVICES", {"cpu"})
    theirs = results()
    monkeypatch.setattr(operations, "_KERNEL_DEVICES", set())
    for one, other in zip(results(), theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_trees_find_what_comparing_all_pairs_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    query, source = torch.rand(2, 500, 3) - 0.5, torch.rand(2, 700, 3) - 0.5
    naive = knn(query, source, 5)
    monkeypatch.setattr(operations, "_TREE", 0)
    distances, index = knn(query, source, 5)
    assert torch.equal(index, naive[1]) and torch.equal(distances, naive[0])
    assert knn(query, source, 1)[1].shape == (2, 500, 1)
    moved = query.clone().requires_grad_()
    (slope,) = torch.autograd.grad(knn(moved, source, 1)[0].sum(), moved)
    expected = 2 * (query - gather(source, naive[1][..., 0]))
    torch.testing.assert_close(slope, expected)


def test_spread_sampling_in_blocks_is_nearly_as_even() -> None:
    points = torch.rand(1, 6000, 3, generator=torch.Generator().manual_seed(0))
    points[..., 2] = 0
    exact, blocks = farthest_point_sampling(points, 1500), spread_sampling(points, 1500, block=2000)
    assert blocks.shape == (1, 1500) and len(blocks[0].unique()) == 1500
    nearest = [knn(gather(points, i), gather(points, i), 2)[0][..., 1].sqrt() for i in (exact, blocks)]
    covered = [knn(points, gather(points, i), 1)[0].max().sqrt() for i in (exact, blocks)]
    assert nearest[1].median() > 0.9 * nearest[0].median() and covered[1] < 1.5 * covered[0]
    assert torch.equal(spread_sampling(points, 1500, block=6000), exact)
    assert torch.equal(spread_sampling(points, 1500, block=2000), blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_by_a_tree_are_bit_for_bit_those_of_all_pairs(dtype: torch.dtype) -> None:
    grid = torch.cartesian_prod(*[torch.arange(7)] * 3).to(dtype)[None] * 0.1  # full of ties
    for points in (cloud(2, 300, 3, dtype=dtype), grid, grid[:, :1].expand(1, 40, 3), grid[:, :2]):
        k = min(4, points.shape[1])
        assert operations.nearest_squared(points, k).equal(knn(points, points, k)[0])
