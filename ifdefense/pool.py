"""Worker processes on one machine: a task whose worker dies is returned as lost, and the others go on."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, Generic, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")
A = TypeVar("A", covariant=True)

TRIES = 3
"""How often a task is tried whose worker dies."""

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


def answers(
    pool: Pool[T, A], waiting: deque[T], sent: Callable[[T], T] | None = None
) -> Iterator[tuple[T, A | Lost]]:
    """Runs tasks; gives each with its answer, as answers come.

    Args:
        pool: where the tasks run.
        waiting: the tasks, which are taken out; more may be added in the meantime.
        sent: gives the task to send instead, when there is a worker for it.
    """
    while waiting or pool.busy():
        while waiting and pool.free():
            task = waiting.popleft()
            pool.submit(task if sent is None else sent(task))
        yield from pool.wait()


class Processes(Generic[T, R]):
    """`Pool` of processes on this machine. Interrupts reach only this process, which ends the workers.

    Processes are started when there are tasks for them, and replaced when they die. If this process dies,
    they end as well. They are not those of `multiprocessing`, which run the caller's script again.

    Args:
        function: called as ``function(work, task)``; both are pickled, as are results. A module's function.
        work: what all tasks share; sent to each worker once.
        size: number of processes.

    Raises:
        pickle.PicklingError, AttributeError, TypeError: if something cannot be pickled.
    """

    def __init__(self, function: Callable[[Any, T], R], work: object, size: int) -> None:
        self.size = size
        self._work = pickle.dumps((function, work))
        self._idle: list[_Worker] = []
        self._tasks: dict[_Worker, T] = {}
        self._answers = queue.SimpleQueue[tuple[_Worker, Any]]()

    def free(self) -> bool:
        """Whether a further task would start at once."""
        return len(self._tasks) < self.size

    def busy(self) -> bool:
        """Whether there are tasks without an answer."""
        return bool(self._tasks)

    def submit(self, task: T) -> None:
        """Starts a task."""
        message = pickle.dumps(task)
        while self._idle:
            worker = self._idle.pop()
            with contextlib.suppress(OSError):  # it died while it was idle
                worker.send(message)
                break
        else:
            worker = _started()
            first = [self._work, message]
            threading.Thread(target=_listen, args=(worker, first, self._answers), daemon=True).start()
        self._tasks[worker] = task

    def wait(self) -> list[tuple[T, R | Lost]]:
        """Waits for at least one answer; returns the tasks that have one."""
        found: list[tuple[T, R | Lost]] = []
        while not found or not self._answers.empty():
            worker, answer = self._answers.get()
            if worker not in self._tasks:  # it died while it was idle
                continue
            found.append((self._tasks.pop(worker), answer))
            if not (isinstance(answer, Lost) and answer.died):
                self._idle.append(worker)
        return found

    def close(self, now: bool = False) -> None:
        """Ends the workers; ``now`` stops them in the middle of their tasks."""
        workers = [*self._idle, *self._tasks]
        self._idle, self._tasks = [], {}
        for worker in workers:
            if now:
                worker.process.terminate()
            with contextlib.suppress(OSError):
                worker.messages.close()  # ends an idle worker
        for worker in workers:
            try:
                worker.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()


@dataclasses.dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    messages: IO[bytes]
    answers: IO[bytes]

    def send(self, message: bytes) -> None:
        pickle.dump(message, self.messages)  # which says how long it is
        self.messages.flush()

    def death(self) -> str:
        """What happened to it."""
        code = self.process.wait()
        if code < 0:
            cause = f"was ended by signal {-code}"
            if -code == getattr(signal, "SIGKILL", None):
                cause += ", as by the system when memory runs out"
            return f"its process {cause}"
        return f"its process ended with exit code {code}"


def _started() -> _Worker:
    code = "import sys; sys.path[:] = sys.argv[1:]; from ifdefense.pool import serve; serve()"
    with _interrupts_blocked():  # inherited: Ctrl-C goes to all processes of a terminal
        process = subprocess.Popen(
            [sys.executable, "-c", code, *sys.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
    assert process.stdin is not None and process.stdout is not None
    return _Worker(process, process.stdin, process.stdout)


def _listen(worker: _Worker, first: Sequence[bytes], found: queue.SimpleQueue[tuple[_Worker, Any]]) -> None:
    """Sends a worker its first messages, which wait until it has started, and collects its answers."""
    with contextlib.suppress(OSError, ValueError):  # it died, or the pool was closed
        for message in first:
            worker.send(message)
    with worker.answers:
        while True:
            try:
                answer = pickle.load(worker.answers)
            except (EOFError, OSError, pickle.UnpicklingError):
                found.put((worker, Lost(worker.death(), died=True)))
                return
            found.put((worker, answer))


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


def serve() -> None:
    """Body of a worker: answers the tasks that come from stdin until it is closed."""
    signal.signal(signal.SIGTERM, _end)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what tasks print is no answer
    messages = queue.SimpleQueue[bytes]()
    threading.Thread(target=_receive, args=(messages,), daemon=True).start()
    function, work = pickle.loads(messages.get())
    with contextlib.suppress(OSError):
        while True:
            message = messages.get()
            try:
                answer = pickle.dumps(function(work, pickle.loads(message)))
            except Exception as error:  # the worker serves further tasks
                answer = pickle.dumps(Lost(reason_of(error)))
            answers.write(answer)
            answers.flush()


def _end(*_: object) -> None:
    """Ends a worker by an exception, which removes temporary files; once, as both its ends may be sent."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def _receive(messages: queue.SimpleQueue[bytes]) -> None:
    """Receives messages; ends this process with the one that sends them."""
    source = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # tasks do not read messages
    with contextlib.suppress(EOFError, pickle.UnpicklingError):
        while True:
            messages.put(pickle.load(source))
    os.kill(os.getpid(), signal.SIGTERM)
