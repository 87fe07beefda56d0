"""Reads and writes single files of clouds and meshes.

Clouds: .ply .off .obj .xyz .txt .npy .npz .h5; meshes: .ply .off .obj .stl. Points are read as float32, or as
float64 where float32 cannot tell them apart, as in scans far from their origin.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ifdefense.data.packed import Arrays, DataError, load_npz, load_packed_meshes, unpack_points
from ifdefense.geometry.mesh import Mesh

__all__ = [
    "BATCH_SUFFIXES",
    "CLOUD_SUFFIXES",
    "MESH_SUFFIXES",
    "DataError",
    "load_packed_meshes",
    "read_cloud",
    "read_clouds",
    "read_mesh",
    "replacing",
    "write_cloud",
    "write_clouds",
    "write_mesh",
]

TEXT_SUFFIXES = (".xyz", ".txt", ".csv", ".pts")
BATCH_SUFFIXES = (".npy", ".npz", ".h5", ".hdf5")
"""Files that may hold several clouds."""
MESH_SUFFIXES = (".ply", ".off", ".obj", ".stl")
CLOUD_SUFFIXES = (*MESH_SUFFIXES, *TEXT_SUFFIXES, *BATCH_SUFFIXES)
"""Files that a cloud can be read from; a mesh is sampled."""

CLOUD_KEYS = ("points", "test_pc", "train_pc", "data", "pc")
"""Names of an array of clouds: this project's, IF-Defense's, and what other npz and h5 files use."""

Points = NDArray[np.floating]


def read_cloud(path: str | Path, mesh_points: int = 1024, seed: int = 0) -> Points:
    """Reads a file of one cloud.

    Args:
        path: the file; its suffix, one of `CLOUD_SUFFIXES`, says what it is.
        mesh_points: points drawn uniformly from the surface where the file holds a mesh.
        seed: seed of that draw.

    Returns:
        ``(N, 3)`` points, float32 unless they need float64. Columns beyond the third, such as normals, are
        left out.

    Raises:
        DataError: if the file is missing, truncated or of an unknown kind, holds no or several clouds, or a
            coordinate is not finite.
        ImportError: if the package that reads this kind of file is not installed.
    """
    clouds = read_clouds(path, mesh_points, seed)
    if len(clouds) != 1:
        raise DataError(f"{path}: it holds {len(clouds)} clouds, not one; read_clouds reads them all")
    return clouds[0]


def read_clouds(path: str | Path, mesh_points: int = 1024, seed: int = 0) -> list[Points]:
    """Reads every cloud of a file; arguments and errors as `read_cloud`."""
    path = _existing(path)
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        return [read_text(path)]
    if suffix in MESH_SUFFIXES:
        return [_cloud_of(path, mesh_points, seed)]
    if suffix in BATCH_SUFFIXES:
        found = find_clouds(read_arrays(path), path)
        batch = found[None] if found.ndim == 2 else found
        return [checked(cloud, path, f"cloud {number}, ") for number, cloud in enumerate(batch)]
    raise DataError(
        f"{path}: no cloud is read from {suffix or 'a file without suffix'}; {_known(CLOUD_SUFFIXES)}"
    )


def read_mesh(path: str | Path) -> Mesh:
    """Reads a triangle mesh; polygons are cut into triangles and the corners of an .stl are joined.

    Args:
        path: the file; its suffix, one of `MESH_SUFFIXES`, says what it is.

    Raises:
        DataError: if the file is missing, truncated or of an unknown kind, has no face, or a face or
            coordinate is no good.
        ImportError: if trimesh is not installed.
    """
    path = _existing(path)
    if path.suffix.lower() not in MESH_SUFFIXES:
        raise DataError(
            f"{path}: no mesh is read from {path.suffix or 'a file without suffix'}; {_known(MESH_SUFFIXES)}"
        )
    vertices, faces = _load_geometry(path)
    if not len(faces):
        raise DataError(f"{path}: it has no face, so it is no mesh")
    if path.suffix.lower() == ".stl":
        vertices, corner = np.unique(vertices, axis=0, return_inverse=True)
        faces = corner.reshape(-1)[faces]
    return _mesh(vertices, faces, path)


def write_cloud(path: str | Path, points: ArrayLike, *, force: bool = False) -> None:
    """Writes a cloud, whole or not at all.

    Args:
        path: the file; its suffix, one of `CLOUD_SUFFIXES` but .stl, says what it becomes.
        points: ``(N, 3)`` NumPy array or tensor on the CPU; its precision is kept.
        force: replace a file that is there.

    Raises:
        DataError: if the file is there already, its folder is not, or its suffix is unknown.
        ValueError: if the points are not ``(N, 3)``.
    """
    path, cloud = Path(path), _floating(points)
    if cloud.ndim != 2 or cloud.shape[1] != 3:
        raise ValueError(f"{path}: a cloud must be (N, 3), got {cloud.shape}")
    write = _WRITERS.get(path.suffix.lower())
    if write is None:
        raise DataError(
            f"{path}: no cloud is written to {path.suffix or 'a file without suffix'}; {_known(_WRITERS)}"
        )
    with replacing(path, force=force) as temporary:
        write(temporary, cloud)


def write_clouds(
    path: str | Path, clouds: NDArray[Any] | Sequence[ArrayLike], *, force: bool = False
) -> None:
    """Writes clouds of one size to one file, whole or not at all.

    Args:
        path: the file; its suffix is one of `BATCH_SUFFIXES`.
        clouds: ``(S, N, 3)`` or a list of ``(N, 3)``.
        force: replace a file that is there.

    Raises:
        DataError: if the file is there already, its folder is not, or its suffix is unknown.
        ValueError: if the clouds differ in size.
    """
    path, parts = Path(path), [_floating(cloud) for cloud in clouds]
    if path.suffix.lower() not in BATCH_SUFFIXES:
        raise DataError(f"{path}: several clouds are written to {', '.join(BATCH_SUFFIXES)}")
    shapes = {part.shape for part in parts}
    if len(shapes) != 1 or parts[0].ndim != 2 or parts[0].shape[1] != 3:
        raise ValueError(f"{path}: clouds written together must have one shape (N, 3), got {sorted(shapes)}")
    with replacing(path, force=force) as temporary:
        _WRITERS[path.suffix.lower()](temporary, np.stack(parts))


def write_mesh(path: str | Path, mesh: Mesh, *, force: bool = False) -> None:
    """Writes a mesh, whole or not at all.

    Args:
        path: the file; its suffix, one of `MESH_SUFFIXES`, says what it becomes.
        mesh: the mesh; one without faces becomes a file without faces.
        force: replace a file that is there.

    Raises:
        DataError: if the file is there already, its folder is not, or its suffix is unknown.
        ImportError: if trimesh is not installed.
    """
    path = Path(path)
    if path.suffix.lower() not in MESH_SUFFIXES:
        raise DataError(
            f"{path}: no mesh is written to {path.suffix or 'a file without suffix'}; {_known(MESH_SUFFIXES)}"
        )
    trimesh = optional("trimesh")
    with replacing(path, force=force) as temporary:
        trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).export(temporary)


@contextmanager
def replacing(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Gives a temporary file to write, which takes the place of ``path`` only when all has gone well.

    Args:
        path: the file to write.
        force: replace a file that is there.

    Raises:
        DataError: if the file is there already or its folder is not.
    """
    path = Path(path)
    if path.exists() and not force:
        raise DataError(f"{path}: it exists and is not written over unless forced")
    if not path.parent.is_dir():
        raise DataError(f"{path}: there is no folder {path.parent}")
    temporary = path.with_name(f".{path.stem}-{uuid4().hex}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_text(path: Path, max_rows: int | None = None) -> Points:
    """Reads numbers in columns, apart by blanks, commas or semicolons; x, y, z come first.

    Args:
        path: the file. Comments (``#``, ``//``), one line of column names or a count of the points may
            precede.
        max_rows: number of points to read, by default all.

    Raises:
        DataError: as `read_cloud`.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").replace(",", " ").replace(";", " ").splitlines()
        start = next((row for row, line in enumerate(lines) if _has_coordinates(line)), len(lines))
        if start == len(lines):
            raise DataError(f"{path}: there is no line with three numbers")
        points = np.loadtxt(
            lines[start:],
            usecols=(0, 1, 2),
            ndmin=2,
            max_rows=max_rows,
            comments=["#", "//"],
            dtype=np.float64,
        )
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{path}: not numbers in columns: {error}") from error
    return checked(points, path)


def _has_coordinates(line: str) -> bool:
    try:
        return len([float(word) for word in line.split()[:3]]) == 3
    except ValueError:
        return False


def read_arrays(path: Path) -> Arrays:
    """Every array of an .npy (under the name ``points``), .npz or .h5 file, without unpickling anything.

    Raises:
        DataError: if the file cannot be read.
        ImportError: if it is an .h5 file and h5py is not installed.
    """
    if path.suffix.lower() == ".npz":
        return load_npz(path)
    if path.suffix.lower() == ".npy":
        try:
            return {"points": np.load(path, allow_pickle=False)}
        except Exception as error:  # a damaged header can be anything, also Python that does not parse
            raise DataError(f"{path}: not a complete npy file without pickled objects: {error}") from error
    h5py = optional("h5py")
    try:
        with h5py.File(path) as file:
            return {key: value[()] for key, value in file.items() if isinstance(value, h5py.Dataset)}
    except Exception as error:  # h5py, too, fails in many ways on a damaged file
        raise DataError(f"{path}: not a complete h5 file: {error}") from error


def find_clouds(arrays: Arrays, path: str | Path) -> NDArray[Any]:
    """The array of clouds among those of a file, ``(N, C)`` or ``(S, N, C)`` with C at least 3.

    Raises:
        DataError: if there is none under a known name, or its shape or dtype is no cloud's.
    """
    key = next((key for key in CLOUD_KEYS if key in arrays), None)
    if key is None and len(arrays) == 1:
        (key,) = arrays
    if key is None:
        names = ", ".join(sorted(arrays)) or "nothing"
        raise DataError(f"{path}: no array of clouds ({', '.join(CLOUD_KEYS)}) in it; it holds {names}")
    found = arrays[key]
    if found.ndim not in (2, 3) or found.shape[-1] < 3 or 0 in found.shape:
        raise DataError(f"{path}: {key} must be (N, 3) or (S, N, 3) and not empty, got {found.shape}")
    if found.dtype == np.int16:
        return unpack_points(found)
    if found.dtype.kind not in "fiu":
        raise DataError(f"{path}: {key} must be real numbers, got {found.dtype}")
    return found


def checked(points: NDArray[Any], path: str | Path, which: str = "") -> Points:
    """The points ``(N, C)`` cut to x, y, z, checked, in the precision that they need.

    Args:
        points: what a file holds.
        path: the file, for the message.
        which: the cloud in it, for the message.

    Raises:
        DataError: if there is no point, or one is not finite.
    """
    if points.ndim != 2 or points.shape[1] < 3:
        raise DataError(f"{path}: {which}the points must be (N, 3), got {points.shape}")
    if not len(points):
        raise DataError(f"{path}: {which}there are no points")
    points = points[:, :3]
    finite = np.isfinite(points).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise DataError(f"{path}: {which}point {row} is not finite: {points[row]}")
    rounding = float(np.abs(points).max()) * float(np.finfo(np.float32).eps)
    needs_double = points.dtype.itemsize > 4 and rounding > 1e-4 * float(np.ptp(points, axis=0).max())
    return np.ascontiguousarray(points, dtype=np.float64 if needs_double else np.float32)


def optional(module: str, package: str | None = None) -> Any:
    """Imports a package that not every user needs.

    Raises:
        ImportError: saying what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this needs {module}, which is not installed: pip install {package or module}"
        ) from error


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: {'it is a folder' if path.is_dir() else 'there is no such file'}")
    return path


