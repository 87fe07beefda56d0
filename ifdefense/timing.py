"""Wall-clock time of named stages, collected where somebody asks for it."""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Iterator

_seconds: contextvars.ContextVar[dict[str, float] | None] = contextvars.ContextVar("seconds", default=None)


@contextlib.contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Collects the seconds of every `stage` inside the block, by name."""
    seconds: dict[str, float] = {}
    token = _seconds.set(seconds)
    try:
        yield seconds
    finally:
        _seconds.reset(token)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Adds the time of the block to a stage, if anyone collects."""
    seconds = _seconds.get()
    if seconds is None:
        yield
        return
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
