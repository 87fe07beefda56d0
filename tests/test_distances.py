from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attacks.functional import distances
from ifdefense.geometry.points import chamfer_distance, directed_chamfer, nearest_neighbour, squared_distances


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


POINTS, CLEAN = random(2, 9, 3, seed=1), random(2, 13, 3, seed=2)
NORMALS = torch.nn.functional.normalize(random(2, 13, 3, seed=3), dim=2)
SETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "directed chamfer": directed_chamfer,
    "directed chamfer, not squared": lambda a, b: directed_chamfer(a, b, squared=False),
    "chamfer": chamfer_distance,
    "chamfer, not squared": lambda a, b: chamfer_distance(a, b, squared=False),
    "directed hausdorff": distances.directed_hausdorff,
    "directed hausdorff, not squared": lambda a, b: distances.directed_hausdorff(a, b, squared=False),
    "hausdorff": distances.hausdorff,
    "hausdorff, not squared": lambda a, b: distances.hausdorff(a, b, squared=False),
    "smoothness": lambda a, _: distances.knn_smoothness(a, k=3, alpha=0.5),
    "diameter": lambda a, _: distances.diameter(a),
    "curvature": lambda a, b: distances.curvature_difference(a, b, NORMALS[:, : b.shape[1]], k=4),
}
SHIFTS = {"l2": distances.l2, "point l2": distances.point_l2, "linf": distances.linf}


def gaps(a: Tensor, b: Tensor) -> list[list[float]]:
    """Distances of all pairs, one by one."""
    return [[float((p - q).norm()) for q in b] for p in a]


def naive_chamfer(a: Tensor, b: Tensor, power: int) -> float:
    return sum(min(row) ** power for row in gaps(a, b)) / len(a)


def naive_hausdorff(a: Tensor, b: Tensor, power: int) -> float:
    return max(min(row) for row in gaps(a, b)) ** power


def naive_smoothness(a: Tensor, k: int, alpha: float) -> float:
    mean = [sum(gap**2 for gap in sorted(row)[1 : k + 1]) / k for row in gaps(a, a)]
    centre = sum(mean) / len(mean)
    spread = (sum((value - centre) ** 2 for value in mean) / (len(mean) - 1)) ** 0.5
    return sum(value for value in mean if value > centre + alpha * spread) / len(mean)


def naive_curvature(a: Tensor, normals: list[Tensor], k: int) -> list[float]:
    found = []
    for point, normal in zip(a, normals, strict=True):
        near = sorted(a, key=lambda other: float((other - point).norm()))[1 : k + 1]
        found.append(sum(abs(float((q - point) @ normal)) / float((q - point).norm()) for q in near) / k)
    return found


def naive_curvature_difference(a: Tensor, b: Tensor, normals: Tensor, k: int) -> float:
    before = naive_curvature(b, list(normals), k)
    own = [row.index(min(row)) for row in gaps(a, b)]
    after = naive_curvature(a, [normals[index] for index in own], k)
    return sum((x - before[index]) ** 2 for x, index in zip(after, own, strict=True)) / len(a)


@pytest.mark.parametrize("power", [1, 2])
def test_distances_between_sets_are_those_of_a_loop(power: int) -> None:
    squared = power == 2
    for a, b, expected in [(POINTS, CLEAN, naive_chamfer), (CLEAN, POINTS, naive_chamfer)]:
        twin = [expected(x, y, power) for x, y in zip(a, b, strict=True)]
        assert directed_chamfer(a, b, squared=squared).tolist() == pytest.approx(twin)
    for a, b, expected in [(POINTS, CLEAN, naive_hausdorff), (CLEAN, POINTS, naive_hausdorff)]:
        twin = [expected(x, y, power) for x, y in zip(a, b, strict=True)]
        assert distances.directed_hausdorff(a, b, squared=squared).tolist() == pytest.approx(twin)
    twin = [
        naive_chamfer(x, y, power) + naive_chamfer(y, x, power) for x, y in zip(POINTS, CLEAN, strict=True)
    ]
    assert chamfer_distance(POINTS, CLEAN, squared=squared).tolist() == pytest.approx(twin)
    twin = [
        max(naive_hausdorff(x, y, power), naive_hausdorff(y, x, power))
        for x, y in zip(POINTS, CLEAN, strict=True)
    ]
    assert distances.hausdorff(POINTS, CLEAN, squared=squared).tolist() == pytest.approx(twin)


def test_shape_distances_are_those_of_a_loop() -> None:
    for k, alpha in [(1, 0.0), (3, 0.5), (5, 1.05)]:
        twin = [naive_smoothness(cloud, k, alpha) for cloud in CLEAN]
        assert distances.knn_smoothness(CLEAN, k, alpha).tolist() == pytest.approx(twin)
    assert max(twin) > 0
    twin = [max(map(max, gaps(cloud, cloud))) for cloud in CLEAN]
    assert distances.diameter(CLEAN).tolist() == pytest.approx(twin)
    curves = [naive_curvature(cloud, list(normal), 4) for cloud, normal in zip(CLEAN, NORMALS, strict=True)]
    torch.testing.assert_close(distances.curvature(CLEAN, NORMALS, 4), torch.tensor(curves).double())
    twin = [naive_curvature_difference(*each, 4) for each in zip(POINTS, CLEAN, NORMALS, strict=True)]
    assert distances.curvature_difference(POINTS, CLEAN, NORMALS, 4).tolist() == pytest.approx(twin)


