"""Worker processes on one machine: a task whose worker dies is returned as lost, and the others go on."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")
A = TypeVar("A", covariant=True)

GRACE = 10.0
"""Seconds in which an interrupted worker removes its temporary files."""


@dataclasses.dataclass(frozen=True)
class Lost:
    """A task without a result.

    Attributes:
        reason: what happened, for messages.
        died: whether its worker died, so that another try may succeed; otherwise the task raised an error.
    """

    reason: str
    died: bool = False


def reason_of(error: BaseException) -> str:
    """Text of an error, for messages; with its type unless that follows from the text."""
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if isinstance(error, (ValueError, TypeError, OSError, ImportError, RuntimeError)):
        return str(error) or type(error).__name__
    return f"{type(error).__name__}: {error}"


class Pool(Protocol[T, A]):
    """Runs tasks elsewhere.

    Attributes:
        size: number of workers.
    """

    size: int

    def free(self) -> bool:
        """Whether a further task would start soon."""

    def busy(self) -> bool:
        """Whether there are tasks without an answer."""

    def submit(self, task: T) -> None:
        """Starts a task."""

    def wait(self) -> Sequence[tuple[T, A | Lost]]:
        """Waits for at least one answer; returns the tasks that have one."""

    def close(self, now: bool = False) -> None:
        """Ends the workers; ``now`` stops them in the middle of their tasks."""


@contextlib.contextmanager
def ending(pool: Pool[T, R]) -> Iterator[Pool[T, R]]:
    """Context that closes a pool; after an exception, such as an interrupt, at once."""
    try:
        yield pool
    except BaseException:
        pool.close(now=True)
        raise
    pool.close()


@dataclasses.dataclass(eq=False)
class _Worker:
    process: Any  # the class depends on the start method
    pipe: connection.Connection


class Processes(Generic[T, R]):
    """`Pool` of processes on this machine. Interrupts reach only this process, which ends the workers.

    Processes are started when there are tasks for them, and replaced when they die. If this process dies,
    they end as well.

    Args:
        function: called as ``function(work, task)``; both are pickled, as are results. A module's function.
        work: what all tasks share; sent to each worker once.
        size: number of processes.
    """

    def __init__(self, function: Callable[[Any, T], R], work: object, size: int) -> None:
        self.function = function
        self.work = work
        self.size = size
        self._idle: list[_Worker] = []
        self._tasks: dict[connection.Connection, tuple[_Worker, T]] = {}

    def free(self) -> bool:
        """Whether a further task would start at once."""
        return len(self._tasks) < self.size

    def busy(self) -> bool:
        """Whether there are tasks without an answer."""
        return bool(self._tasks)

    def submit(self, task: T) -> None:
        """Starts a task."""
        while self._idle:
            worker = self._idle.pop()
            try:
                worker.pipe.send(task)
            except OSError:  # it died while it was idle
                self._dismiss(worker)
            else:
                break
        else:
            worker = self._started(task)
        self._tasks[worker.pipe] = worker, task

    def wait(self) -> list[tuple[T, R | Lost]]:
        """Waits for at least one answer; returns the tasks that have one."""
        answers: list[tuple[T, R | Lost]] = []
        ready = connection.wait(list(self._tasks))
        for pipe in [pipe for pipe in self._tasks if pipe in ready]:
            worker, task = self._tasks.pop(pipe)
            try:
                answer = worker.pipe.recv()
            except (EOFError, OSError):
                answer = Lost(self._dismiss(worker), died=True)
            else:
                self._idle.append(worker)
            answers.append((task, answer))
        return answers

    def close(self, now: bool = False) -> None:
        """Ends the workers; ``now`` stops them in the middle of their tasks."""
        workers = [*self._idle, *(worker for worker, _ in self._tasks.values())]
        self._idle, self._tasks = [], {}
        for worker in workers:
            worker.pipe.close()  # ends an idle worker
            if now:
                worker.process.terminate()
        for worker in workers:
            worker.process.join(GRACE)
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()

    def _started(self, task: T) -> _Worker:
        # A forked copy of a process with threads, such as those of PyTorch, may hang.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self.function, self.work, task), daemon=True)
        with _interrupts_blocked():  # inherited: Ctrl-C goes to all processes of a terminal
            process.start()
        theirs.close()  # so that the pipe ends with the worker
        return _Worker(process, ours)

    def _dismiss(self, worker: _Worker) -> str:
        """Removes a dead worker; returns what happened to it."""
        worker.pipe.close()
        worker.process.join(GRACE)
        code = worker.process.exitcode
        if code is not None and code < 0:
            cause = f"was ended by signal {-code}"
            if -code == getattr(signal, "SIGKILL", None):
                cause += ", as by the system when memory runs out"
            return f"its process {cause}"
        return f"its process ended with exit code {code}"


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: connection.Connection, function: Callable[[Any, T], R], work: object, task: T) -> None:
    """Body of a worker: answers tasks until the pipe is closed."""
    # As an exception, the end removes temporary files.
    signal.signal(signal.SIGTERM, lambda *_: _end())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            answer: object
            try:
                answer = function(work, task)
            except Exception as error:  # the worker serves further tasks
                answer = Lost(reason_of(error))
            pipe.send(answer)
            task = pipe.recv()


def _end() -> None:
    raise SystemExit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
