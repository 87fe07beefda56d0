"""The command line: ``ifdefense purify``, ``ifdefense train`` and ``ifdefense info``."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from numpy.typing import NDArray

from ifdefense.console import LazyGroup, use_huge_pages
from ifdefense.purifiers.registry import DEFAULT, METHODS

if TYPE_CHECKING:
    from tqdm import tqdm

    from ifdefense.purifiers.base import Purifier, Trace

REPORTED = 12
"""Clouds that a report shows at most: each costs about half a megabyte."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ifdefense")
def main() -> None:
    """Defends point-cloud classifiers: rebuilds the surface behind an attacked cloud and samples it anew."""
    use_huge_pages()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)


@main.group(
    cls=LazyGroup,
    lazy={"onet": ("ifdefense.training.onet:train_command", "The Occupancy Network.")},
)
def train() -> None:
    """Trains an implicit function."""


@main.command()
def info() -> None:
    """Prints versions, the device, the methods and the weights that are shipped."""
    import torch

    for package in ("ifdefense", "torch", "numpy", "scipy", "scikit-image", "trimesh"):
        click.echo(f"{package:<14} {metadata.version(package)}")
    click.echo(f"{'python':<14} {platform.python_version()}")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    click.echo(f"{'device':<14} {', '.join(names) or f'cpu, {torch.get_num_threads()} threads'}")
    click.echo(f"{'methods':<14} {', '.join(METHODS)}")
    folder = resources.files("ifdefense") / "weights"
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".safetensors"):
            name = entry.name.removesuffix(".safetensors")
            click.echo(f"\nweights {name} ({len(entry.read_bytes()) / 1e6:.1f} MB)")
            card = folder / f"{name}.md"
            if card.is_file():
                click.echo(card.read_text(encoding="utf-8").rstrip())


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A file to purify.

    Attributes:
        source: the file.
        target: where its result goes.
        clouds: what it holds, ``(N, 3)`` each.
    """

    source: Path
    target: Path
    clouds: list[NDArray[np.floating]] = dataclasses.field(default_factory=list)

    def names(self) -> list[str]:
        """A name for each cloud."""
        if len(self.clouds) == 1:
            return [self.target.stem]
        return [f"{self.target.stem}-{index:04d}" for index in range(len(self.clouds))]


@dataclasses.dataclass(eq=False)
class Run:
    """What one call of ``ifdefense purify`` is to do, and what became of it."""

    purifier: Purifier
    num_points: int | None
    seed: int
    mesh: bool
    force: bool
    bar: tqdm[None]
    reported: list[tuple[str, Trace]] = dataclasses.field(default_factory=list)
    failed: int = 0

    def fail(self, source: Path, error: Exception) -> None:
        """Tells about a file that could not be done."""
        self.failed += 1
        text = str(error)
        self.bar.write(f"error: {text if str(source) in text else f'{source}: {text}'}", file=sys.stderr)
        self.bar.update()

    def read(self, jobs: Iterable[Job]) -> Iterator[Job]:
        """Reads files, passing over those that are no good or whose results are there already."""
        from ifdefense.clouds import unpack
        from ifdefense.data.formats import BATCH_SUFFIXES, read_clouds

        for job in jobs:
            try:
                self.check_free(job.target)
                clouds = read_clouds(job.source, mesh_points=self.num_points or 1024, seed=self.seed)
                unpack(clouds)
                if len(clouds) > 1 and job.target.suffix.lower() not in BATCH_SUFFIXES:
                    raise ValueError(f"{job.target} cannot hold {len(clouds)} clouds; .npz can")
                job = dataclasses.replace(job, clouds=clouds)
                for path in self.mesh_paths(job):
                    self.check_free(path)
            except (ValueError, TypeError, OSError, ImportError) as error:
                self.fail(job.source, error)
            else:
                yield job

    def check_free(self, path: Path) -> None:
        """Makes sure, before any work, that nothing is written over."""
        if path.exists() and not self.force:
            raise FileExistsError(f"{path} exists already; --force replaces it")

    def mesh_paths(self, job: Job) -> list[Path]:
        """Where the meshes of a file go, if they are asked for."""
        return [job.target.with_name(f"{name}.mesh.ply") for name in job.names() if self.mesh]

    def purify(self, jobs: Sequence[Job]) -> None:
        """Purifies the clouds of some files together, or of each file alone where that fails."""
        clouds = [cloud for job in jobs for cloud in job.clouds]
        try:
            traces = self.purifier.trace(clouds, self.num_points, self.seed)
        except (ValueError, RuntimeError) as error:
            if len(jobs) == 1:
                self.fail(jobs[0].source, error)
            else:
                for job in jobs:
                    self.purify([job])
            return
        rest = iter(traces)
        for job in jobs:
            try:
                self.write(job, list(itertools.islice(rest, len(job.clouds))))
            except (ValueError, OSError) as error:
                self.fail(job.source, error)
            else:
                self.bar.update()

    def write(self, job: Job, traces: Sequence[Trace]) -> None:
        """Writes the results of one file."""
        from ifdefense.data.formats import write_cloud, write_clouds, write_mesh

        job.target.parent.mkdir(parents=True, exist_ok=True)
        for path, trace in zip(self.mesh_paths(job), traces, strict=False):
            if trace.repaired is not None:
                write_mesh(path, trace.repaired, force=self.force)
        results = [trace.purified for trace in traces]
        if len(results) == 1:
            write_cloud(job.target, results[0], force=self.force)
        else:
            write_clouds(job.target, results, force=self.force)
        room = REPORTED - len(self.reported)
        self.reported += list(zip(job.names(), traces, strict=True))[:room]


@main.command()
@click.argument("sources", metavar="IN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="File, or folder for several."
)
@click.option("--method", type=click.Choice(list(METHODS)), default=DEFAULT, show_default=True)
@click.option(
    "--num-points", type=click.IntRange(min=1), help="Points of each result; by default as many as came in."
)
@click.option("--seed", default=0, show_default=True, help="Seed of every draw.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute, such as cuda:0.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Clouds at a time."
)
@click.option("--mesh", is_flag=True, help="Write the repaired surface as well, as NAME.mesh.ply.")
@click.option(
    "--report", type=click.Path(path_type=Path, dir_okay=False), help="Write an HTML page of what was done."
)
@click.option("--force", is_flag=True, help="Write over files that are there.")
def purify(
    sources: tuple[Path, ...],
    output: Path,
    method: str,
    num_points: int | None,
    seed: int,
    device: str,
    batch_size: int,
    mesh: bool,
    report: Path | None,
    force: bool,
) -> None:
    """Removes what an attacker did to the clouds in files and folders.

    Reads .ply .off .obj .stl .xyz .txt .csv .pts .npy .npz .h5; the surface of a mesh is sampled. A result
    has the format of its source (.ply for an .stl) and lies in its source's frame. With one file IN, OUT may
    name the result; else it is a folder. A file that cannot be done is reported, the others are done, and the
    exit code is 1.
    """
    from tqdm import tqdm

    jobs = plan(sources, output)
    if report is not None and report.exists() and not force:
        raise click.ClickException(f"{report} exists already; --force replaces it")
    with tqdm(total=len(jobs), unit="file", disable=None) as bar:
        run = Run(load(method, device, batch_size), num_points, seed, mesh, force, bar)
        for group in grouped(run.read(jobs), batch_size):
            run.purify(group)
    if report is not None and run.reported:
        write_report(report, run, {"method": method, "seed": str(seed), "device": device}, force)
    click.echo(f"{len(jobs) - run.failed} of {len(jobs)} files done")
    if run.failed:
        raise SystemExit(1)


def load(method: str, device: str, batch_size: int) -> Purifier:
    """The purifier of that name.

    Raises:
        click.ClickException: if its weights or the device are missing.
    """
    from ifdefense.purifiers.base import Purifier

    try:
        purifier = Purifier.from_pretrained(method).to(device)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise click.ClickException(str(error)) from None
    return purifier


def plan(sources: Sequence[Path], output: Path) -> list[Job]:
    """Finds the files and where their results go; a folder keeps its tree.

    Raises:
        click.ClickException: if a folder has no cloud, OUT cannot be the folder of several results, or two
            sources would have the same result.
    """
    from ifdefense.data.formats import CLOUD_SUFFIXES

    found: list[tuple[Path, Path]] = []
    for source in sources:
        if source.is_dir():
            known = (path for path in source.rglob("*") if path.suffix.lower() in CLOUD_SUFFIXES)
            # The results of an earlier run may lie inside.
            inside = sorted(path for path in known if not path.is_relative_to(output))
            if not inside:
                raise click.ClickException(f"{source}: no file in this folder is a cloud")
            found += [(path, path.relative_to(source)) for path in inside]
        else:
            found.append((source, Path(source.name)))
    one_file = len(sources) == 1 and not sources[0].is_dir()
    if one_file and output.suffix.lower() in CLOUD_SUFFIXES and not output.is_dir():
        return [Job(sources[0], output)]
    if output.is_file():
        raise click.ClickException(f"{output} is a file: several results need a folder")
    jobs = [Job(path, output / result_name(relative)) for path, relative in found]
    owner: dict[Path, Path] = {}
    for job in jobs:
        if owner.setdefault(job.target, job.source) != job.source:
            both = f"{owner[job.target]} and {job.source}"
            raise click.ClickException(f"{both} would both be written to {job.target}")
    return jobs


def result_name(path: Path) -> Path:
    """The result of a file has its name and format; a cloud cannot be an .stl."""
    return path.with_suffix(".ply") if path.suffix.lower() == ".stl" else path


def grouped(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """Collects files until together they have a batch of clouds."""
    group: list[Job] = []
    for job in jobs:
        group.append(job)
        if sum(len(member.clouds) for member in group) >= size:
            yield group
            group = []
    if group:
        yield group


def write_report(path: Path, run: Run, facts: dict[str, str], force: bool) -> None:
    """Writes the HTML page of the first clouds that were done."""
    from ifdefense.data.formats import replacing
    from ifdefense.report import Case, render_html

    page = render_html(
        [Case(name, trace) for name, trace in run.reported],
        title="What the purification did",
        facts={**facts, "ifdefense": metadata.version("ifdefense")},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, force=force) as partial:
        partial.write_text(page, encoding="utf-8")
