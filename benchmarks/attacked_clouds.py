"""Files of attacked clouds: to compare defences without running an attack.

A file is an ``.npz`` with ``points`` ``(S, M, 3)`` float32 in the frame of the attack (unit sphere of the
clean cloud, z up), ``label`` and ``target`` ``(S,)`` int64, ``success`` ``(S,)`` bool, and ``about``, a JSON
text with the names of the classes, the attack and its settings, the victim, the data, versions and a digest
of the arrays.
"""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from attacks import attack_in_batches, random_targets
from benchmarks import result_files
from benchmarks.clouds import PROCEDURAL, LabelledClouds, load_clouds
from benchmarks.foreign import Victim, victim_of
from benchmarks.suite import SUITE
from ifdefense.console import device_option, meant
from ifdefense.data.errors import DataError
from ifdefense.data.formats.arrays import Arrays, read_npz
from ifdefense.data.formats.files import write_bytes
from ifdefense.data.layouts import load_part
from ifdefense.data.packed import require
from ifdefense.provenance import digest, versions

FORMAT = 1
"""Version of the files."""

BATCH = 25


@dataclasses.dataclass(frozen=True, eq=False)
class AttackedFile:
    """Attacked clouds and their origin.

    Attributes:
        clouds: the attacked clouds, with the labels and targets of the clean ones; named after the file. They
            must not be normalised again.
        success: ``(S,)`` whether the attack succeeded on its victim; ``None`` if the file does not say.
        about: origin of the clouds; empty for files of IF-Defense and of your own.
    """

    clouds: LabelledClouds
    success: Tensor | None
    about: dict[str, Any]


def make_attacked(
    victim: Victim,
    attack: str,
    data: str | Path = PROCEDURAL,
    *,
    clouds: int | None = None,
    seed: int = 0,
    store: str | Path | None = None,
    progress: bool = False,
    device: torch.device | None = None,
) -> AttackedFile:
    """Attacks the clouds of a data set.

    Args:
        victim: the classifier.
        attack: name of an attack of `benchmarks.suite.SUITE`.
        data: as for `load_clouds`, like ``clouds`` and ``seed``.
        clouds: ...
        seed: ...
        store: folder of finished batches, from which an interrupted call resumes.
        progress: whether to show a progress bar.
        device: device to compute on.

    Raises:
        DataError, ValueError: if the data set or the attack is unknown, or the victim does not fit the data.
    """
    if attack not in SUITE:
        raise ValueError(f"unknown attack {attack!r}{meant(attack, SUITE)}; there are {', '.join(SUITE)}")
    entry, clean = SUITE[attack], load_clouds(data, clouds=clouds, seed=seed)
    victim.check(clean)
    result = attack_in_batches(
        entry.attack(),
        victim.model,
        clean.points.to(device),
        clean.labels.to(device),
        clean.targets.to(device) if entry.targeted else None,
        batch_size=BATCH,
        folder=None if store is None else Path(store) / "attacked-files",
        seed=seed,
        progress=progress,
    )
    about = {
        "attack": attack,
        "settings": entry.settings(),
        "targeted": entry.targeted,
        "success": round(100 * float(result.success.float().mean()), 2),
        "victim": {"title": victim.title, "weights": victim.weights},
        "data": {"name": clean.name, "clouds": len(clean), "seed": seed, "digest": clean.digest()},
        "versions": versions(),
        "date": result_files.today(),
    }
    attacked = dataclasses.replace(clean, points=result.points.cpu())
    return AttackedFile(attacked, result.success.cpu(), about)


def write_attacked(path: str | Path, made: AttackedFile, *, force: bool = False) -> None:
    """Writes a file of attacked clouds atomically.

    Raises:
        DataError: if the file exists and ``force`` is not given, or cannot be written.
    """
    arrays = {
        "points": made.clouds.points.numpy().astype(np.float32),
        "label": made.clouds.labels.numpy(),
        "target": made.clouds.targets.numpy(),
    }
    if made.success is not None:
        arrays["success"] = made.success.numpy()
    about = made.about | {
        "format": FORMAT,
        "classes": list(made.clouds.classes),
        "digest": digest(dict(sorted(arrays.items()))),
    }
    data = io.BytesIO()
    np.savez_compressed(data, about=np.array(json.dumps(about)), **arrays)  # type: ignore[arg-type]
    write_bytes(path, data.getvalue(), force=force)


