"""Wall-clock time of named stages."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections.abc import Iterator

_lock = threading.Lock()
_seconds: contextvars.ContextVar[dict[str, float] | None] = contextvars.ContextVar("seconds", default=None)


@contextlib.contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Collects the seconds of every `stage` inside the block, by name; those of parallel threads add up."""
    seconds: dict[str, float] = {}
    token = _seconds.set(seconds)
    try:
        yield seconds
    finally:
        _seconds.reset(token)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Adds the time of the block to a stage; a no-op outside of `timed`."""
    seconds = _seconds.get()
    if seconds is None:
        yield
        return
    start = time.perf_counter()
    try:
        yield
    finally:
        spent = time.perf_counter() - start
        with _lock:
            seconds[name] = seconds.get(name, 0.0) + spent
