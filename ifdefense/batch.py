"""Purifies files and folders: what ``ifdefense purify`` does, without the command line around it."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ifdefense.clouds import Unpacked, unpack
from ifdefense.data.formats import (
    BATCH_SUFFIXES,
    CLOUD_SUFFIXES,
    MAX_POINTS,
    WRITABLE_SUFFIXES,
    CloudFile,
    encode_cloud_file,
    read_cloud_file,
    write_cloud_file,
    write_mesh,
)
from ifdefense.data.formats.files import write_bytes
from ifdefense.data.formats.table import Options

if TYPE_CHECKING:
    from ifdefense.purifiers.base import Purifier, Trace

STREAM = "-"
"""Stands for standard input or output."""

MESH_ENDING = ".mesh.ply"
"""Ending of the meshes that are written beside results; folders are read without them."""


class Refusal(ValueError):
    """A call that is refused before any work."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How files are read, purified and written.

    Attributes:
        num_points: points of each result; as many as came in by default.
        seed: seed of every draw.
        batch_size: clouds that are purified together.
        mesh: write the repaired surfaces as well.
        force: replace existing files.
        skip_existing: pass over files whose result exists.
        columns: names or numbers of the columns with x, y and z, as for `ifdefense.data.read_cloud`.
        key: name of the array of points in .npz and .h5 files.
        max_points: larger files are refused.
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
class Job:
    """A file to purify.

    Attributes:
        source: the file, ``-`` for standard input.
        target: where its result goes, ``-`` for standard output.
        suffix: what the source is.
        target_suffix: what the result becomes.
        meshes: name of its meshes, without their ending.
        file: what the source holds, once it is read.
        unpacked: its clouds, checked.
    """

    source: Path
    target: Path
    suffix: str
    target_suffix: str
    meshes: str = ""
    file: CloudFile | None = None
    unpacked: Unpacked | None = None

    def titles(self) -> list[str]:
        """What each cloud of the file is called."""
        count = 0 if self.file is None else len(self.file.clouds)
        return [str(self.source) if count == 1 else f"{self.source}, cloud {index}" for index in range(count)]

    def mesh_paths(self) -> list[Path]:
        """Where the mesh of each cloud goes."""
        count = 0 if self.file is None else len(self.file.clouds)
        names = [self.meshes] if count == 1 else [f"{self.meshes}-{index:04d}" for index in range(count)]
        return [self.target.with_name(f"{name}{MESH_ENDING}") for name in names]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        jobs: the files.
        unreadable: folders that could not be listed, and why.
    """

    jobs: list[Job]
    unreadable: list[tuple[Path, OSError]]


def plan(
    sources: Sequence[str],
    output: str,
    *,
    form: str | None = None,
    report: Path | None = None,
    force: bool = False,
) -> Plan:
    """Finds the files and where their results go; a folder keeps its tree.

    Args:
        sources: files, folders, or ``-``.
        output: file for one result, else folder; ``-`` for standard output.
        form: format of standard input and output, such as ``"ply"``.
        report: where a report goes.
        force: whether an existing report is replaced.

    Raises:
        Refusal: if there is no cloud, the output does not fit, or a file would be written over an input,
            another result or the report.
    """
    suffix = _format(form)
    unreadable: list[tuple[Path, OSError]] = []
    found: list[tuple[Path, Path]] = []
    for source in dict.fromkeys(sources):
        if source != STREAM and os.path.isdir(source):
            inside = list(_walk(Path(source), output, unreadable))
            if not inside and not unreadable:
                raise Refusal(f"{source}: no file in this folder is a cloud")
            found += [(path, path.relative_to(source)) for path in inside]
        else:
            found.append((Path(source), Path(Path(source).name)))
    one_file = len(sources) == 1 and not os.path.isdir(sources[0])
    jobs = _to_one(found[0][0], output, suffix) if one_file else None
    if jobs is None:
        jobs = _to_folder(found, output)
    jobs = _named_meshes(jobs)
    _refuse_overlaps(jobs, report)
    for path in (report, None if output == STREAM else Path(output)):
        if path is not None:
            _refuse_unwritable(path)
    if report is not None:
        if report.is_dir():
            raise Refusal(f"{report} is a folder")
        if report.exists() and not force:
            raise Refusal(f"{report} exists already; --force replaces it")
    return Plan(jobs, unreadable)


def _format(form: str | None) -> str | None:
    if form is None:
        return None
    suffix = f".{form.lower().lstrip('.')}"
    if suffix not in CLOUD_SUFFIXES:
        raise Refusal(f"unknown format {form!r}; there are {', '.join(s[1:] for s in CLOUD_SUFFIXES)}")
    return suffix


def _walk(folder: Path, output: str, unreadable: list[tuple[Path, OSError]]) -> Iterator[Path]:
    """The clouds of a folder; no hidden files, no meshes of earlier runs, nothing of the output."""
    out = os.path.realpath(output)
    if os.path.realpath(folder) == out:
        raise Refusal(f"{folder}: results cannot go into the folder that is read; name another one with -o")
    seen = {os.path.realpath(folder)}

    def failed(error: OSError) -> None:
        unreadable.append((Path(error.filename or folder), error))

    for place, folders, files in os.walk(folder, onerror=failed, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in list(folders):
            real = os.path.realpath(os.path.join(place, name))
            if real == out or real in seen:  # a link may lead back
                folders.remove(name)
            seen.add(real)
        for name in sorted(files):
            path = Path(place, name)
            hidden = name.startswith(".") or name.lower().endswith(MESH_ENDING)
            if not hidden and path.suffix.lower() in CLOUD_SUFFIXES:
                yield path


def _to_one(source: Path, output: str, suffix: str | None) -> list[Job] | None:
    """The job of one file whose result is named, or ``None`` if the output is a folder."""
    stream = str(source) == STREAM
    if stream and suffix is None:
        raise Refusal("standard input needs --format, such as --format ply")
    own = (suffix or "") if stream else source.suffix.lower()
    if output == STREAM:
        target_suffix = suffix or own
        if target_suffix not in WRITABLE_SUFFIXES:
            what = target_suffix or "a file without suffix"
            raise Refusal(f"no cloud is written to {what}; --format says what standard output becomes")
        return [Job(source, Path(STREAM), own, target_suffix)]
    if os.path.isdir(output) or output.endswith(("/", os.sep)):
        if stream:
            raise Refusal("the result of standard input needs a file or -, not a folder")
        return None
    target = Path(output)
    target_suffix = target.suffix.lower()
    if target_suffix in WRITABLE_SUFFIXES:
        return [Job(source, target, own, target_suffix, target.stem)]
    if stream or _is_ending(target_suffix):
        known = ", ".join(WRITABLE_SUFFIXES)
        what = target_suffix or "a file without suffix"
        raise Refusal(f"{output}: no cloud is written to {what}; known are {known} (a folder ends with /)")
    return None


def _is_ending(suffix: str) -> bool:
    """Whether this looks like the ending of a file: .las, .e57; not .2 of a version or .v2."""
    return re.fullmatch(r"\.(?!v\d)[a-z][a-z0-9]{1,5}", suffix) is not None


def _to_folder(found: Sequence[tuple[Path, Path]], output: str) -> list[Job]:
    """Jobs whose results go into a folder."""
    if any(str(path) == STREAM for path, _ in found):
        raise Refusal("standard input cannot be one of several inputs")
    if output == STREAM:
        raise Refusal("standard output holds one result; several need a folder")
    folder = Path(output)
    if folder.is_file():
        raise Refusal(f"{output} is a file: several results need a folder")
    if folder.suffix.lower() in CLOUD_SUFFIXES and not folder.is_dir() and not output.endswith("/"):
        raise Refusal(f"{output} names a file: several results need a folder (it may end with /)")
    jobs = []
    owner: dict[Path, Path] = {}
    for path, relative in found:
        own = path.suffix.lower()
        # A cloud cannot be an .stl.
        target = folder / (relative.with_suffix(".ply") if own == ".stl" else relative)
        first = owner.setdefault(target, path)
        if first is path:
            jobs.append(Job(path, target, own, target.suffix.lower(), target.stem))
        elif _identity(first) != _identity(path):
            raise Refusal(f"{first} and {path} would both be written to {target}")
    return jobs


def _named_meshes(jobs: list[Job]) -> list[Job]:
    """Jobs whose meshes have different names: with the suffix where there are ``s.xyz`` and ``s.ply``."""
    stems: dict[Path, int] = {}
    for job in jobs:
        stem = job.target.with_suffix("")
        stems[stem] = stems.get(stem, 0) + 1
    return [
        dataclasses.replace(job, meshes=job.target.name) if stems[job.target.with_suffix("")] > 1 else job
        for job in jobs
    ]


def _identity(path: Path) -> object:
    """The same for every path of the same file."""
    try:
        state = path.stat()
    except OSError:
        return os.path.realpath(path)
    return state.st_dev, state.st_ino


def _refuse_overlaps(jobs: Sequence[Job], report: Path | None) -> None:
    inputs = {_identity(job.source): job.source for job in jobs if str(job.source) != STREAM}
    targets: dict[object, Path] = {}
    for job in jobs:
        if str(job.target) == STREAM:
            continue
        identity = _identity(job.target)
        if identity in inputs:
            raise Refusal(
                f"the result {job.target} would be written over the input {inputs[identity]}; "
                "name another file or folder with -o"
            )
        if identity in targets:
            raise Refusal(f"{targets[identity]} and {job.target} are the same file")
        targets[identity] = job.target
    if report is not None:
        identity = _identity(report)
        for files, what in ((inputs, "input"), (targets, "result")):
            if identity in files:
                raise Refusal(f"the report {report} would be written over the {what} {files[identity]}")
        if report.name.lower().endswith(MESH_ENDING):
            raise Refusal(f"the report {report} has the ending of a mesh")


def _refuse_unwritable(path: Path) -> None:
    """Makes sure that the folder of a file can be made and written to."""
    for parent in path.absolute().parents:
        if os.path.lexists(parent):
            if not parent.is_dir():
                raise Refusal(f"{path}: {parent} is no folder")
            if not os.access(parent, os.W_OK | os.X_OK):
                raise Refusal(f"{path}: the folder {parent} is not writable")
            return


def grouped(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """Collects files until together they have a batch of clouds."""
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
    """Purifies the files of a plan. A file that fails is told and passed over.

    Attributes:
        purifier: the method.
        settings: how files are read, purified and written.
        report_size: clouds that are kept for a report at most.
        tell: called with every error and warning.
        advance: called after every file.
        streams: standard input and output.
        failed: files that failed so far.
        skipped: files whose result existed.
        done: clouds that were purified.
        reported: title and trace of the first of them.
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
            report: a file that no mesh may replace.
        """
        for path in [report, *(path for job in jobs for path in (job.source, job.target))]:
            if path is not None and str(path) != STREAM:
                self.claimed[_identity(path)] = path
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
        """Reads files, passing over those that are no good or whose results exist."""
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
            except Exception as error:  # one bad file never stops the others
                self._fail(job.source, error)
            else:
                yield job

    def _check_free(self, path: Path) -> None:
        """Makes sure, before any work, that nothing is replaced."""
        if str(path) != STREAM and path.exists() and not self.settings.force:
            raise FileExistsError(f"{path} exists already; --force replaces it, --skip-existing keeps it")

    def _claim_meshes(self, job: Job) -> None:
        for path in job.mesh_paths():
            other = self.claimed.setdefault(_identity(path), path)
            if other is not path:
                raise ValueError(f"its mesh {path} would be written over {other}")
            self._check_free(path)

    def _purify_group(self, jobs: Sequence[Job]) -> None:
        """Purifies the clouds of some files together, or of each file alone where that fails."""
        clouds = Unpacked.of([job.unpacked for job in jobs if job.unpacked is not None])
        settings = self.settings
        try:
            traces = self.purifier.trace(
                clouds, settings.num_points, settings.seed, batch_size=settings.batch_size, up=settings.up
            )
        except Exception as error:  # one bad cloud never stops the others
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
            raise ValueError(f"{flat[0]}: there is no surface, so no mesh of it was written; the cloud was")


def write_report(path: Path, run: Run, facts: dict[str, str], force: bool) -> None:
    """Writes the HTML page of the first clouds that were done.

    Raises:
        OSError: if its folder cannot be made.
        DataError: if it exists already or cannot be written.
    """
    from ifdefense.report import Case, render_html

    shown = len(run.reported)
    if shown < run.done:
        facts = {**facts, "clouds": f"the first {shown} of {run.done}; --report-clouds shows more"}
    page = render_html(
        [Case(name, trace) for name, trace in run.reported],
        title="What the purification did",
        facts=facts,
        total=run.done,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, page.encode("utf-8"), force=force)