def _known(suffixes: Sequence[str] | dict[str, Any]) -> str:
    return f"known are {', '.join(suffixes)}"


def _cloud_of(path: Path, mesh_points: int, seed: int) -> Points:
    """The points of a file that holds a cloud or a mesh."""
    from ifdefense.stages.resampling import sample_surface

    vertices, faces = _load_geometry(path)
    if not len(faces):
        return checked(vertices, path)
    try:
        return sample_surface(
            _mesh(vertices, faces, path), mesh_points, generator=np.random.default_rng(seed)
        )[0]
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def _mesh(vertices: NDArray[Any], faces: NDArray[Any], path: Path) -> Mesh:
    try:
        return Mesh(vertices, faces)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def _load_geometry(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Vertices ``(V, 3)`` and triangles ``(F, 3)`` of a file; a cloud has no triangles."""
    trimesh = optional("trimesh")
    try:
        loaded = trimesh.load(path, file_type=path.suffix.lower()[1:], process=False, skip_materials=True)
    except Exception as error:  # its readers fail in many ways on a damaged file
        raise DataError(f"{path}: not a complete {path.suffix.lower()} file: {error}") from error
    vertices, faces = getattr(loaded, "vertices", None), getattr(loaded, "faces", ())
    if vertices is None or not len(vertices):
        raise DataError(f"{path}: not a complete {path.suffix.lower()} file, or there is nothing in it")
    return np.array(vertices), np.array(faces, dtype=np.int64).reshape(-1, 3)


def _floating(points: ArrayLike) -> Points:
    array = np.asarray(points)
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)


def _save_rows(path: Path, points: Points, header: str = "", before: str = "", between: str = " ") -> None:
    """One point a line, in as many digits as bring the same number back."""
    digits = "%.9g" if points.dtype == np.float32 else "%.17g"
    row = before + between.join([digits] * 3)
    path.write_text(
        header + "".join(f"{row % tuple(point)}\n" for point in points.tolist()), encoding="ascii"
    )


def _write_text(path: Path, points: Points) -> None:
    _save_rows(path, points)


def _write_csv(path: Path, points: Points) -> None:
    _save_rows(path, points, between=",")


def _write_off(path: Path, points: Points) -> None:
    _save_rows(path, points, header=f"OFF\n{len(points)} 0 0\n")


def _write_obj(path: Path, points: Points) -> None:
    _save_rows(path, points, before="v ")


def _write_ply(path: Path, points: Points) -> None:
    kind = "float" if points.dtype == np.float32 else "double"
    axes = "\n".join(f"property {kind} {axis}" for axis in "xyz")
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n{axes}\nend_header\n"
    path.write_bytes(header.encode("ascii") + points.astype(points.dtype.newbyteorder("<")).tobytes())


def _write_npy(path: Path, points: Points) -> None:
    with path.open("wb") as file:  # given a name, NumPy would add its own suffix to .NPY
        np.save(file, points, allow_pickle=False)


def _write_npz(path: Path, points: Points) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, points=points)


def _write_h5(path: Path, points: Points) -> None:
    with optional("h5py").File(path, "w") as file:
        file.create_dataset("points", data=points, compression="gzip")


_WRITERS: dict[str, Callable[[Path, Points], None]] = {
    ".ply": _write_ply,
    ".off": _write_off,
    ".obj": _write_obj,
    ".xyz": _write_text,
    ".txt": _write_text,
    ".pts": _write_text,
    ".csv": _write_csv,
    ".npy": _write_npy,
    ".npz": _write_npz,
    ".h5": _write_h5,
    ".hdf5": _write_h5,
}
