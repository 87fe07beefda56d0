"""Wall-clock time of named stages."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections.abc import Iterator

import torch

from ifdefense.devices import synchronise

_lock = threading.Lock()
_clock: contextvars.ContextVar[tuple[dict[str, float], torch.device] | None] = contextvars.ContextVar(
    "clock", default=None
)


@contextlib.contextmanager
def timed(device: torch.device | None = None) -> Iterator[dict[str, float]]:
    """Context that collects the seconds of each `stage` by name, summed over parallel threads.

    Args:
        device: device of the work, by default the CPU. Stages synchronise accelerators, which run
            asynchronously.
    """
    seconds: dict[str, float] = {}
    token = _clock.set((seconds, torch.device("cpu") if device is None else device))
    try:
        yield seconds
    finally:
        _clock.reset(token)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Context that adds its time to a stage; a no-op outside `timed`."""
    clock = _clock.get()
    if clock is None:
        yield
        return
    seconds, device = clock
    synchronise(device)
    start = time.perf_counter()
    try:
        yield
    finally:
        synchronise(device)
        spent = time.perf_counter() - start
        with _lock:
            seconds[name] = seconds.get(name, 0.0) + spent
