"""Threads: the same results in any number, one product at a time inside, settings restored afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import ifdefense
from ifdefense.shapes.procedural import make_dataset
from ifdefense.threads import parallel_map, single_threaded, workers
from ifdefense.timing import stage, timed


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_items_keep_their_order_and_products_are_single_threaded() -> None:
    seen = parallel_map(lambda x: (x * x, torch.get_num_threads(), workers()), range(7))
    assert seen == [(x * x, 1, 1) for x in range(7)]
    assert torch.get_num_threads() == 3 and workers() == 3
    assert parallel_map(lambda x: parallel_map(lambda y: x + y, [1, 2]), [10, 20]) == [[11, 12], [21, 22]]


def test_the_first_error_is_raised_and_the_threads_come_back() -> None:
    def fail(x: int) -> int:
        raise ValueError(f"no {x}")

    with pytest.raises(ValueError, match="no 1"):
        parallel_map(fail, [1, 2, 3])
    assert torch.get_num_threads() == 3


def test_threads_of_several_callers_are_restored() -> None:
    def call(_: int) -> int:
        with single_threaded():
            return torch.get_num_threads()

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(call, range(50))) == {1}
    assert torch.get_num_threads() == 3


def test_context_goes_along() -> None:
    with torch.no_grad(), timed() as seconds:
        flags = parallel_map(lambda _: torch.is_grad_enabled(), range(4))

        def wait(_: int) -> None:
            with stage("waiting"):
                torch.ones(10).sum()

        parallel_map(wait, range(4))
    assert flags == [False] * 4 and seconds["waiting"] > 0
    assert parallel_map(lambda _: torch.is_grad_enabled(), range(4)) == [True] * 4


@pytest.mark.parametrize("method", ["local-mesh", "sor-smooth"])
def test_results_are_bit_identical_in_any_number_of_threads(method: str) -> None:
    clouds = make_dataset(1, 300, seed=3).points[:5]
    purifier = ifdefense.load(method)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(purifier(clouds, 200, seed=1))
    alone = np.concatenate([purifier(cloud[None], 200, seed=1) for cloud in clouds])
    for other in (*results[1:], alone):
        np.testing.assert_array_equal(results[0], other)


def test_the_time_of_a_trace_is_that_of_the_clock() -> None:
    import time

    clouds = make_dataset(1, 300, seed=3).points[:6]
    purifier = ifdefense.load("local-mesh")
    purifier.trace(clouds[:2])
    start = time.perf_counter()
    traces = purifier.trace(clouds)
    wall = time.perf_counter() - start
    assert 0.3 * wall < sum(sum(trace.seconds.values()) for trace in traces) < 1.05 * wall
