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
import queue
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.shards import Store, StoreError, Task, run_shard
from ifdefense.distributed import LOCAL, RayTasks, connect
from ifdefense.pool import Lost, ending
from ifdefense.threads import granted_cores

TRIES = 3
"""How often a shard is tried whose worker dies."""

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
    count = min(workers or granted_cores(), len(tasks))
    pending: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in tasks:
        pending.put(task)
    failures: list[Failure] = []
    fatal: list[BaseException] = []
    alive: set[_Worker] = set()

    def work() -> None:
        worker = None
        try:
            while not fatal:
                try:
                    task = pending.get_nowait()
                except queue.Empty:
                    return
                for left in reversed(range(TRIES)):
                    if worker is None:
                        worker = _Worker(max(1, granted_cores() // count))
                        alive.add(worker)
                    error, died = worker.run(task, store)
                    if not died:
                        break
                    alive.discard(worker)
                    worker = None
                    if fatal:
                        return
                    if left:
                        _LOG.warning("%s, block %d: %s; tried again", task.cell, task.block, error)
                if error is not None:
                    failures.append(Failure(task, error))
                report(task)
        except BaseException as error:
            fatal.append(error)
        finally:
            if worker is not None:
                worker.close()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:  # an interrupt
        fatal.append(error)
        for worker in list(alive):
            worker.kill()
        raise
    if fatal:
        raise fatal[0]
    return failures


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
    failures, waiting, deaths = [], deque(tasks), Counter[int]()
    shards = RayTasks[Task, str | StoreError | None](_shard, (store, Path.cwd()), address, _LOG.warning, gpus)
    with ending(shards):
        while waiting or shards.busy():
            while waiting and shards.free():
                shards.submit(waiting.popleft())
            for task, answer in shards.wait():
                if isinstance(answer, StoreError):
                    raise answer
                deaths[id(task)] += isinstance(answer, Lost) and answer.died
                if isinstance(answer, Lost) and answer.died and deaths[id(task)] < TRIES:
                    waiting.append(task)
                    continue
                if answer is not None:
                    failures.append(Failure(task, answer.reason if isinstance(answer, Lost) else answer))
                report(task)
    return failures


def _shard(work: tuple[Store, Path], task: Task) -> str | StoreError | None:
    store, folder = work
    try:
        with contextlib.chdir(folder):
            return error_of(task, store)
    except StoreError as error:
        return error


EXECUTORS: dict[str, Executor] = {"serial": serial, "processes": processes, "ray": ray}
"""Executors by name."""


class _Worker:
    """A process that computes shards.

    Not of `multiprocessing`, which would run the caller's script again.
    """

    def __init__(self, threads: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.executors", str(threads), *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, task: Task, store: Store) -> tuple[str | None, bool]:
        """The error of a task, if any, and whether the worker died of it."""
        try:
            message = pickle.dumps((task, store))
            if b"__main__" in message:
                raise pickle.PicklingError("it is defined in __main__")
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"processes need a defence and a victim that can be sent, such as file.py:NAME ({error})"
            ) from error
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(message)
            self.process.stdin.flush()
            answer = pickle.load(self.process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            return f"the worker died with exit code {self.process.wait()}", True
        if isinstance(answer, StoreError):
            raise answer
        return answer, False

    def close(self) -> None:
        """Ends the process when its work is done."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def kill(self) -> None:
        """Ends the process now."""
        self.process.kill()


def _tasks() -> Iterator[Any]:
    while True:
        try:
            yield pickle.load(sys.stdin.buffer)
        except EOFError:
            return


def _serve() -> None:
    """The loop of a worker: tasks from stdin, errors to stdout; what is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.path[:] = sys.argv[2:]
    import torch

    torch.set_num_threads(int(sys.argv[1]))
    for task, store in _tasks():
        answer: str | StoreError | None
        try:
            answer = error_of(task, store)
        except StoreError as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    _serve()
