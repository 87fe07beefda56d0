"""Runs ``ifdefense purify``: reads, purifies and writes the planned files, here or in a pool of workers."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import platform
import sys
from collections import ChainMap, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ifdefense.batch_plan import STREAM, Job, Refusal, identity, together
from ifdefense.clouds import Unpacked, unpack
from ifdefense.data.errors import DataError
from ifdefense.data.formats import (
    BATCH_SUFFIXES,
    MAX_POINTS,
    encode_cloud_file,
    read_cloud_file,
    write_cloud_file,
    write_mesh,
)
from ifdefense.data.formats.files import is_full, write_bytes
from ifdefense.data.formats.table import Options
from ifdefense.pool import TRIES, Lost, Pool, answers, ending, reason_of

if TYPE_CHECKING:
    from ifdefense.purifiers.base import Purifier, Trace

SHARES = 8
"""Minimum number of shards per worker, so that all workers end at about the same time."""

BATCHES = 4
"""Maximum number of batches per shard, as a dead worker loses a shard."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How files are read, purified and written.

    Attributes:
        num_points: points per result; by default as in the input.
        seed: random seed.
        batch_size: clouds processed together.
        mesh: whether to write the repaired surfaces as well.
        force: whether to replace existing files.
        skip_existing: whether to skip files whose results exist.
        columns: names or numbers of the columns with x, y and z, as for `ifdefense.data.read_cloud`.
        key: name of the array of points in .npz and .h5 files.
        max_points: limit on the number of points; larger files are rejected.
        up: up axis of the clouds; z by default.
    """

    num_points: int | None = None
    seed: int = 0
    batch_size: int = 16
    mesh: bool = False
    force: bool = False
    skip_existing: bool = False
    columns: str | None = None
    key: str | None = None
    max_points: int = MAX_POINTS
    up: str | None = None

    def __post_init__(self) -> None:
        if self.force and self.skip_existing:
            raise Refusal("files that exist are either replaced or skipped")
        try:
            Options(None if self.columns is None else tuple(self.columns.split(",")))
        except ValueError as error:
            raise Refusal(str(error)) from None


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """What all files of a run share.

    Attributes:
        purifier: the method.
        settings: how files are read, purified and written.
        claimed: all files of the run by identity, which meshes must not overwrite.
        threads: number of threads of a worker; by default unchanged.
        folder: working directory of a worker, for relative paths; by default unchanged.
    """

    purifier: Purifier
    settings: Settings
    claimed: dict[object, Path] = dataclasses.field(default_factory=dict)
    threads: int | None = None
    folder: Path | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Shard:
    """Files that a worker purifies.

    Attributes:
        jobs: the files.
        room: maximum number of clouds for the report.
        tries: number of workers that died from it.
    """

    jobs: Sequence[Job]
    room: int = 0
    tries: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class FileResult:
    """What became of a file.

    Attributes:
        number: number of the job.
        messages: errors and warnings.
        clouds: number of purified clouds.
        failed: whether it failed.
        skipped: whether its result existed.
        full: the error if the disk is full, which ends the run; otherwise empty.
        traces: titles and traces of clouds for the report.
    """

    number: int
    messages: Sequence[str] = ()
    clouds: int = 0
    failed: bool = False
    skipped: bool = False
    full: str = ""
    traces: Sequence[tuple[str, Trace]] = ()


ShardPool = Pool[Shard, list[FileResult]]


@dataclasses.dataclass(eq=False)
class Tally:
    """Counts results and tells messages, in the order of the files.

    Attributes:
        report_size: maximum number of clouds kept for a report.
        tell: called with every error and warning.
        advance: called with the number of clouds of each file that is done.
        failed: number of failed files.
        skipped: number of files whose results existed.
        written: number of files whose results were written.
        full: the first error of a full disk, after which no further file is purified.
        done: number of purified clouds.
        reported: titles and traces of the first purified clouds.
    """

    report_size: int
    tell: Callable[[str], object]
    advance: Callable[[int], object]
    failed: int = 0
    skipped: int = 0
    written: int = 0
    full: str = ""
    done: int = 0
    reported: list[tuple[str, Trace]] = dataclasses.field(default_factory=list)
    waiting: dict[int, FileResult] = dataclasses.field(default_factory=dict, init=False)
    counted: int = dataclasses.field(default=0, init=False)

    @property
    def room(self) -> int:
        """Number of clouds that the report may still take."""
        return self.report_size - len(self.reported)

    def add(self, result: FileResult) -> None:
        """Adds the result of a file; it is counted when all files before it are done."""
        self.waiting[result.number] = result
        self.full = self.full or result.full
        self.advance(result.clouds)
        while self.counted in self.waiting:
            self._count(self.waiting.pop(self.counted))
            self.counted += 1

    def close(self) -> None:
        """Counts the remaining results of an interrupted run."""
        for number in sorted(self.waiting):
            self._count(self.waiting.pop(number))

    def _count(self, result: FileResult) -> None:
        self.failed += result.failed
        self.skipped += result.skipped
        self.written += not (result.failed or result.skipped)
        self.done += result.clouds
        self.reported += result.traces[: self.room]
        for message in result.messages:
            self.tell(message)


def claims(jobs: Sequence[Job], report: Path | None) -> dict[object, Path]:
    """All files of a run by identity."""
    paths = [report, *(path for job in jobs for path in (job.source, job.target))]
    return {identity(path): path for path in paths if path is not None and str(path) != STREAM}


def purify_here(work: Work, jobs: Sequence[Job], tally: Tally) -> None:
    """Purifies files in this process."""
    with contextlib.closing(tally), _quiet():
        for result in _Run(work, room=tally.report_size).purify(jobs):
            tally.add(result)


def purify_in_pool(settings: Settings, jobs: Sequence[Job], tally: Tally, pool: ShardPool) -> None:
    """Purifies files in a pool of workers that run `purify_shard`; the pool is closed.

    If a worker dies, the files of its shard are purified again, one by one. If the disk is full, the other
    workers end their shards, so that their files are counted.
    """
    waiting = deque(_shards(settings, jobs, pool.size))

    def sent(shard: Shard) -> Shard:
        # Once a worker has died, its results can no longer be told from those before the run.
        fresh = shard.jobs if shard.tries else [job.checked() for job in shard.jobs]
        return Shard(fresh, tally.room, shard.tries)

    with contextlib.closing(tally), ending(pool):
        for shard, answer in answers(pool, waiting, sent):
            if isinstance(answer, Lost):
                waiting.extendleft(_again(shard, answer, tally))
            else:
                for result in answer:
                    tally.add(result)
            if tally.full:
                waiting.clear()


def purify_shard(work: Work, shard: Shard) -> list[FileResult]:
    """Purifies files in a worker.

    Raises:
        FileNotFoundError: if the machine does not have the working directory.
    """
    import torch

    if work.threads is not None:
        torch.set_num_threads(work.threads)
    if work.folder is not None and not work.folder.is_dir():
        raise FileNotFoundError(
            f"{platform.node()} has no folder {work.folder}: all machines need the same folders"
        )
    folder = contextlib.nullcontext() if work.folder is None else contextlib.chdir(work.folder)
    with folder, _quiet():
        return list(_Run(work, shard.room, retry=shard.tries > 0).purify(shard.jobs))


def _shards(settings: Settings, jobs: Sequence[Job], workers: int) -> Iterator[Shard]:
    size = min(BATCHES * settings.batch_size, max(1, len(jobs) // (SHARES * workers)))
    part: list[Job] = []
    for group in together(jobs) if settings.mesh else ([job] for job in jobs):
        part += group
        if len(part) >= size:
            yield Shard(part)
            part = []
    if part:
        yield Shard(part)


def _again(shard: Shard, lost: Lost, tally: Tally) -> list[Shard]:
    """Shards to try again; adds the files that are given up to the tally."""
    tries = shard.tries + lost.died
    if lost.died and len(shard.jobs) > 1:
        return [Shard([job], tries=tries) for job in reversed(shard.jobs)]
    if lost.died and tries < TRIES:
        return [Shard(shard.jobs, tries=tries)]
    for job in shard.jobs:
        tally.add(_failure(job, lost.reason))
    return []


def _failure(job: Job, reason: str) -> FileResult:
    text = reason if str(job.source) in reason else f"{job.source}: {reason}"
    return FileResult(job.number, [f"error: {text}"], failed=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the purifier's warnings, which are reported with the name of the file."""
    logger = logging.getLogger("ifdefense.purifiers.base")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@dataclasses.dataclass(eq=False)