def test_gradients_are_those_of_the_whole_matrix() -> None:
    def slopes(distance: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        both = POINTS.clone().requires_grad_(), CLEAN.clone().requires_grad_()
        return torch.autograd.grad(distance(*both).sum(), both)

    def of_all_pairs(a: Tensor, b: Tensor) -> Tensor:
        pairs = squared_distances(a, b)
        return torch.maximum(pairs.amin(2).amax(1), pairs.amin(1).amax(1))

    for own, whole in zip(slopes(distances.hausdorff), slopes(of_all_pairs), strict=True):
        torch.testing.assert_close(own, whole)


@pytest.mark.parametrize("name", SETS)
def test_gradients_of_sets_are_right(name: str) -> None:
    assert torch.autograd.gradcheck(
        lambda points: SETS[name](points, CLEAN), (POINTS.clone().requires_grad_(),), atol=1e-6
    )


@pytest.mark.parametrize("name", SHIFTS)
def test_gradients_of_shifts_are_right(name: str) -> None:
    pair = random(2, 4, 3, seed=4).requires_grad_(), random(2, 4, 3, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(SHIFTS[name], pair)


@pytest.mark.parametrize("name", [*SETS, *SHIFTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coincident_points_give_finite_gradients(name: str, dtype: torch.dtype) -> None:
    same = CLEAN.to(dtype).clone()
    same[1] = same[1, :1]  # all points of a cloud at one place
    distance = {**SETS, **SHIFTS}[name]
    if name == "curvature":
        distance = lambda a, b: distances.curvature_difference(a, b, NORMALS.to(dtype), k=4)  # noqa: E731
    points = same.clone().requires_grad_()
    value = distance(points, same)
    (gradient,) = torch.autograd.grad(value.sum(), points)
    assert value.isfinite().all() and gradient.isfinite().all()
    if name not in ("smoothness", "diameter"):
        assert not value.any() and not gradient.any()


def test_by_hand() -> None:
    line = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [3, 0, 0]]])
    point = torch.tensor([[[0.0, 2, 0]]])
    assert directed_chamfer(point, line).item() == 4
    assert directed_chamfer(line, point, squared=False).item() == pytest.approx((2 + 5**0.5 + 13**0.5) / 3)
    assert distances.directed_hausdorff(line, point).item() == pytest.approx(13)
    assert distances.hausdorff(point, line, squared=False).item() == pytest.approx(13**0.5)
    assert distances.diameter(line).item() == 3
    # Nearest neighbours at 1, 1 and 2: only the last is above 2 + 0.5 sqrt(3), the mean of squares and more.
    assert distances.knn_smoothness(line, k=1, alpha=0.5).item() == pytest.approx(4 / 3)
    squared, index = nearest_neighbour(line, torch.tensor([[[3.0, 0, 0], [0.5, 0, 0]]]))
    assert squared.tolist() == [[0.25, 0.25, 0]] and index.tolist() == [[1, 1, 0]]


def test_curvature_is_none_on_a_plane_and_one_along_the_normal() -> None:
    flat = torch.cat([random(1, 30, 2, seed=6), torch.zeros(1, 30, 1)], 2)
    up = torch.tensor([0.0, 0, 1]).double().expand(1, 30, 3)
    assert distances.curvature(flat, up, 5).abs().max() == 0
    upright = torch.zeros_like(flat)
    upright[..., 2] = flat[..., 0]
    torch.testing.assert_close(distances.curvature(upright, -up, 5), torch.ones(1, 30).double())


def test_curvature_of_a_sphere_is_half_the_neighbours_distance() -> None:
    """A chord of length c leaves the tangent plane of a unit sphere at the sine c / 2."""
    sphere = torch.nn.functional.normalize(random(1, 60, 3, seed=7), dim=2)
    chords = torch.cdist(sphere, sphere).sort(2).values[..., 1:6]
    torch.testing.assert_close(distances.curvature(sphere, sphere, 5), chords.mean(2) / 2)


@pytest.mark.parametrize("name", SETS)
def test_examples_do_not_depend_on_their_batch(name: str) -> None:
    if name == "curvature":
        alone = distances.curvature_difference(POINTS[1:], CLEAN[1:], NORMALS[1:], k=4)
    else:
        alone = SETS[name](POINTS[1:], CLEAN[1:])
    torch.testing.assert_close(alone, SETS[name](POINTS, CLEAN)[1:])


def test_too_many_neighbours_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"k must lie in 1..9, the number of source points, got 10"):
        distances.knn_smoothness(POINTS, k=9)
