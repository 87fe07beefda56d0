"""One thread per piece of work, with single-threaded products inside.

Threads inside of many small products cost more than they give, and on a busy machine they spin; whole clouds,
or chunks of queries, share nothing. Results do not depend on the number of threads.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

_inside: contextvars.ContextVar[bool] = contextvars.ContextVar("inside", default=False)
_lock = threading.Lock()
_depth = 0
_threads = 1


def workers() -> int:
    """Threads that `parallel_map` uses at most: those of PyTorch, and one inside of it."""
    if _inside.get():
        return 1
    return _threads if _depth else torch.get_num_threads()


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Sets PyTorch to one thread inside the block; also where several threads enter and leave it."""
    global _depth, _threads
    with _lock:
        if _depth == 0:
            _threads = torch.get_num_threads()
            torch.set_num_threads(1)
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                torch.set_num_threads(_threads)


def parallel_map(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """``[function(item) for item in items]`` on several threads; inside of itself on one.

    Each call sees the context of the caller, gradient mode included, and is single-threaded. The first
    exception is raised. Tensors on an accelerator are taken in a plain loop: its streams are those of a
    thread, and its work is done side by side anyway.
    """
    if any(isinstance(item, torch.Tensor) and item.device.type != "cpu" for item in items):
        return [function(item) for item in items]
    count = min(workers(), len(items))
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
