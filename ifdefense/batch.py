"""Runs ``ifdefense purify``: reads, purifies and writes the planned files."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ifdefense.batch_plan import STREAM, Job, Refusal, identity
from ifdefense.clouds import Unpacked, unpack
from ifdefense.data.formats import (
    BATCH_SUFFIXES,
    MAX_POINTS,
    encode_cloud_file,
    read_cloud_file,
    write_cloud_file,
    write_mesh,
)
from ifdefense.data.formats.files import write_bytes
from ifdefense.data.formats.table import Options

if TYPE_CHECKING:
    from ifdefense.purifiers.base import Purifier, Trace


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


def grouped(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """Groups files so that each group has at least ``size`` clouds, except for the last."""
    group: list[Job] = []
    for job in jobs:
        group.append(job)
        if sum(len(member.titles()) for member in group) >= size:
            yield group
            group = []
    if group:
        yield group


@dataclasses.dataclass(eq=False)
class Run:
    """Purifies the files of a plan. Failing files are reported and skipped.

    Attributes:
        purifier: the method.
        settings: how files are read, purified and written.
        report_size: maximum number of clouds kept for a report.
        tell: called with every error and warning.
        advance: called after each file.
        streams: standard input and output.
        failed: number of failed files.
        skipped: number of files whose results existed.
        done: number of purified clouds.
        reported: titles and traces of the first purified clouds.
    """

    purifier: Purifier
    settings: Settings
    report_size: int
    tell: Callable[[str], object]
    advance: Callable[[], object]
    streams: tuple[BinaryIO, BinaryIO]
    failed: int = 0
    skipped: int = 0
    done: int = 0
    reported: list[tuple[str, Trace]] = dataclasses.field(default_factory=list)
    claimed: dict[object, Path] = dataclasses.field(default_factory=dict)

    def purify(self, jobs: Sequence[Job], report: Path | None = None) -> None:
        """Purifies all files.

        Args:
            jobs: the files.
            report: path of the report, which meshes must not overwrite.
        """
        for path in [report, *(path for job in jobs for path in (job.source, job.target))]:
            if path is not None and str(path) != STREAM:
                self.claimed[identity(path)] = path
        for group in grouped(self._read(jobs), self.settings.batch_size):
            self._purify_group(group)

    def _fail(self, source: Path, error: Exception) -> None:
        self.failed += 1
        if isinstance(error, MemoryError):
            text = "there is not enough memory"
        elif isinstance(error, (ValueError, TypeError, OSError, ImportError, RuntimeError)):
            text = str(error) or type(error).__name__
        else:
            text = f"{type(error).__name__}: {error}"
        self.tell(f"error: {text if str(source) in text else f'{source}: {text}'}")
        self.advance()

    def _read(self, jobs: Iterable[Job]) -> Iterator[Job]:
        """Reads files; skips unreadable ones and those whose results exist."""
        settings = self.settings
        for job in jobs:
            try:
                if settings.skip_existing and str(job.target) != STREAM and job.target.is_file():
                    self.skipped += 1
                    self.advance()
                    continue
                self._check_free(job.target)
                file = read_cloud_file(
                    self.streams[0] if str(job.source) == STREAM else job.source,
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
                self._fail(job.source, error)
            else:
                yield job

    def _check_free(self, path: Path) -> None:
        """Checks, before any work, that the path does not exist or may be replaced."""
        if str(path) != STREAM and path.exists() and not self.settings.force:
            raise FileExistsError(f"{path} exists already; --force replaces it, --skip-existing keeps it")

    def _claim_meshes(self, job: Job) -> None:
        for path in job.mesh_paths():
            other = self.claimed.setdefault(identity(path), path)
            if other is not path:
                raise ValueError(f"its mesh {path} would be written over {other}")
            self._check_free(path)

    def _purify_group(self, jobs: Sequence[Job]) -> None:
        """Purifies the clouds of a group of files together; if that fails, file by file."""
        clouds = Unpacked.of([job.unpacked for job in jobs if job.unpacked is not None])
        settings = self.settings
        try:
            traces = self.purifier.trace(
                clouds, settings.num_points, settings.seed, batch_size=settings.batch_size, up=settings.up
            )
        except Exception as error:  # one bad cloud must not stop the others
            if len(jobs) == 1:
                self._fail(jobs[0].source, error)
            else:
                for job in jobs:
                    self._purify_group([job])
            return
        rest = iter(traces)
        for job in jobs:
            part = list(itertools.islice(rest, len(job.titles())))
            try:
                self._write(job, part)
            except Exception as error:  # as above
                self._fail(job.source, error)
            else:
                self.advance()

    def _write(self, job: Job, traces: Sequence[Trace]) -> None:
        """Writes the results of one file."""
        assert job.file is not None
        for title, trace in zip(job.titles(), traces, strict=True):
            if trace.fallback is not None:
                self.tell(f"warning: {title}: {trace.fallback}, the filtered input is resampled")
        result = job.file.moved([trace.purified for trace in traces])
        if str(job.target) == STREAM:
            self.streams[1].write(encode_cloud_file(result, job.target_suffix))
            self.streams[1].flush()
        else:
            job.target.parent.mkdir(parents=True, exist_ok=True)
            if self.settings.mesh:
                for path, trace in zip(job.mesh_paths(), traces, strict=True):
                    if trace.repaired is not None:
                        write_mesh(path, trace.repaired, force=self.settings.force)
            write_cloud_file(job.target, result, force=self.settings.force)
        self.done += len(traces)
        room = self.report_size - len(self.reported)
        self.reported += list(zip(job.titles(), traces, strict=True))[:room]
        flat = [title for title, trace in zip(job.titles(), traces, strict=True) if trace.repaired is None]
        if self.settings.mesh and flat:
            raise ValueError(
                f"{flat[0]}: no surface was found, so only the cloud was written, without a mesh"
            )


def write_report(path: Path, run: Run, facts: dict[str, str], force: bool) -> None:
    """Writes the HTML report of the first purified clouds.

    Raises:
        OSError: if the folder cannot be created.
        DataError: if it exists already or cannot be written.
    """
    from ifdefense.report import Case, render_html

    shown = len(run.reported)
    if shown < run.done:
        facts = {**facts, "clouds": f"the first {shown} of {run.done}; --report-clouds shows more"}
    page = render_html(
        [Case(name, trace) for name, trace in run.reported],
        title="Purification report",
        facts=facts,
        total=run.done,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, page.encode("utf-8"), force=force)