def read_attacked(path: str | Path) -> AttackedFile:
    """Reads a file of attacked clouds by `write_attacked`, by IF-Defense, or of your own.

    Files of IF-Defense have ``test_pc``, ``test_label`` and, for targeted attacks, ``target_label``; they are
    y up, so clouds are rotated to z up, and all points are read. A file of your own has ``points`` and
    ``label``, see `ifdefense.data.labelled_arrays`; it may have ``success``, too.

    Raises:
        DataError: if the file is missing, damaged, or none of these.
    """
    path = Path(path)
    arrays = read_npz(path)
    if "about" not in arrays:
        return _read_undescribed(path, arrays)
    require(arrays, ("points", "label", "target"), path)
    try:
        about = json.loads(str(arrays.pop("about")))
        stated, classes = about["digest"], tuple(about["classes"])
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: its description is damaged: {error!r}") from error
    if about.get("format") != FORMAT:
        raise DataError(f"{path}: its format is {about.get('format')!r}, this version reads {FORMAT}")
    if digest(dict(sorted(arrays.items()))) != stated:
        raise DataError(f"{path}: its arrays differ from those that were written")
    points, labels, targets = (torch.tensor(arrays[name]) for name in ("points", "label", "target"))
    success = torch.tensor(arrays["success"]) if "success" in arrays else None
    return AttackedFile(LabelledClouds(path.name, points, labels, targets, classes), success, about)


def _read_undescribed(path: Path, arrays: Arrays) -> AttackedFile:
    """A file of IF-Defense or of your own."""
    size = arrays["test_pc"].shape[1] if "test_pc" in arrays and arrays["test_pc"].ndim == 3 else None
    whole = load_part(path, "test", size)
    labels = torch.tensor(whole.labels)
    if whole.targets is None:
        targets = random_targets(labels, len(whole.classes))
    else:
        targets = torch.tensor(whole.targets)
    success = None
    if "success" in arrays:
        success = torch.tensor(arrays["success"]).reshape(-1).bool()
        if len(success) != len(labels):
            raise DataError(f"{path}: success must be ({len(labels)},), one a cloud, got {len(success)}")
    clouds = LabelledClouds(path.name, torch.tensor(whole.points), labels, targets, whole.classes)
    return AttackedFile(clouds, success, {})


@click.command()
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="npz to write.")
@click.option(
    "--victim",
    "name",
    metavar="NAME",
    default="pointnet-procedural",
    show_default=True,
    help="Shipped classifier, module:NAME, file.py:NAME or NETWORK:FILE[@AXIS].",
)
@click.option("--attack", metavar="NAME", default="pgd-linf", show_default=True, help="Attack of the suites.")
@click.option(
    "--data", metavar="NAME", default=PROCEDURAL, show_default=True, help="Data set, folder or file."
)
@click.option("--clouds", type=click.IntRange(min=1), help="Most clouds; all by default.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    default=Path("cache/bench"),
    show_default=True,
    help="Folder of finished batches.",
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@device_option
def attacked(
    out: Path, name: str, attack: str, data: str, force: bool, device: torch.device, **options: Any
) -> None:
    """Writes a file of attacked clouds, on which others can score their defences.

    Exit codes: 0 if the file was written, 1 if that failed, 2 for an invalid call.
    """
    if out.suffix != ".npz":
        raise click.UsageError(f"{out}: attacked clouds are written as .npz")
    if out.exists() and not force:
        raise click.UsageError(f"{out} exists already; --force replaces it")
    try:
        victim = victim_of(name, device=device)
        made = make_attacked(victim, attack, data, device=device, progress=True, **options)
    except (ValueError, ImportError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from None
    write_attacked(out, made, force=force)
    about = made.about
    click.echo(f"{len(made.clouds)} clouds in {out}: {about['settings']}")
    click.echo(f"it succeeds on {about['success']:.1f}% with {victim.title}")
