"""Downloads data sets, and samples their meshes."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ifdefense.data.catalogue import CATALOGUE
from ifdefense.data.errors import DataError, optional
from ifdefense.data.layouts import load_part
from ifdefense.data.packed import save_packed_clouds
from ifdefense.data.parts import Part
from ifdefense.geometry.frame import to_unit_sphere

TIMEOUT = 60.0
"""Seconds without an answer after which a download fails."""


def fetch(name: str, root: str | Path, num_points: int = 1024) -> Path:
    """Downloads a data set with PyTorch Geometric, and samples its meshes by area.

    The clouds are mean-centred, scaled to the unit sphere and written in the packed layout to ``root/name``.
    Meanwhile, the meshes are in a temporary folder of ``root``.

    Args:
        name: name of a data set of `ifdefense.data.catalogue.CATALOGUE` that may be downloaded.
        root: folder of data sets, created if necessary.
        num_points: points per cloud.

    Returns:
        The folder of the data set.

    Raises:
        DataError: if the data set is unknown, exists already, may not be downloaded, or the download fails.
        ImportError: if PyTorch Geometric is not installed.
    """
    entry = CATALOGUE.get(name)
    folder = Path(root) / name
    if entry is None:
        raise DataError(f"there is no data set {name!r}; there are {', '.join(CATALOGUE)}")
    if entry.fetched is None:
        raise DataError(
            f"{name} cannot be fetched: {entry.instructions.replace('FOLDER', str(folder))} ({entry.source})"
        )
    if folder.exists():
        raise DataError(f"{folder} exists already: remove it to fetch {name} again")
    datasets = optional("torch_geometric.datasets", "torch-geometric")

    class Meshes(datasets.ModelNet):  # type: ignore[name-defined, misc]
        """The downloaded meshes, without their conversion to tensors, which takes many times their memory."""

        def process(self) -> None:
            pass

        def load(self, *_: Any, **__: Any) -> None:
            pass

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as place, _impatient():
            raw = Path(Meshes(place, name=entry.fetched).raw_dir)
            made = Path(place) / name
            made.mkdir()
            parts: dict[Part, str] = {"train": "train_0.npz", "test": "test.npz"}
            for part, file in parts.items():
                clouds = load_part(raw, part, num_points, up="z")
                points = to_unit_sphere(torch.from_numpy(clouds.points)).numpy()
                save_packed_clouds(dataclasses.replace(clouds, points=points), made / file)
            made.rename(folder)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{name} could not be fetched from {entry.source}: {error}") from error
    return folder


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """Context with a time limit for sockets, which PyTorch Geometric does not set."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
