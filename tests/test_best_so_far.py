from __future__ import annotations

import math

import torch
from torch import Tensor

from attacks.best_so_far import BestSoFar


def filled(*values: float) -> Tensor:
    """Clouds of one point, each with its value."""
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1).expand(-1, 1, 3)


def test_a_higher_rank_wins_then_a_lower_value_then_the_first() -> None:
    best = BestSoFar(filled(0, 0, 0, 0))
    for value, size, rank in (
        (1.0, [3.0, 3.0, 1.0, 2.0], [1, 0, 1, 1]),
        (2.0, [2.0, 1.0, 2.0, 2.0], [1, 0, 1, 1]),
        (3.0, [9.0, 1.0, 0.5, 2.0], [2, 0, 0, 1]),
        (4.0, [1.0, 1.0, 1.0, 2.0], [1, 0, 1, 1]),
    ):
        best.see([filled(*[value] * 4), torch.full((4,), -value)], torch.tensor(rank), torch.tensor(size))
    assert best.clouds(filled(7, 7, 7, 7))[:, 0, 0].tolist() == [3.0, 7.0, 1.0, 1.0]
    assert best.kept[1].tolist() == [-3.0, 0.0, -1.0, -1.0]  # what belongs to the clouds goes with them
    assert best.rank.tolist() == [2, 0, 1, 1]
    assert best.value.tolist() == [9.0, math.inf, 1.0, 2.0]


def test_some_examples_of_a_batch_are_seen_alone() -> None:
    best = BestSoFar(filled(0, 0, 0))
    best.see([filled(1, 2)], torch.tensor([1, 1]), rows=torch.tensor([2, 0]))
    best.see([filled(3, 4)], torch.tensor([1, 2]), rows=torch.tensor([0, 2]))  # without values ranks decide
    assert best.clouds(filled(7, 7, 7))[:, 0, 0].tolist() == [2.0, 7.0, 4.0]


def test_what_is_kept_does_not_change_with_what_was_seen() -> None:
    best, clouds = BestSoFar(filled(0, 0)), filled(1, 2).clone()
    best.see([clouds], torch.tensor([1, 1]))
    clouds += 5
    assert best.kept[0][:, 0, 0].tolist() == [1.0, 2.0]
