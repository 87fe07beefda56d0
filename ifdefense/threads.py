"""Parallel maps with single-threaded products per thread, on no more threads than free cores.

Multithreading of many small products costs more than it gains, while clouds and chunks of queries are
independent. On a busy machine, the threads of one product spin while they wait for a thread without a core,
which takes many times as long as a single thread. Results do not depend on the number of threads.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

_inside: contextvars.ContextVar[bool] = contextvars.ContextVar("inside", default=False)
_lock = threading.Lock()
_limits: list[int] = []
_threads = 1

_KEPT = 0.5  # seconds for which a measured load is reused
_PAUSE = 0.002  # seconds between measurements, so that short-lived processes do not count
_seen: tuple[float, int] | None = None


def workers() -> int:
    """Maximum number of threads of `parallel_map`; 1 inside it.

    The number of threads of PyTorch, which the caller may set, but at most `free_cores`.
    """
    if _inside.get():
        return 1
    most = _threads if _limits else torch.get_num_threads()
    return most if most == 1 else min(most, free_cores())


def free_cores() -> int:
    """Number of cores that this process may use and that other processes leave idle, at least 1."""
    global _seen
    if _seen is None or time.monotonic() - _seen[0] > _KEPT:
        _seen = time.monotonic(), max(1, min(granted_cores(), (os.cpu_count() or 1) - _others()))
    return _seen[1]


def granted_cores(root: Path = Path("/")) -> int:
    """Number of cores granted to this process by its affinity and the quota of its control groups.

    Args:
        root: folder of ``proc`` and ``sys``.
    """
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    count = (os.cpu_count() or 1) if affinity is None else len(affinity(0))
    return max(1, min([count, *(math.floor(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Number of cores by the quotas of the process's control groups and their parents, versions 1 and 2."""
    base = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        home = base / "cpu" if controllers else base
        own = home / path.lstrip("/")
        for folder in [own, *own.parents]:
            if controllers:
                values = [_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
            else:
                values = _read(folder / "cpu.max").split()
            if len(values) == 2 and values[0].strip().isdigit() and values[1].strip().isdigit():
                yield int(values[0]) / max(1, int(values[1]))  # "max" and -1 mean no quota
            if folder == home:
                break


def _others(root: Path = Path("/")) -> int:
    """Number of threads of other processes that run or wait for a core; 0 if unknown.

    Args:
        root: folder of ``proc``.
    """
    least = None
    for pause in (0.0, _PAUSE, _PAUSE):
        time.sleep(pause)
        fields = _read(root / "proc/loadavg").split()
        if len(fields) < 4 or not (running := fields[3].partition("/")[0]).isdigit():
            return 0  # not Linux
        others = max(0, int(running) - 1)  # without this thread
        least = others if least is None else min(least, others)
        if least == 0:
            break
    return least or 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


@contextlib.contextmanager
def _limited(count: int) -> Iterator[None]:
    """Context that limits PyTorch to ``count`` threads; several threads may enter it."""
    global _threads
    with _lock:
        if not _limits:
            _threads = torch.get_num_threads()
        _limits.append(count)
        torch.set_num_threads(min(_threads, *_limits))
    try:
        yield
    finally:
        with _lock:
            _limits.remove(count)
            torch.set_num_threads(min([_threads, *_limits]))


def single_threaded() -> contextlib.AbstractContextManager[None]:
    """Context that limits PyTorch to one thread; several threads may enter it."""
    return _limited(1)


def considerate() -> contextlib.AbstractContextManager[None]:
    """Context that limits PyTorch to `free_cores` threads, for work outside `parallel_map`."""
    return _limited(workers())


def parallel_map(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """``[function(item) for item in items]`` on several threads; nested calls use one.

    Each call runs in the caller's context, including the gradient mode, and is single-threaded. The first
    exception is raised. Tensors on an accelerator are processed in a plain loop, as streams are per thread
    and kernels run asynchronously anyway.
    """
    if any(isinstance(item, torch.Tensor) and item.device.type != "cpu" for item in items):
        return [function(item) for item in items]
    count = 1 if len(items) < 2 else min(workers(), len(items))
    gradients = torch.is_grad_enabled()

    def call(item: T) -> R:
        _inside.set(True)
        with torch.set_grad_enabled(gradients):
            return function(item)

    with single_threaded():
        if count < 2:
            return [function(item) for item in items]
        contexts = [contextvars.copy_context() for _ in items]
        with ThreadPoolExecutor(count) as pool:
            tasks = [
                pool.submit(context.run, call, item) for context, item in zip(contexts, items, strict=True)
            ]
            return [task.result() for task in tasks]
