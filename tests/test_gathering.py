"""Functions of gathered rows, against automatic differentiation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ifdefense.geometry import gathering
from ifdefense.geometry.gathering import affine_rows, neighbour_max


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 1 << 18])
def test_maximum_over_neighbours_equals_that_of_the_gathered_rows(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "numbers_per_block", lambda _: chunk)
    values = normal(9, 4).requires_grad_()
    index = torch.randint(9, (7, 3), generator=torch.Generator().manual_seed(1))
    plain = values[index].amax(1)
    best = neighbour_max(values, index)
    assert torch.equal(best, plain)
    with torch.no_grad():
        assert torch.equal(neighbour_max(values, index), plain)
    weight = normal(7, 4, seed=2)
    (expected,) = torch.autograd.grad(plain, values, weight)
    (grad,) = torch.autograd.grad(best, values, weight)
    torch.testing.assert_close(grad, expected)


def test_the_first_of_equal_neighbours_takes_the_gradient() -> None:
    values = torch.ones(3, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(neighbour_max(values, torch.tensor([[2, 0, 1]])).sum(), values)
    assert grad.tolist() == [[0, 0], [0, 0], [1, 1]]


def test_affine_maps_have_the_same_values_and_gradients_with_and_without_gradients_of_positions() -> None:
    maps = normal(6, 20).requires_grad_()
    index = torch.tensor([4, 0, 4, 2, 5, 0, 0, 4])  # maps 1 and 3 are not used
    relative = normal(8, 3, seed=1)
    fixed, free = (
        affine_rows(maps, index, relative),
        affine_rows(maps, index, relative.clone().requires_grad_()),
    )
    torch.testing.assert_close(fixed, free)
    assert 0 < int((fixed == 0).sum()) < fixed.numel()
    weight = normal(8, 5, seed=2)
    (expected,) = torch.autograd.grad(free, maps, weight)
    (grad,) = torch.autograd.grad(fixed, maps, weight)
    torch.testing.assert_close(grad, expected)
    assert (grad[[1, 3]] == 0).all()
    assert (grad[[0, 2, 4, 5]] != 0).any(1).all()
