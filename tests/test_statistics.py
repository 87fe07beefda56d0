"""Accuracies, their errors, paired differences and worst cases against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import statistics


def mixed(count: int, share: float) -> torch.Tensor:
    """``(count,)`` of which the first ``share`` are right."""
    return torch.arange(count) < round(share * count)


@pytest.mark.parametrize(("count", "share"), [(50, 0.5), (100, 0.71), (400, 0.9)])
def test_the_error_is_that_of_a_share(count: int, share: float) -> None:
    """The standard error of a share p of n clouds is ``sqrt(p (1 - p) / n)``; 2 imagined clouds among n."""
    found = statistics.accuracy(mixed(count, share), torch.zeros(count, dtype=torch.long))
    p = (share * count + 1) / (count + 2)
    assert found["accuracy"] == pytest.approx(100 * share)
    assert found["error"] == pytest.approx(100 * math.sqrt(p * (1 - p) / (count + 2)), rel=0.05)
    assert found["spread"] == 0


def test_twenty_of_twenty_clouds_are_no_certainty() -> None:
    found = statistics.accuracy(torch.ones(20, dtype=torch.bool), torch.zeros(20, dtype=torch.long))
    assert found["accuracy"] == 100
    assert 3 < found["error"] < 6


def test_draws_are_no_clouds() -> None:
    """Ten equal draws tell no more than one."""
    one, labels = mixed(100, 0.7), torch.zeros(100, dtype=torch.long)
    assert statistics.accuracy(one.expand(10, -1), labels) == statistics.accuracy(one, labels)


def test_the_spread_is_that_of_the_draws() -> None:
    right = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    found = statistics.accuracy(right, torch.zeros(4, dtype=torch.long))
    assert found["accuracy"] == 62.5
    assert found["spread"] == pytest.approx(12.5 * math.sqrt(2))  # of 75 and 50


def test_every_class_weighs_the_same_in_the_class_mean() -> None:
    right = torch.tensor([1, 1, 1, 1, 0], dtype=torch.bool)
    found = statistics.accuracy(
        right, torch.tensor([3, 3, 3, 3, 7])
    )  # classes without clouds are not counted
    assert found["accuracy"] == 80
    assert found["class_mean"] == 50


def test_pairs_are_more_exact_than_two_errors() -> None:
    """Of defences that differ on 8 of 200 clouds, the better is ahead, though their errors overlap."""
    worse, better = mixed(200, 0.60), mixed(200, 0.64)
    found = statistics.paired(better, worse)
    assert found["difference"] == pytest.approx(4)
    assert 0 < found["low"] < 4 < found["high"]
    labels = torch.zeros(200, dtype=torch.long)
    assert 2 * statistics.accuracy(worse, labels)["error"] > 4
    other = statistics.paired(worse, better)
    assert other["difference"] == pytest.approx(-4)
    assert other["high"] < 0


def test_equal_results_have_an_interval_around_zero() -> None:
    found = statistics.paired(mixed(20, 0.5), mixed(20, 0.5).expand(3, -1))
    assert found["difference"] == 0
    assert found["low"] < 0 < found["high"]


def test_the_worst_case_is_taken_per_cloud_and_draw() -> None:
    clean = torch.tensor([[1, 1, 1, 0]], dtype=torch.bool)  # one draw counts for both
    attacked = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 1]], dtype=torch.bool)
    expected = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0]], dtype=torch.bool)
    assert torch.equal(statistics.worst([clean, attacked]), expected)
    assert torch.equal(statistics.worst([clean[0]]), clean)


def test_strings_come_back_as_they_were() -> None:
    right = torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.bool)
    assert statistics.packed(right) == ["101", "001"]
    assert torch.equal(statistics.unpacked(["101", "001"]), right)


def test_unusable_results_are_named() -> None:
    three, labels = torch.ones(3, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(2,\) labels for 3 clouds"):
        statistics.accuracy(three, labels)
    with pytest.raises(ValueError, match="same clouds, got 3 and 2"):
        statistics.paired(three, three[:2])
    with pytest.raises(ValueError, match=r"same clouds, got \[3, 2\]"):
        statistics.worst([three, three[:2]])
    with pytest.raises(ValueError, match=r"number of draws, got \[2, 3\]"):
        statistics.worst([three.expand(2, -1), three.expand(3, -1)])
    with pytest.raises(ValueError, match="at least one result"):
        statistics.worst([])
    with pytest.raises(ValueError, match="at least one cloud"):
        statistics.accuracy(torch.ones(0), torch.ones(0))
