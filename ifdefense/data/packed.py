"""The packed npz files of this project's own data: ModelNet40's clouds and labelled triangle soups."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np

from ifdefense.data.catalogue import hint
from ifdefense.data.cloudset import CloudSet, MeshSet
from ifdefense.data.errors import DataError
from ifdefense.data.formats.arrays import CLOUD_STEP, Arrays, read_npz, unpack_points
from ifdefense.data.formats.files import write_bytes
from ifdefense.geometry.mesh import Mesh

ROOT_VARIABLE = "IFDEFENSE_DATA"


def data_folder(root: str | Path | None, name: str) -> Path:
    """Folder of a data set: ``root/name`` if it exists, else ``root``.

    Args:
        root: folder of the data set or its parent; by default the variable ``IFDEFENSE_DATA``.
        name: usual name of the data set's folder.

    Raises:
        DataError: if no root is given or it does not exist.
    """
    root = root or os.environ.get(ROOT_VARIABLE)
    if not root:
        raise DataError(
            f"no folder of {name} is given: pass root, or set the variable {ROOT_VARIABLE}{hint(name)}"
        )
    folder = Path(root)
    if not folder.exists():
        raise DataError(f"{folder}: there is no such folder{hint(name)}")
    return folder / name if (folder / name).is_dir() else folder


def load_packed_clouds(paths: list[Path]) -> CloudSet:
    """Reads and joins packed clouds; ``classes.txt`` is in the folder of the first file.

    Args:
        paths: npz files with ``points`` int16 ``(S, N, 3)`` in steps of `CLOUD_STEP`, ``label`` and ``name``.

    Raises:
        DataError: if a file is unusable.
    """
    parts = [read_npz(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        require(part, ("points", "label", "name"), path)
        if part["points"].dtype != np.int16:
            raise DataError(f"{path}: points must be int16, got {part['points'].dtype}")
    return CloudSet(
        points=unpack_points(np.concatenate([part["points"] for part in parts])),
        labels=np.concatenate([part["label"] for part in parts]).astype(np.int64),
        names=np.concatenate([part["name"] for part in parts]).astype(np.str_),
        classes=read_classes(paths[0].with_name("classes.txt")),
    )


def save_packed_clouds(clouds: CloudSet, path: Path) -> None:
    """Writes packed clouds, with ``classes.txt`` beside them.

    Args:
        clouds: clouds in the unit sphere.
        path: ``.npz`` file in an existing folder.

    Raises:
        DataError: if the file exists or cannot be written.
    """
    steps = np.round(clouds.points / CLOUD_STEP).astype(np.int16)
    labels = clouds.labels.astype(np.uint8 if len(clouds.classes) <= 256 else np.int64)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, points=steps, label=labels, name=clouds.names)
    write_bytes(path, buffer.getvalue())
    path.with_name("classes.txt").write_text("\n".join(clouds.classes) + "\n", encoding="utf-8")


def load_packed_meshes(root: str | Path | None = None, name: str = "meshes") -> MeshSet:
    """Reads the packed triangle soups of a folder, ``meshes_*.npz`` by default.

    Each npz holds ``vertices`` uint16 ``(V, 3)`` with ``x = vertices / 65535 - 0.5`` (unit cube frame,
    longest side 1), ``faces`` ``(F, 3)``, ``vertex_offset`` and ``face_offset`` ``(S + 1,)`` of the shapes,
    with vertices counted per shape, ``label`` and ``name``.

    Args:
        root: folder of the files or its parent with ``name/``; by default ``IFDEFENSE_DATA``.
        name: name of the folder and prefix of the files.

    Raises:
        DataError: if there are no such files or one is unusable.
    """
    folder = data_folder(root, name)
    paths = sorted(folder.glob(f"{name}_*.npz"))
    if not paths:
        raise DataError(f"{folder}: there are no {name}_*.npz in it")
    parts = [read_npz(path) for path in paths]
    return MeshSet(
        meshes=tuple(mesh for path, part in zip(paths, parts, strict=True) for mesh in _cut(part, path)),
        labels=np.concatenate([part["label"] for part in parts]).astype(np.int64),
        names=np.concatenate([part["name"] for part in parts]).astype(np.str_),
        classes=read_classes(folder / "classes.txt"),
    )


def _cut(part: Arrays, path: Path) -> list[Mesh]:
    """The meshes of one packed file."""
    require(part, ("vertices", "faces", "vertex_offset", "face_offset", "label", "name"), path)
    vertices = part["vertices"].astype(np.float32) / np.float32(65535) - np.float32(0.5)
    starts, ends = part["vertex_offset"][:-1], part["vertex_offset"][1:]
    first, last = part["face_offset"][:-1], part["face_offset"][1:]
    if len(starts) != len(part["label"]) or ends[-1] != len(vertices) or last[-1] != len(part["faces"]):
        raise DataError(f"{path}: the offsets do not fit the vertices, faces and labels")
    try:
        return [
            Mesh(vertices[a:b], part["faces"][c:d].astype(np.int64))
            for a, b, c, d in zip(starts, ends, first, last, strict=True)
        ]
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def require(arrays: Arrays, keys: tuple[str, ...], path: str | Path) -> None:
    """Checks that keys exist; the error lists the existing ones."""
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise DataError(
            f"{path}: {', '.join(missing)} missing; it holds {', '.join(sorted(arrays)) or 'nothing'}"
        )


def read_classes(path: Path) -> tuple[str, ...]:
    """Reads names of classes, one per line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return tuple(line.strip() for line in lines if line.strip())
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file, so the classes have no names") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text file: {error}") from error