class _Run:
    """Purifies files one after another. Failing files are reported and skipped; a full disk ends the run.

    Attributes:
        work: what all files share.
        room: maximum number of clouds for the report.
        retry: whether results of an earlier try may exist, which are replaced.
    """

    work: Work
    room: int = 0
    retry: bool = False

    def __post_init__(self) -> None:
        self.settings = self.work.settings
        self.claimed = ChainMap({}, self.work.claimed)

    def purify(self, jobs: Iterable[Job]) -> Iterator[FileResult]:
        """Yields the result of each file when it is done, up to the first for which the disk is full."""
        for result in self._purify(jobs):
            yield result
            if result.full:
                return

    def _purify(self, jobs: Iterable[Job]) -> Iterator[FileResult]:
        group: list[Job] = []
        for job in jobs:
            read = self._read(job)
            if isinstance(read, FileResult):
                yield read
                continue
            group.append(read)
            if sum(len(member.titles()) for member in group) >= self.settings.batch_size:
                yield from self._purify_group(group)
                group = []
        if group:
            yield from self._purify_group(group)

    def _replaces(self, job: Job) -> bool:
        return self.settings.force or (self.retry and job.fresh)

    def _read(self, job: Job) -> Job | FileResult:
        """Reads a file, unless it cannot be read or its result exists."""
        settings = self.settings
        try:
            if settings.skip_existing and not self._replaces(job) and job.target.is_file():
                return FileResult(job.number, skipped=True)
            _check_free(job.target, self._replaces(job))
            file = read_cloud_file(
                sys.stdin.buffer if str(job.source) == STREAM else job.source,
                settings.num_points or 1024,
                settings.seed,
                suffix=job.suffix,
                columns=settings.columns,
                key=settings.key,
                max_points=settings.max_points,
            )
            points = [cloud.points for cloud in file.clouds]
            unpacked = unpack(points if len(points) > 1 else points[0])
            if len(file.clouds) > 1 and job.target_suffix not in BATCH_SUFFIXES:
                raise ValueError(f"{job.target} cannot hold {len(file.clouds)} clouds; .npz can")
            job = dataclasses.replace(job, file=file, unpacked=unpacked)
            if settings.mesh:
                self._claim_meshes(job)
        except Exception as error:  # one bad file must not stop the others
            return _failure(job, reason_of(error))
        return job

    def _claim_meshes(self, job: Job) -> None:
        for path in job.mesh_paths():
            other = self.claimed.setdefault(identity(path), path)
            if other is not path:
                raise ValueError(f"its mesh {path} would be written over {other}")
            _check_free(path, self._replaces_meshes(job))

    def _replaces_meshes(self, job: Job) -> bool:
        # A mesh without its cloud is what an interrupted run leaves.
        return self._replaces(job) or self.settings.skip_existing

    def _purify_group(self, jobs: Sequence[Job]) -> Iterator[FileResult]:
        """Purifies the clouds of a group of files together; if that fails, file by file."""
        clouds = Unpacked.of([job.unpacked for job in jobs if job.unpacked is not None])
        settings = self.settings
        try:
            traces = self.work.purifier.trace(
                clouds, settings.num_points, settings.seed, batch_size=settings.batch_size, up=settings.up
            )
        except Exception as error:  # one bad cloud must not stop the others
            if len(jobs) == 1:
                yield _failure(jobs[0], reason_of(error))
            else:
                for job in jobs:
                    yield from self._purify_group([job])
            return
        rest = iter(traces)
        for job in jobs:
            yield self._written(job, list(itertools.islice(rest, len(job.titles()))))

    def _written(self, job: Job, traces: Sequence[Trace]) -> FileResult:
        """Writes the results of one file."""
        named = list(zip(job.titles(), traces, strict=True))
        messages = [
            f"warning: {title}: {trace.fallback}, the filtered input is resampled"
            for title, trace in named
            if trace.fallback is not None
        ]
        try:
            self._write(job, traces)
        except Exception as error:  # as above
            if is_full(error):
                return FileResult(job.number, messages, failed=True, full=reason_of(error))
            failure = _failure(job, reason_of(error))
            return dataclasses.replace(failure, messages=[*messages, *failure.messages])
        result = FileResult(job.number, messages, len(traces), traces=named[: self.room])
        self.room -= len(result.traces)
        flat = [title for title, trace in named if trace.repaired is None]
        if self.settings.mesh and flat:
            reason = f"{flat[0]}: no surface was found, so only the cloud was written, without a mesh"
            return dataclasses.replace(
                result, messages=[*messages, *_failure(job, reason).messages], failed=True
            )
        return result

    def _write(self, job: Job, traces: Sequence[Trace]) -> None:
        assert job.file is not None
        result = job.file.moved([trace.purified for trace in traces])
        if str(job.target) == STREAM:
            sys.stdout.buffer.write(encode_cloud_file(result, job.target_suffix))
            sys.stdout.buffer.flush()
            return
        try:
            job.target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # as of any file that cannot be written
            raise DataError(f"{job.target}: it could not be written: {error.strerror or error}") from error
        if self.settings.mesh:
            for path, trace in zip(job.mesh_paths(), traces, strict=True):
                if trace.repaired is not None:
                    write_mesh(path, trace.repaired, force=self._replaces_meshes(job))
        write_cloud_file(job.target, result, force=self._replaces(job))


def _check_free(path: Path, force: bool) -> None:
    """Checks, before any work, that the path does not exist or may be replaced."""
    if str(path) != STREAM and path.exists() and not force:
        raise FileExistsError(f"{path} exists already; --force replaces it, --skip-existing keeps it")


def write_report(path: Path, tally: Tally, facts: dict[str, str], force: bool) -> None:
    """Writes the HTML report of the first purified clouds.

    Raises:
        OSError: if the folder cannot be created.
        DataError: if it exists already or cannot be written.
    """
    from ifdefense.report import Case, render_html

    shown = len(tally.reported)
    if shown < tally.done:
        facts = {**facts, "clouds": f"the first {shown} of {tally.done}; --report-clouds shows more"}
    page = render_html(
        [Case(name, trace) for name, trace in tally.reported],
        title="Purification report",
        facts=facts,
        total=tally.done,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, page.encode("utf-8"), force=force)
