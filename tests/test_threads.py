"""Threads: the same results in any number, one product at a time inside, settings restored afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import ifdefense
from attacks import PGD
from ifdefense import threads
from ifdefense.console import let_threads_sleep
from ifdefense.shapes.procedural import make_dataset
from ifdefense.threads import considerate, parallel_map, single_threaded, workers
from ifdefense.timing import stage, timed


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three threads on a machine whose cores are free."""
    monkeypatch.setattr(threads, "free_cores", lambda: 8)
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


@pytest.mark.parametrize(("free", "asked", "taken"), [(8, 3, 3), (2, 3, 2), (1, 3, 1), (2, 1, 1)])
def test_threads_are_those_that_were_asked_for_and_that_have_a_core(
    free: int, asked: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "free_cores", lambda: free)
    torch.set_num_threads(asked)
    assert workers() == taken
    with considerate():
        assert torch.get_num_threads() == taken and workers() == taken
        with single_threaded():
            assert torch.get_num_threads() == 1 and workers() == taken
        assert torch.get_num_threads() == taken
    assert torch.get_num_threads() == asked


def test_attacks_take_the_threads_that_have_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "free_cores", lambda: 2)
    seen = set()

    def model(points: torch.Tensor) -> torch.Tensor:
        seen.add(torch.get_num_threads())
        return points.mean(1)

    PGD(iterations=1)(model, torch.rand(1, 16, 3), torch.tensor([0]))
    assert seen == {2} and torch.get_num_threads() == 3


def machine(root: Path, running: int = 1, group: str = "", **files: str) -> Path:
    """A file system that tells of a load and of control groups."""
    for name, text in {"proc/loadavg": f"0.1 0.1 0.1 {running}/300 42\n", "proc/self/cgroup": group}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("-", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_quota_limits_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    none = machine(tmp_path / "none", group="0::/\n", **{"cpu-max": "max 100000\n"})
    assert threads.granted_cores(none) == 6
    second = machine(
        tmp_path / "2",
        group="0::/user/job\n",
        **{"user__job__cpu-max": "max 100000\n", "user__cpu-max": "250000 100000\n"},
    )
    assert threads.granted_cores(second) == 2
    first = machine(
        tmp_path / "1",
        group="9:memory:/m\n4:cpu,cpuacct:/docker/7\n0::/\n",
        **{"cpu__cpu-cfs_quota_us": "50000\n", "cpu__cpu-cfs_period_us": "100000\n"},
    )
    assert threads.granted_cores(first) == 1  # half of one
    open_ended = machine(
        tmp_path / "0",
        group="4:cpu,cpuacct:/\n",
        **{"cpu__cpu-cfs_quota_us": "-1\n", "cpu__cpu-cfs_period_us": "100000\n"},
    )
    assert threads.granted_cores(open_ended) == 6
    monkeypatch.delattr(threads.os, "sched_getaffinity")
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 5)
    assert threads.granted_cores(tmp_path / "another system") == 5


def test_cores_that_others_use_are_left_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real choice of threads
    assert threads._others(machine(tmp_path / "busy", running=5)) == 4
    assert threads._others(machine(tmp_path / "quiet", running=1)) == 0
    assert threads._others(tmp_path / "another system") == 0
    monkeypatch.setattr(threads, "granted_cores", lambda: 4)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 8)
    for others, free in ((0, 4), (5, 3), (20, 1)):
        monkeypatch.setattr(threads, "_seen", None)
        monkeypatch.setattr(threads, "_others", lambda others=others: others)
        assert threads.free_cores() == free
    monkeypatch.setattr(threads, "_others", lambda: 0)
    assert threads.free_cores() == 1  # a look holds for a while


def test_a_process_that_runs_for_a_moment_is_no_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = machine(tmp_path, running=7)
    looks: list[float] = []

    def pause(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            machine(tmp_path, running=1)

    monkeypatch.setattr(threads.time, "sleep", pause)
    assert threads._others(root) == 0 and len(looks) == 2


def test_the_command_line_lets_threads_sleep_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    let_threads_sleep()
    assert threads.os.environ["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("KMP_BLOCKTIME", "5")
    let_threads_sleep()
    assert "OMP_WAIT_POLICY" not in threads.os.environ


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
    for count in (1, 2, 3):
        torch.set_num_threads(count)
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
