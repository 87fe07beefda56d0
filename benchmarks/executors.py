"""Ways to compute shards: one after the other, in several processes, or on a cluster of Ray.

An executor is a function ``(tasks, store, *, report) -> list[Failure]``. It calls ``report`` with each task
that is done and goes on when a task fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pickle
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.shards import Store, StoreError, Task, run_shard
from ifdefense.distributed import LOCAL, RayTasks, connect
from ifdefense.pool import TRIES, Lost, Pool, Processes, answers, ending
from ifdefense.threads import granted_cores

Report = Callable[[Task], None]
Executor = Callable[..., "list[Failure]"]
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Failure:
    """A shard that was not computed.

    Attributes:
        task: the shard.
        error: the reason, as one line.
    """

    task: Task
    error: str

    def __str__(self) -> str:
        return f"{self.task.cell}, block {self.task.block}: {self.error}"


def error_of(task: Task, store: Store) -> str | None:
    """Computes a shard; returns the error of the attack, the defence or the classifier, if there is one.

    Raises:
        StoreError: if the shard cannot be written, as this concerns all shards.
    """
    try:
        run_shard(task, store)
    except StoreError:
        raise
    except Exception as error:  # strangers' code raises anything
        _LOG.debug("%s", task.cell, exc_info=True)
        return f"{type(error).__name__}: {error}"
    return None


def serial(tasks: Sequence[Task], store: Store, *, report: Report) -> list[Failure]:
    """Computes shards one after the other, in this process."""
    failures = []
    for task in tasks:
        if (error := error_of(task, store)) is not None:
            failures.append(Failure(task, error))
        report(task)
    return failures


def processes(
    tasks: Sequence[Task], store: Store, *, report: Report, workers: int | None = None
) -> list[Failure]:
    """Computes shards in processes, by default one per core. A shard whose worker dies is tried again.

    Raises:
        ValueError: if a defence or victim cannot be sent to another process.
        StoreError: if a shard cannot be written.
    """
    for what in {
        id(what): what for task in tasks for what in (task.victim, task.defence, task.known)
    }.values():
        _check_sent(what)
    count = max(1, min(workers or granted_cores(), len(tasks)))
    work = store, Path.cwd(), max(1, granted_cores() // count)
    return _pooled(tasks, Processes(_shard, work, count), report)


def ray(tasks: Sequence[Task], store: Store, *, report: Report) -> list[Failure]:
    """Computes shards on the cluster named by ``RAY_ADDRESS``, or on one that is started on this machine.

    Each takes a CPU, and a GPU if it computes on one. All machines need the store, the working directory and
    the files that defences and victims are read from. A shard whose worker dies is tried again.

    Raises:
        ImportError: if Ray is not installed.
        ConnectionError: if the cluster cannot be reached.
        StoreError: if a shard cannot be written.
    """
    connect(address := os.environ.get("RAY_ADDRESS", LOCAL))  # for all calls; Ray ends with this process
    gpus = int(any(task.device.startswith("cuda") for task in tasks))
    return _pooled(tasks, RayTasks(_shard, (store, Path.cwd(), 1), address, _LOG.warning, gpus), report)


EXECUTORS: dict[str, Executor] = {"serial": serial, "processes": processes, "ray": ray}
"""Executors by name."""

_Answer = str | StoreError | None


def _check_sent(what: Any) -> None:
    """Checks that a worker, which does not run the caller's script, can receive an object."""
    try:
        if b"__main__" in pickle.dumps(what):
            raise pickle.PicklingError("it is defined in __main__")
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"processes need a defence and a victim that can be sent, such as file.py:NAME ({error})"
        ) from error


def _pooled(tasks: Sequence[Task], pool: Pool[Task, _Answer], report: Report) -> list[Failure]:
    """Computes shards in a pool, which is closed; those whose worker dies are tried again."""
    failures, waiting, deaths = [], deque(tasks), Counter[Path]()
    with ending(pool):
        for task, answer in answers(pool, waiting):
            if isinstance(answer, StoreError):
                raise answer
            if isinstance(answer, Lost) and answer.died:
                deaths[task.path] += 1
                if deaths[task.path] < TRIES:
                    _LOG.warning("%s, block %d: %s; tried again", task.cell, task.block, answer.reason)
                    waiting.append(task)
                    continue
            if answer is not None:
                failures.append(Failure(task, answer.reason if isinstance(answer, Lost) else answer))
            report(task)
    return failures


def _shard(work: tuple[Store, Path, int], task: Task) -> _Answer:
    """Body of a worker, with the store, the working directory and the number of threads."""
    store, folder, threads = work
    torch.set_num_threads(threads)
    try:
        with contextlib.chdir(folder):
            return error_of(task, store)
    except StoreError as error:
        return error
