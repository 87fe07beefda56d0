"""The command line: ``ifdefense purify``, ``train``, ``data`` and ``info``."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

import ifdefense
from ifdefense.console import LazyGroup, device_option, let_threads_sleep, meant, use_huge_pages
from ifdefense.geometry.axes import AXES
from ifdefense.purifiers.registry import DEFAULT, METHODS, unknown

if TYPE_CHECKING:
    import torch

    from ifdefense.batch import Tally, Work
    from ifdefense.batch_plan import Job
    from ifdefense.purifiers.base import Purifier

REPORTED = 12
"""Default number of clouds in a report; each takes about half a megabyte."""


class Refused(click.ClickException):
    """Raised for a call that is rejected before any work; exit code 2, as for invalid options."""

    exit_code = 2


class MethodName(click.ParamType):  # type: ignore[type-arg]
    """Parameter type: name of a method, or a file of weights."""

    name = "method"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """The names."""
        return f"[{'|'.join(METHODS)}|FILE]"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Checks that the method or file exists."""
        if value not in METHODS and not os.path.isfile(value):
            self.fail(unknown(value), param, ctx)
        return value

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Completes the names of methods."""
        return [
            CompletionItem(name, help=method.summary)
            for name, method in METHODS.items()
            if name.startswith(incomplete)
        ]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ifdefense", prog_name="ifdefense")
def main() -> None:
    """Defends point-cloud classifiers: reconstructs the surface of an attacked cloud and resamples it."""
    let_threads_sleep()
    use_huge_pages()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)


@main.group(
    cls=LazyGroup,
    lazy={
        "anomaly": (
            "ifdefense.training.recipes.anomaly:train_command",
            "The anomaly network of the mesh repair.",
        ),
        "autoencoder": (
            "ifdefense.training.recipes.autoencoder:train_command",
            "The auto-encoder of sor-ae, AdvPC.",
        ),
        "convonet": (
            "ifdefense.training.recipes.convonet:train_command",
            "The Convolutional Occupancy Network.",
        ),
        "generative": (
            "ifdefense.reconstruction.recipes:generative_command",
            "The generative Occupancy Network.",
        ),
        "image": (
            "ifdefense.reconstruction.recipes:image_command",
            "The Occupancy Network conditioned on images.",
        ),
        "local": ("ifdefense.training.recipes.local:train_command", "The local occupancy network."),
        "onet": ("ifdefense.training.recipes.onet:train_command", "The Occupancy Network."),
        "punet": ("ifdefense.training.recipes.punet:train_command", "PU-Net, which upsamples point clouds."),
        "voxel": (
            "ifdefense.reconstruction.recipes:voxel_command",
            "The Occupancy Network conditioned on voxels.",
        ),
    },
)
def train() -> None:
    """Trains an implicit network, or a network that maps clouds to clouds."""


@main.command()
@click.argument("name", required=False)
def info(name: str | None) -> None:
    """Prints versions, devices, methods and shipped weights, or the model card of the weights NAME."""
    import torch

    folder = resources.files("ifdefense") / "weights"
    weights = sorted(
        entry.name.removesuffix(".safetensors")
        for entry in folder.iterdir()
        if entry.name.endswith(".safetensors")
    )
    if name is not None:
        if name not in weights:
            raise Refused(f"unknown weights {name!r}{meant(name, weights)}; there are {', '.join(weights)}")
        click.echo((folder / f"{name}.md").read_text(encoding="utf-8").rstrip())
        return

    for package in ("ifdefense", "torch", "numpy", "scipy", "scikit-image", "trimesh"):
        click.echo(f"{package:<14} {metadata.version(package)}")
    click.echo(f"{'python':<14} {platform.python_version()}")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    click.echo(f"{'device':<14} {', '.join(names) or f'cpu, {torch.get_num_threads()} threads'}")
    for index, (title, method) in enumerate(METHODS.items()):
        gradients = ", differentiable" if method.differentiable else ""
        click.echo(f"{'' if index else 'methods':<14} {title:<13} {method.summary}{gradients}")
    for title in weights:
        size = len((folder / f"{title}.safetensors").read_bytes()) / 1e6
        about = (folder / f"{title}.md").read_text(encoding="utf-8").split("\n\n")[1]
        what = about.replace("\n", " ").partition(". ")[0].rstrip(".")
        click.echo(f"weights {title} ({size:.1f} MB): {what}")


@main.command(short_help="Lists, describes or fetches data sets.")
@click.argument("name", required=False)
@click.option("--root", type=click.Path(file_okay=False, path_type=Path), help="Folder to fetch it to.")
def data(name: str | None, root: Path | None) -> None:
    """Lists data sets, describes the data set NAME, or with --root fetches it.

    Fetched are modelnet40 and modelnet10, through PyTorch Geometric: their meshes are downloaded and sampled,
    1,024 points each, to the folder NAME in --root.
    """
    from ifdefense.data.catalogue import CATALOGUE

    if name is not None and name not in CATALOGUE:
        raise Refused(f"unknown data set {name!r}{meant(name, CATALOGUE)}; there are {', '.join(CATALOGUE)}")
    if name is None and root is not None:
        raise Refused("--root needs the name of a data set")
    if name is None or root is None:
        for each in CATALOGUE if name is None else [name]:
            entry = CATALOGUE[each]
            folder = f"DIR/{each}"
            get = entry.instructions.replace("FOLDER", folder) or f"ifdefense data {each} --root DIR"
            click.echo(f"{each}: {entry.title}")
            for title in ("source", "licence", "size", "layout"):
                click.echo(f"  {title:<8} {getattr(entry, title)}")
            click.echo(f"  {'get it':<8} {get}")
        click.echo("Set IFDEFENSE_DATA to DIR, or pass a data set's folder where one is asked for.")
        return
    from ifdefense.data.fetching import fetch

    try:
        click.echo(f"{name} is in {fetch(name, root)}; set IFDEFENSE_DATA to {root}")
    except (ValueError, OSError, ImportError) as error:
        raise click.ClickException(str(error)) from None


@main.command(short_help="Purifies point clouds in files and folders.")
@click.argument("sources", metavar="IN...", nargs=-1, required=True)
@click.option("-o", "--output", metavar="OUT", required=True, help="File, folder for several, or - (stdout).")
@click.option(
    "--method", type=MethodName(), default=DEFAULT, show_default=True, help="Name, or a file of weights."
)
@click.option(
    "--num-points", type=click.IntRange(min=1), help="Points per result; by default as in the input."
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Random seed.")
@device_option
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Clouds processed together.",
)
@click.option(
    "--up",
    type=click.Choice(AXES),
    help="Up axis of the clouds, for methods that depend on their orientation; z by default.",
)
@click.option("--mesh", is_flag=True, help="Also write the repaired surface, as NAME.mesh.ply.")
@click.option("--report", type=click.Path(path_type=Path), help="Write an HTML report.")
@click.option(
    "--report-clouds",
    type=click.IntRange(min=1),
    default=REPORTED,
    show_default=True,
    help="Maximum number of clouds in the report; each takes about half a megabyte.",
)
@click.option("--format", "form", metavar="NAME", help="Format of - (ply, xyz, npy, ...).")
@click.option(
    "--columns", metavar="X,Y,Z", help="Names or numbers (from 0) of the columns with the coordinates."
)
@click.option("--key", help="Name of the array of points in .npz and .h5 files.")
@click.option(
    "--max-points", type=click.IntRange(min=1), help="Reject files with more points.  [default: 20000000]"
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes, which share the threads of this one.",
)
@click.option("--ray", metavar="ADDRESS", help="Run on a cluster of Ray; local starts one on this machine.")
@click.option("--skip-existing", is_flag=True, help="Skip files whose results exist.")
@click.option("--force", is_flag=True, help="Replace existing files, but never an input.")
def purify(
    sources: tuple[str, ...],
    output: str,
    method: str,
    num_points: int | None,
    seed: int,
    device: torch.device,
    batch_size: int,
    up: str | None,
    mesh: bool,
    report: Path | None,
    report_clouds: int,
    form: str | None,
    columns: str | None,
    key: str | None,
    max_points: int | None,
    workers: int,
    ray: str | None,
    skip_existing: bool,
    force: bool,
) -> None:
    """Purifies the point clouds in files and folders; - is standard input.

    Reads .ply .off .obj .stl .glb .pcd .xyz .txt .csv .pts .npy .npz .h5; the surface of a mesh is sampled.
    Results have the format (.ply for .stl) and the frame of their sources; their points take the attributes
    (normals, colours, labels) of the nearest input points. For a single file IN, OUT may be a file; otherwise
    it is a folder. Folders are read without hidden files and *.mesh.ply.

    Failing files are reported and skipped; a full disk ends the run. Results do not depend on the number of
    workers. Exit codes: 0 all files were purified or skipped, 1 at least one failed, 2 the call was rejected
    and nothing was done.
    """
    from ifdefense.batch import Settings, Tally, Work, claims, write_report
    from ifdefense.batch_plan import STREAM, Refusal, plan
    from ifdefense.data.formats import MAX_POINTS

    try:
        settings = Settings(
            num_points=num_points,
            seed=seed,
            batch_size=batch_size,
            mesh=mesh,
            force=force,
            skip_existing=skip_existing,
            columns=columns,
            key=key,
            max_points=max_points or MAX_POINTS,
            up=up,
        )
        todo = plan(sources, output, form=form, report=report, force=force)
    except Refusal as error:
        raise Refused(str(error)) from None
    if mesh and output == STREAM:
        raise Refused("--mesh needs output files: standard output holds only the result")
    if mesh and method in METHODS and not METHODS[method].network:
        raise Refused(f"the method {method} has no surface, so there is nothing for --mesh to write")
    if ray is not None and workers > 1:
        raise Refused("--workers are processes of this machine; a cluster of Ray has its own")
    if ray is not None and any(str(path) == STREAM for job in todo.jobs for path in (job.source, job.target)):
        raise Refused("--ray needs files: its workers have other standard inputs and outputs")
    work = Work(load(method, device), settings, claims(todo.jobs, report) if mesh else {})
    with progress(len(todo.jobs)) as (tell, advance):
        for folder, reason in todo.unreadable:
            tell(f"error: {folder}: the folder cannot be read: {reason.strerror}")
        tally = Tally(report_clouds if report is not None else 0, tell, advance)
        purify_all(work, todo.jobs, tally, workers, ray)
    skipped = f", {tally.skipped} skipped" if tally.skipped else ""
    summary = f"{tally.written} of {len(todo.jobs)} files done{skipped}"
    if tally.full:
        again = "the same command" if force or skip_existing else "the same command with --skip-existing"
        purpose = "starts again" if force else "does the rest"
        raise click.ClickException(f"{tally.full}; {summary}. With more space, {again} {purpose}")
    failed = bool(tally.failed or todo.unreadable)
    if report is not None:
        facts = {
            "method": method,
            "seed": str(seed),
            "device": str(device),
            "ifdefense": ifdefense.__version__,
        }
        try:
            if tally.reported:
                write_report(report, tally, facts, force)
                if tally.done > len(tally.reported):
                    click.echo(
                        f"the report shows the first {len(tally.reported)} of {tally.done} clouds; "
                        "--report-clouds shows more",
                        err=True,
                    )
            else:
                click.echo("no cloud was purified, so no report was written", err=True)
        except (OSError, ValueError) as error:
            click.echo(f"error: {report}: the report could not be written: {error}", err=True)
            failed = True
    click.echo(summary, err=output == STREAM)
    if failed:
        raise SystemExit(1)


def purify_all(work: Work, jobs: Sequence[Job], tally: Tally, workers: int, ray: str | None) -> None:
    """Purifies files in this process, in several, or on a cluster.

    Raises:
        Refused: if the cluster cannot be reached.
    """
    import torch

    from ifdefense.batch import FileResult, Shard, purify_here, purify_in_pool, purify_shard
    from ifdefense.pool import Processes

    if ray is not None:
        from ifdefense.distributed import RayTasks

        work = dataclasses.replace(work, threads=1, folder=Path.cwd())
        gpus = int(any(weight.is_cuda for weight in work.purifier.parameters()))
        try:
            cluster = RayTasks[Shard, list[FileResult]](purify_shard, work, ray, tally.tell, gpus)
        except (ImportError, ConnectionError) as error:
            raise Refused(str(error)) from None
        purify_in_pool(work.settings, jobs, tally, cluster)
    elif (workers := min(workers, len(jobs))) > 1:
        work = dataclasses.replace(work, threads=max(1, torch.get_num_threads() // workers))
        purify_in_pool(work.settings, jobs, tally, Processes(purify_shard, work, workers))
    else:
        purify_here(work, jobs, tally)


@contextlib.contextmanager
def progress(total: int) -> Iterator[tuple[Callable[[str], object], Callable[[int], object]]]:
    """Shows a progress bar; yields functions that print a line and add a file with its number of clouds."""
    from tqdm import tqdm

    form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} files [{elapsed}<{remaining}{postfix}]"
    clouds = 0
    with tqdm(total=total, bar_format=form, disable=None) as bar:

        def tell(line: str) -> None:
            bar.write(line, file=sys.stderr)

        def advance(count: int) -> None:
            nonlocal clouds
            clouds += count
            if not bar.disable:
                speed = clouds / max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix_str(f"{speed:.3g} clouds/s", refresh=False)
            bar.update()

        yield tell, advance


def load(method: str, device: torch.device) -> Purifier:
    """Loads a purifier by name.

    Raises:
        Refused: if its weights are missing.
    """
    try:
        return ifdefense.load(method, device=device)
    except (ValueError, RuntimeError) as error:
        raise Refused(str(error)) from None
