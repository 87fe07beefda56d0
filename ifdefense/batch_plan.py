"""Plans ``ifdefense purify``: finds the input files and the paths of their results."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ifdefense.clouds import Unpacked
from ifdefense.data.formats import BATCH_SUFFIXES, CLOUD_SUFFIXES, WRITABLE_SUFFIXES, CloudFile

STREAM = "-"
"""Name of standard input and output."""

MESH_ENDING = ".mesh.ply"
"""Suffix of the meshes written next to results; such files are skipped when folders are read."""


class Refusal(ValueError):
    """Raised for a call that is rejected before any work."""


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A file to purify.

    Attributes:
        source: the file, ``-`` for standard input.
        target: path of the result, ``-`` for standard output.
        suffix: format of the source, such as ``.ply``.
        target_suffix: format of the result.
        meshes: file name of the meshes, without suffix.
        number: its place in the plan.
        fresh: whether none of its results is known to have existed before the run.
        file: contents of the source, after reading.
        unpacked: the checked clouds.
    """

    source: Path
    target: Path
    suffix: str
    target_suffix: str
    meshes: str = ""
    number: int = 0
    fresh: bool = False
    file: CloudFile | None = None
    unpacked: Unpacked | None = None

    def titles(self) -> list[str]:
        """Name of each cloud of the file, for messages."""
        count = 0 if self.file is None else len(self.file.clouds)
        return [str(self.source) if count == 1 else f"{self.source}, cloud {index}" for index in range(count)]

    def mesh_paths(self) -> list[Path]:
        """Path of the mesh of each cloud."""
        count = 0 if self.file is None else len(self.file.clouds)
        names = [self.meshes] if count == 1 else [f"{self.meshes}-{index:04d}" for index in range(count)]
        return [self.target.with_name(f"{name}{MESH_ENDING}") for name in names]

    def checked(self) -> Job:
        """This job, with whether its results are fresh."""
        named = [f"{self.meshes}{ending}{MESH_ENDING}" for ending in ("", "-0000")]
        paths = [self.target, *(self.target.with_name(name) for name in named)]
        return dataclasses.replace(self, fresh=not any(path.exists() for path in paths))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Files to purify.

    Attributes:
        jobs: the files.
        unreadable: folders that could not be listed, with the errors.
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
    """Finds the input files and the paths of their results; subfolders are kept.

    Args:
        sources: files, folders, or ``-``.
        output: a file for one result, otherwise a folder; ``-`` for standard output.
        form: format of standard input and output, such as ``"ply"``.
        report: path of the report.
        force: whether to replace an existing report.

    Raises:
        Refusal: if no cloud is found, the output does not match the inputs, or a file would overwrite an
            input, another result or the report.
    """
    suffix = _format(form)
    unreadable: list[tuple[Path, OSError]] = []
    found: list[tuple[Path, Path]] = []
    for source in dict.fromkeys(sources):
        if source != STREAM and os.path.isdir(source):
            inside = list(_walk(Path(source), output, unreadable))
            if not inside and not unreadable:
                raise Refusal(f"{source}: no point clouds in this folder")
            found += [(path, path.relative_to(source)) for path in inside]
        else:
            found.append((Path(source), Path(Path(source).name)))
    one_file = len(sources) == 1 and not os.path.isdir(sources[0])
    jobs = _to_one(found[0][0], output, suffix) if one_file else None
    if jobs is None:
        jobs = _to_folder(found, output)
    jobs = [dataclasses.replace(job, number=number) for number, job in enumerate(_named_meshes(jobs))]
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
    """Clouds of a folder, without hidden files, meshes of earlier runs and the output folder."""
    out = os.path.realpath(output)
    if os.path.realpath(folder) == out:
        raise Refusal(f"{folder}: results cannot go into the input folder; choose another one with -o")
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
    """Job of a single file with a named result; ``None`` if the output is a folder."""
    stream = str(source) == STREAM
    if stream and suffix is None:
        raise Refusal("standard input needs --format, such as --format ply")
    own = (suffix or "") if stream else source.suffix.lower()
    if output == STREAM:
        target_suffix = suffix or own
        if target_suffix not in WRITABLE_SUFFIXES:
            what = target_suffix or "a file without suffix"
            raise Refusal(f"no cloud is written to {what}; --format sets the format of standard output")
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
    """Whether this looks like a file suffix (.las, .e57) rather than a version (.2, .v2)."""
    return re.fullmatch(r"\.(?!v\d)[a-z][a-z0-9]{1,5}", suffix) is not None


