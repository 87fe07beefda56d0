"""Purification on a cluster of Ray: a class for Ray Data, and the tasks of ``ifdefense purify --ray``.

Ray is imported when it is used: ``pip install 'ifdefense[ray]'``. See docs/scale.md.
"""

from __future__ import annotations

import copy
import functools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ifdefense.arguments import MAX_POINTS, MAX_SEED, count_of, device_of, integer
from ifdefense.clouds import Unpacked, unpack
from ifdefense.geometry.axes import axis_of
from ifdefense.pool import GRACE, Lost, reason_of
from ifdefense.purifiers.base import Purifier
from ifdefense.purifiers.loading import load
from ifdefense.purifiers.registry import DEFAULT
from ifdefense.threads import granted_cores

T = TypeVar("T")
R = TypeVar("R")

LOCAL = "local"
"""Address that starts Ray on this machine."""

CONNECT = 5.0
"""Seconds to open a connection to a cluster."""

ANSWER = 20.0
"""Seconds in which a cluster must answer; Ray itself tries for minutes."""

PATIENCE = 60.0
"""Seconds without a free CPU, after which an actor gives up and a waiting command says so."""

STORE = 256 << 20
"""Bytes of the object store of a cluster on this machine; Ray takes 30% of the memory by default."""


class PurifyBatch:
    """Purifies the clouds of a table, as the class of ``ray.data.Dataset.map_batches``; see docs/scale.md.

    The purifier is built once per actor. A cloud that cannot be purified is returned as it came, with the
    reason in the column ``error``, which is empty otherwise. Results equal those of `ifdefense.purify` bit
    for bit, however the table is split into batches.

    Args:
        method: name of a method, file of weights that every machine has, or a purifier, which is sent with
            its weights.
        num_points: points per result; by default as in the input.
        seed: random seed, applied per cloud.
        device: device to compute on, by default that of the purifier, or the CPU.
        up: up axis of the points, z by default, as in `ifdefense.purify`.
        points: column of the clouds ``(N, 3 + C)``: an array, or clouds of different sizes.
        attributes: columns with one value or row per point; new points take those of the nearest input point.
        batch_size: clouds processed together; affects memory and speed only.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if there is no such method, file or device, or an argument is out of range.
        RuntimeError: if the actors leave no CPU of the cluster for reading and writing.
    """

    patience = PATIENCE
    """Seconds without a free CPU after which an actor gives up."""

    def __init__(
        self,
        method: str | Path | Purifier = DEFAULT,
        num_points: int | None = None,
        seed: int = 0,
        device: str | torch.device | None = None,
        up: str | None = None,
        *,
        points: str = "points",
        attributes: Sequence[str] = (),
        batch_size: int = 16,
    ) -> None:
        self.num_points = count_of(num_points)
        self.seed = integer("seed", seed, 0, MAX_SEED)
        self.up = None if up is None else axis_of(up)
        self.points = points
        if isinstance(attributes, str):
            raise TypeError(f"attributes must be names of columns, such as [{attributes!r}]")
        self.attributes = tuple(attributes)
        self.batch_size = integer("batch_size", batch_size, 1, MAX_POINTS)
        if not isinstance(method, Purifier):
            self.purifier = load(method, device=device)
        elif device is None:
            self.purifier = method
        else:
            self.purifier = copy.deepcopy(method).to(device_of(device))
        _leave_a_cpu(self.patience)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Purifies the clouds of a batch; other columns are unchanged.

        Args:
            batch: NumPy arrays by column, the batch format "numpy" of Ray Data.

        Raises:
            TypeError: if the batch has another format.
            ValueError: if a column is missing.
        """
        if not isinstance(batch, Mapping):
            raise TypeError(f'expected arrays by column (batch_format="numpy"), got {type(batch).__name__}')
        changed = [self.points, *self.attributes]
        for name in changed:
            if name not in batch:
                raise ValueError(f"there is no column {name!r} among {', '.join(map(repr, batch))}")
        before = {name: list(batch[name]) for name in changed}
        after = {name: [_listed(value) for value in values] for name, values in before.items()}
        errors = np.full(len(before[self.points]), "", dtype=object)
        clouds: dict[int, Unpacked] = {}
        for row in range(len(errors)):
            try:
                clouds[row] = self._unpacked({name: values[row] for name, values in before.items()})
            except (TypeError, ValueError) as error:
                errors[row] = str(error)
        for row, result in self._purified(clouds):
            if isinstance(result, Exception):
                errors[row] = reason_of(result)
                continue
            for name, values in zip(changed, result, strict=True):
                after[name][row] = values
        columns = {name: _column(values, batch[name]) for name, values in after.items()}
        return {**batch, **columns, "error": errors}

    def _unpacked(self, row: Mapping[str, Any]) -> Unpacked:
        """The cloud of a row; results are packed as its points and attributes."""
        if row[self.points] is None:
            raise ValueError("the cloud is missing")
        given = [row[self.points], *(row[name] for name in self.attributes)]
        cloud = unpack(_plain(given[0]))
        values = [np.asarray(_plain(value)) for value in given[1:]]
        for name, value in zip(self.attributes, values, strict=True):
            if not value.ndim or len(value) != len(cloud.clouds[0]):
                count = len(value) if value.ndim else "no"
                raise ValueError(
                    f"the cloud has {len(cloud.clouds[0])} points, but {count} values of {name!r}"
                )

        def build(results: Sequence[torch.Tensor], rows: Callable[[int], torch.Tensor]) -> list[Any]:
            index = rows(0).cpu().numpy() if values else None
            built = [cloud.build(results, rows), *(value[index] for value in values)]
            return [list(new) if _nested(old) else new for new, old in zip(built, given, strict=True)]

        return Unpacked(cloud.clouds, build)

    def _purified(self, clouds: Mapping[int, Unpacked]) -> Iterator[tuple[int, list[Any] | Exception]]:
        """Purifies clouds together; if that fails, one by one."""
        if not clouds:
            return
        try:
            results = self.purifier(
                Unpacked.of(list(clouds.values())),
                self.num_points,
                self.seed,
                batch_size=self.batch_size,
                up=self.up,
            )
        except Exception as error:  # one bad cloud must not stop the others
            if len(clouds) == 1:
                yield next(iter(clouds)), error
            else:
                for row, cloud in clouds.items():
                    yield from self._purified({row: cloud})
        else:
            yield from zip(clouds, results, strict=True)


def _nested(value: Any) -> bool:
    """Whether rows are nested lists of Arrow, which come as arrays of arrays and must be returned as lists.

    Otherwise they would become tensors, which cannot be in one column with the lists of other rows.
    """
    return isinstance(value, list) or (isinstance(value, np.ndarray) and value.dtype == object)


def _plain(value: Any) -> Any:
    return np.asarray([np.asarray(row) for row in value]) if _nested(value) else value


def _listed(value: Any) -> Any:
    return list(value) if _nested(value) else value


def _column(values: Sequence[Any], like: Any) -> NDArray[Any]:
    """One array if the input was one and all values have the same shape, otherwise an array of arrays."""
    fixed = isinstance(like, np.ndarray) and like.dtype != object
    if fixed and len({np.shape(value) for value in values}) == 1:
        return np.stack(values)
    column = np.empty(len(values), object)
    for row, value in enumerate(values):
        column[row] = value
    return column


def _leave_a_cpu(patience: float) -> None:
    """In an actor, checks that a task still gets a CPU; Ray Data waits for one without end.

    Raises:
        RuntimeError: if there is none.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return
    probe = ray.remote(num_cpus=1, max_retries=0)(_nothing).remote()
    try:
        probe.future().result(patience)  # `ray.get` would lend the actor's own CPU to the task
    except TimeoutError:
        ray.cancel(probe)
        total = ray.cluster_resources().get("CPU", 0)
        raise RuntimeError(
            f"no CPU was free for {patience:.0f} s: actors must leave at least one of the {total:.0f} CPUs "
            "of the cluster for reading and writing; give ActorPoolStrategy a smaller size"
        ) from None


