"""Point operations against naive twins, and their independence of the batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ifdefense import points as operations
from ifdefense.points import chamfer_distance, farthest_point_sampling, gather, knn, squared_distances


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


def test_chamfer_distance_passes_gradcheck() -> None:
    a = cloud(1, 5, 3, dtype=torch.float64).requires_grad_()
    b = cloud(1, 4, 3, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(chamfer_distance, (a, b))


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