def _to_folder(found: Sequence[tuple[Path, Path]], output: str) -> list[Job]:
    """Jobs with results in a folder."""
    if any(str(path) == STREAM for path, _ in found):
        raise Refusal("standard input cannot be one of several inputs")
    if output == STREAM:
        raise Refusal("standard output can hold only one result; several need a folder")
    folder = Path(output)
    if folder.is_file():
        raise Refusal(f"{output} is a file: several results need a folder")
    if folder.suffix.lower() in CLOUD_SUFFIXES and not folder.is_dir() and not output.endswith("/"):
        raise Refusal(f"{output} names a file: several results need a folder (it may end with /)")
    jobs = []
    owner: dict[Path, Path] = {}
    for path, relative in found:
        own = path.suffix.lower()
        # STL cannot store point clouds.
        target = folder / (relative.with_suffix(".ply") if own == ".stl" else relative)
        first = owner.setdefault(target, path)
        if first is path:
            jobs.append(Job(path, target, own, target.suffix.lower(), target.stem))
        elif identity(first) != identity(path):
            raise Refusal(f"{first} and {path} would both be written to {target}")
    return jobs


def _named_meshes(jobs: list[Job]) -> list[Job]:
    """Makes the names of meshes unique: includes the suffix if there are both ``s.xyz`` and ``s.ply``."""
    stems: dict[Path, int] = {}
    for job in jobs:
        stem = job.target.with_suffix("")
        stems[stem] = stems.get(stem, 0) + 1
    return [
        dataclasses.replace(job, meshes=job.target.name) if stems[job.target.with_suffix("")] > 1 else job
        for job in jobs
    ]


def together(jobs: Sequence[Job]) -> list[list[Job]]:
    """Groups jobs whose meshes may have the same path, such as ``m-0001.xyz`` and a cloud of ``m.npz``."""
    folders: dict[Path, str] = {}

    def place(job: Job) -> tuple[str, str]:
        parent = job.target.parent
        if parent not in folders:
            folders[parent] = os.path.realpath(parent)
        return folders[parent], job.meshes

    several = {place(job) for job in jobs if job.suffix in BATCH_SUFFIXES}
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        folder, name = place(job)
        while (shorter := re.sub(r"-\d{4,}$", "", name)) != name and (folder, shorter) in several:
            name = shorter
        groups.setdefault((folder, name), []).append(job)
    return list(groups.values())


def identity(path: Path) -> object:
    """Identifier of a file that is equal for all paths to it."""
    try:
        state = path.stat()
    except OSError:
        return os.path.realpath(path)
    return state.st_dev, state.st_ino


def _refuse_overlaps(jobs: Sequence[Job], report: Path | None) -> None:
    inputs = {identity(job.source): job.source for job in jobs if str(job.source) != STREAM}
    targets: dict[object, Path] = {}
    for job in jobs:
        if str(job.target) == STREAM:
            continue
        key = identity(job.target)
        if key in inputs:
            raise Refusal(
                f"the result {job.target} would be written over the input {inputs[key]}; "
                "name another file or folder with -o"
            )
        if key in targets:
            raise Refusal(f"{targets[key]} and {job.target} are the same file")
        targets[key] = job.target
    if report is not None:
        key = identity(report)
        for files, what in ((inputs, "input"), (targets, "result")):
            if key in files:
                raise Refusal(f"the report {report} would be written over the {what} {files[key]}")
        if report.name.lower().endswith(MESH_ENDING):
            raise Refusal(f"the report {report} has the suffix of a mesh")


def _refuse_unwritable(path: Path) -> None:
    """Checks that the folder of a file exists or can be created, and is writable."""
    for parent in path.absolute().parents:
        if os.path.lexists(parent):
            if not parent.is_dir():
                raise Refusal(f"{path}: {parent} is not a folder")
            if not os.access(parent, os.W_OK | os.X_OK):
                raise Refusal(f"{path}: the folder {parent} is not writable")
            return