def _nothing() -> None:
    pass


class RayTasks(Generic[T, R]):
    """`ifdefense.pool.Pool` of tasks on a cluster, each on one CPU.

    Args:
        function: called as ``function(work, task)``, a function of a module that every machine has.
        work: what all tasks share; sent to each machine once.
        address: address of the cluster, ``auto`` for a running one on this machine, or `LOCAL`.
        tell: called with warnings.
        gpus: number of GPUs per task.

    Raises:
        ImportError: if Ray is not installed.
        ConnectionError: if the cluster cannot be reached.
    """

    def __init__(
        self,
        function: Callable[[Any, T], R],
        work: object,
        address: str,
        tell: Callable[[str], object],
        gpus: int = 0,
    ) -> None:
        self._own = connect(address)
        import ray

        self._ray = ray
        self._tell = tell
        self._function = function
        self._work = [ray.put(work)]  # as an item of a list, it is not fetched for each task
        self._remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0, max_calls=0)(_call)
        self._tasks: dict[Any, T] = {}
        self._needs = {"CPU": 1, "GPU": gpus} if gpus else {"CPU": 1}
        there = ray.cluster_resources()
        self.size = max(1, min(int(there.get(kind, 0)) // count for kind, count in self._needs.items()))

    def free(self) -> bool:
        """Whether a further task would start soon."""
        return len(self._tasks) < 2 * self.size

    def busy(self) -> bool:
        """Whether there are tasks without an answer."""
        return bool(self._tasks)

    def submit(self, task: T) -> None:
        """Starts a task."""
        self._tasks[self._remote.remote(self._function, self._work, task)] = task

    def wait(self) -> list[tuple[T, R | Lost]]:
        """Waits for at least one answer; returns the tasks that have one."""
        ready = self._ready(PATIENCE)
        if not ready:
            free = self._ray.available_resources()
            if any(free.get(kind, 0) < count for kind, count in self._needs.items()):
                self._tell(f"warning: waiting, as the cluster has no free {' or '.join(self._needs)}")
            ready = self._ready(None)
        return [(self._tasks.pop(reference), self._answer(reference)) for reference in ready]

    def close(self, now: bool = False) -> None:
        """Ends the tasks; ``now`` interrupts them. A cluster that was started for them is stopped."""
        for reference in self._tasks if now else ():
            self._ray.cancel(reference)  # raises KeyboardInterrupt in the task
        if self._tasks:
            self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=GRACE)
        self._tasks = {}
        if self._own:
            self._ray.shutdown()

    def _ready(self, timeout: float | None) -> list[Any]:
        references = list(self._tasks)
        ready, _ = self._ray.wait(references, timeout=timeout)
        if ready:  # and what else is
            ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        return list(ready)

    def _answer(self, reference: Any) -> R | Lost:
        errors = self._ray.exceptions
        try:
            answer: R = self._ray.get(reference)
        except errors.RayTaskError as error:
            return Lost(reason_of(error.cause))
        except errors.OutOfMemoryError:
            return Lost("its process was ended as the machine ran out of memory", died=True)
        except errors.RayError as error:
            return Lost(f"its process died: {str(error).splitlines()[0]}", died=True)
        return answer


def connect(address: str) -> bool:
    """Connects to a cluster, unless this process is connected; returns whether it was not.

    Raises:
        ImportError: if Ray is not installed.
        ConnectionError: if the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("Ray is not installed: pip install 'ifdefense[ray]'", name="ray") from error
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {}
    if address == LOCAL:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options = {"num_cpus": granted_cores(), "include_dashboard": False, "object_store_memory": STORE}
    else:
        _check_answers(address)
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR", **options)
    except Exception as error:  # of many kinds
        raise ConnectionError(f"{address}: no connection to Ray: {reason_of(error)}") from error
    return True


def _check_answers(address: str) -> None:
    """Checks that there is a cluster.

    Raises:
        ConnectionError: if not.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT).close()
        except (OSError, OverflowError) as error:
            raise ConnectionError(f"{address}: there is no cluster of Ray: {error}") from None
    if "://" in address:
        return
    # In a process of its own, as Ray's calls can neither be limited nor interrupted.
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        answer = subprocess.run(command, capture_output=True, timeout=ANSWER, check=False)
    except subprocess.TimeoutExpired:
        raise ConnectionError(f"{address}: no cluster of Ray answers") from None
    if answer.returncode:
        raise ConnectionError(f"{address}: there is no healthy cluster of Ray")


def _call(function: Callable[[Any, T], R], work: list[Any], task: T) -> R:
    return function(_fetched(work[0]), task)


@functools.lru_cache(maxsize=1)
def _fetched(reference: Any) -> Any:
    import ray

    return ray.get(reference)
