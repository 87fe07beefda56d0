"""Shared by the time measurements: clouds, medians and options."""

from __future__ import annotations

import contextlib
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import record
from ifdefense.console import device_option
from ifdefense.devices import synchronise
from ifdefense.shapes.procedural import CLASSES, make_dataset

SEED = 2_000_000
"""Seed of shapes not used in training."""

CloudBatch = NDArray[np.float32]
Command = Callable[..., None]


def make_clouds(count: int) -> CloudBatch:
    """``(count, 1024, 3)`` clouds of as many classes as possible."""
    per_class = -(-count // len(CLASSES))
    points = make_dataset(per_class, seed=SEED).points
    by_class = points.reshape(len(CLASSES), per_class, *points.shape[1:]).swapaxes(0, 1)
    return by_class.reshape(points.shape)[:count]


def seconds(call: Callable[[], object]) -> float:
    """Time of a call, including work on an accelerator."""
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call, after one that warms up."""
    seconds(call)
    return statistics.median(seconds(call) for _ in range(repeats))


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Context with other processes that keep one core busy each."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(process.kill)
        yield


def beside_neighbours(call: Callable[[], object], repeats: int, count: int) -> dict[str, float]:
    """Ratios of CPU time and wall-clock time of a call with and without busy processes; medians."""
    call()
    alone, beside = [], []
    for _ in range(repeats):
        alone.append(_spent(call))
        with neighbours(count):
            beside.append(_spent(call))
    ratios = [
        statistics.median(b) / statistics.median(a)
        for a, b in zip(zip(*alone, strict=True), zip(*beside, strict=True), strict=True)
    ]
    return dict(zip(("cpu", "wall"), ratios, strict=True))


def _spent(call: Callable[[], object]) -> tuple[float, float]:
    """CPU time of all threads and wall-clock time of a call, in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def timing_options(out: str) -> Callable[[Command], Command]:
    """Adds ``--repeats``, ``--threads``, ``--device`` and ``--out``; sets the number of threads."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(*, threads: int | None, **options: Any) -> None:
            if threads is not None:
                torch.set_num_threads(threads)
            command(**options)
            click.echo(f"written to {options['out']}")

        positive = click.IntRange(min=1)
        path = click.Path(path_type=Path, dir_okay=False)
        for option in (
            click.option("--out", type=path, default=record.FOLDER / out, show_default=True),
            device_option,
            click.option("--threads", type=positive, help="Threads of torch; its own choice by default."),
            click.option("--repeats", type=positive, default=5, show_default=True, help="Runs per median."),
        ):
            run = option(run)
        return run

    return decorate
