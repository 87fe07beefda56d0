"""Reads and writes files of clouds and meshes.

Clouds: .ply .off .obj .glb .pcd .xyz .txt .csv .pts .npy .npz .h5; meshes: .ply .off .obj .stl .glb.
Coordinates are read as float64 and written in the precision of the file that they came from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ifdefense.data.errors import DataError
from ifdefense.data.formats import arrays, glb, hdf5, obj, off, pcd, ply, stl, text
from ifdefense.data.formats.files import check_content, naming, read_bytes, replacing, write_bytes
from ifdefense.data.formats.table import (
    FILE,
    MAX_POINTS,
    CloudFile,
    FileLayout,
    Geometry,
    Options,
    PointTable,
    checked_points,
)
from ifdefense.geometry.mesh import Mesh

__all__ = [
    "BATCH_SUFFIXES",
    "CLOUD_SUFFIXES",
    "MAX_POINTS",
    "MESH_SUFFIXES",
    "WRITABLE_SUFFIXES",
    "CloudFile",
    "DataError",
    "FileLayout",
    "PointTable",
    "encode_cloud_file",
    "read_cloud",
    "read_cloud_file",
    "read_clouds",
    "read_mesh",
    "replacing",
    "write_cloud",
    "write_cloud_file",
    "write_clouds",
    "write_mesh",
]


@dataclasses.dataclass(frozen=True)
class Format:
    """Reader and writer of a file format."""

    decode: Callable[[bytes, Options], CloudFile | Geometry]
    encode: Callable[[CloudFile, str], bytes] | None = None
    encode_mesh: Callable[[Mesh, str], bytes] | None = None
    batch: bool = False


_TEXT = Format(text.decode, text.encode)
_H5 = Format(hdf5.decode, hdf5.encode, batch=True)
FORMATS = {
    ".ply": Format(ply.decode, ply.encode, ply.encode_mesh),
    ".off": Format(off.decode, off.encode, off.encode_mesh),
    ".obj": Format(obj.decode, obj.encode, obj.encode_mesh),
    ".stl": Format(stl.decode, None, stl.encode_mesh),
    ".glb": Format(glb.decode, glb.encode, glb.encode_mesh),
    ".pcd": Format(pcd.decode, pcd.encode),
    ".xyz": _TEXT,
    ".txt": _TEXT,
    ".csv": _TEXT,
    ".pts": _TEXT,
    ".npy": Format(arrays.decode_npy, arrays.encode_npy, batch=True),
    ".npz": Format(arrays.decode_npz, arrays.encode_npz, batch=True),
    ".h5": _H5,
    ".hdf5": _H5,
}
"""Formats by suffix."""

CLOUD_SUFFIXES = tuple(FORMATS)
"""Suffixes of readable clouds; meshes are sampled."""
WRITABLE_SUFFIXES = tuple(suffix for suffix, form in FORMATS.items() if form.encode)
"""Suffixes of writable clouds."""
MESH_SUFFIXES = tuple(suffix for suffix, form in FORMATS.items() if form.encode_mesh)
"""Suffixes of formats in which meshes are written."""
BATCH_SUFFIXES = tuple(suffix for suffix, form in FORMATS.items() if form.batch)
"""Suffixes of formats that may hold several clouds."""


def read_cloud(
    path: str | Path,
    mesh_points: int = 1024,
    seed: int = 0,
    *,
    columns: str | Sequence[str] | None = None,
    key: str | None = None,
    max_points: int = MAX_POINTS,
) -> NDArray[np.float64]:
    """Reads a file of one cloud.

    Args:
        path: file with one of `CLOUD_SUFFIXES`.
        mesh_points: points drawn uniformly from the surface where the file holds a mesh.
        seed: seed of that draw.
        columns: names or numbers (from 0) of the columns with x, y and z, such as ``"x,y,z"`` or ``"1,2,3"``,
            if they cannot be found by name.
        key: name of the array of points in an .npz or .h5 file, if it has none of the usual names.
        max_points: limit on the points; larger files are refused. A file of a few kilobytes can declare any
            size.

    Returns:
        ``(N, 3)`` float64 points. Other columns are left out; `read_cloud_file` returns them.

    Raises:
        DataError: if the file is missing, truncated, too large or of an unknown kind, holds no or several
            clouds, a coordinate is not finite, or it is not clear which columns are the coordinates.
        ImportError: if the package that reads this kind of file is not installed.

    Examples:
        >>> np.savetxt("cloud.txt", points[0])
        >>> read_cloud("cloud.txt").shape
        (64, 3)
    """
    file = read_cloud_file(path, mesh_points, seed, columns=columns, key=key, max_points=max_points)
    if len(file.clouds) != 1:
        raise DataError(f"{path}: it holds {len(file.clouds)} clouds, not one; read_clouds reads them all")
    return file.clouds[0].points


def read_clouds(
    path: str | Path,
    mesh_points: int = 1024,
    seed: int = 0,
    *,
    columns: str | Sequence[str] | None = None,
    key: str | None = None,
    max_points: int = MAX_POINTS,
) -> list[NDArray[np.float64]]:
    """Reads every cloud of a file; arguments and errors as `read_cloud`.

    Examples:
        >>> np.save("clouds.npy", points)
        >>> [cloud.shape for cloud in read_clouds("clouds.npy")]
        [(64, 3), (64, 3)]
    """
    file = read_cloud_file(path, mesh_points, seed, columns=columns, key=key, max_points=max_points)
    return [cloud.points for cloud in file.clouds]


def read_cloud_file(
    path: str | Path | BinaryIO,
    mesh_points: int = 1024,
    seed: int = 0,
    *,
    suffix: str | None = None,
    columns: str | Sequence[str] | None = None,
    key: str | None = None,
    max_points: int = MAX_POINTS,
) -> CloudFile:
    """Reads all clouds of a file with their attributes and all other contents.

    ``write_cloud_file(path, file.moved(results))`` writes results with their attributes in the same layout.

    Args:
        path: path or open file such as ``sys.stdin.buffer``; the latter needs ``suffix``.
        mesh_points: points drawn from the surface where the file holds a mesh.
        seed: seed of that draw.
        suffix: format, one of `CLOUD_SUFFIXES`; by default the suffix of the name.
        columns: names or numbers of the columns with x, y and z, as for `read_cloud`.
        key: name of the array of points, as for `read_cloud`.
        max_points: larger files are refused.

    Raises:
        DataError: as `read_cloud`, though several clouds are no error.
        ImportError: if the package that reads this kind of file is not installed.

    Examples:
        >>> np.save("cloud.npy", points[0])
        >>> read_cloud_file("cloud.npy").clouds[0].points.shape
        (64, 3)
    """
    wanted = None if columns is None else tuple(columns.split(",") if isinstance(columns, str) else columns)
    options = Options(columns=wanted, key=key, max_points=max_points)
    name, form, data = _opened(path, suffix, options, CLOUD_SUFFIXES, "cloud")
    with naming(name):
        return _as_clouds(form.decode(data, options), mesh_points, seed)


def read_mesh(path: str | Path, *, max_points: int = MAX_POINTS) -> Mesh:
    """Reads a triangle mesh; polygons are cut into triangles and the corners of an .stl are joined.

    Args:
        path: file with one of `MESH_SUFFIXES`.
        max_points: meshes of more vertices are refused.

    Raises:
        DataError: if the file is missing, truncated, too large or of an unknown kind, has no face, or has an
            invalid face or coordinate.

    Examples:
        >>> mesh = ifdefense.Mesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]])
        >>> write_mesh("mesh.stl", mesh)
        >>> read_mesh("mesh.stl")
        Mesh(vertices=3, faces=1)
    """
    options = Options(max_points=max_points)
    name, form, data = _opened(path, None, options, MESH_SUFFIXES, "mesh")
    with naming(name):
        geometry = form.decode(data, options)
        if not isinstance(geometry, Geometry) or not len(geometry.faces):
            raise DataError("it has no faces, so it is not a mesh")
        return _mesh(geometry)


def write_cloud(
    path: str | Path,
    points: ArrayLike,
    *,
    fields: dict[str, NDArray[Any]] | None = None,
    force: bool = False,
) -> None:
    """Writes a cloud atomically.

    Args:
        path: file; the suffix, one of `WRITABLE_SUFFIXES`, selects the format.
        points: ``(N, 3)`` NumPy array or tensor on the CPU; float32 stays float32.
        fields: ``(N,)`` or ``(N, C)`` attributes of the points by name.
        force: replace an existing file.

    Raises:
        DataError: if the file exists already, its folder does not, its suffix is unknown, or it cannot be
            written.
        ValueError: if the points are not ``(N, 3)``, or a field has not one row per point.

    Examples:
        >>> write_cloud("cloud.ply", points[0])
        >>> read_cloud("cloud.ply").shape
        (64, 3)
    """
    path, cloud = Path(path), np.asarray(points)
    if cloud.ndim != 2 or cloud.shape[1] != 3:
        raise ValueError(f"{path}: a cloud must be (N, 3), got {cloud.shape}")
    write_cloud_file(path, _plain_file([cloud], fields or {}), force=force)


def write_clouds(
    path: str | Path, clouds: NDArray[Any] | Sequence[ArrayLike], *, force: bool = False
) -> None:
    """Writes clouds of equal size to one file, atomically.

    Args:
        path: the file; its suffix is one of `BATCH_SUFFIXES`.
        clouds: ``(S, N, 3)`` or a list of ``(N, 3)``.
        force: replace an existing file.

    Raises:
        DataError: as `write_cloud`.
        ValueError: if the clouds differ in size.

    Examples:
        >>> write_clouds("clouds.npz", points)
        >>> len(read_clouds("clouds.npz"))
        2
    """
    path, parts = Path(path), [np.asarray(cloud) for cloud in clouds]
    if path.suffix.lower() not in BATCH_SUFFIXES:
        raise DataError(f"{path}: several clouds are written to {', '.join(BATCH_SUFFIXES)}")
    shapes = {part.shape for part in parts}
    if len(shapes) != 1 or parts[0].ndim != 2 or parts[0].shape[1] != 3:
        raise ValueError(f"{path}: clouds written together must have one shape (N, 3), got {sorted(shapes)}")
    file = _plain_file(parts, {})
    write_cloud_file(
        path, dataclasses.replace(file, layout=dataclasses.replace(file.layout, batched=True)), force=force
    )


def write_cloud_file(path: str | Path, file: CloudFile, *, force: bool = False) -> None:
    """Writes clouds with their attributes, in the layout of ``file`` as far as the format allows.

    Fields that a format cannot hold are left out with a warning.

    Args:
        path: file; the suffix, one of `WRITABLE_SUFFIXES`, selects the format.
        file: its contents.
        force: replace an existing file.

    Raises:
        DataError: as `write_cloud`, or if several clouds are to go into a format that holds one.

    Examples:
        >>> np.savetxt("cloud.txt", points[0])
        >>> write_cloud_file("cloud.ply", read_cloud_file("cloud.txt"))
        >>> read_cloud("cloud.ply").shape
        (64, 3)
    """
    path = Path(path)
    data = encode_cloud_file(file, path.suffix, path)
    write_bytes(path, data, force=force)


def encode_cloud_file(file: CloudFile, suffix: str, name: str | Path = "-") -> bytes:
    """Encodes contents as the bytes of a file.

    Args:
        file: its contents.
        suffix: format, one of `WRITABLE_SUFFIXES`.
        name: of the file, for messages.

    Raises:
        DataError: if the format cannot hold them.

    Examples:
        >>> np.savetxt("cloud.txt", points[0])
        >>> encode_cloud_file(read_cloud_file("cloud.txt"), ".ply")[:3]
        b'ply'
    """
    form = FORMATS.get(suffix.lower())
    if form is None or form.encode is None:
        raise DataError(
            f"{name}: no cloud is written to {suffix or 'a file without suffix'}; {_known(WRITABLE_SUFFIXES)}"
        )
    if len(file.clouds) != 1 and not form.batch:
        raise DataError(f"{name}: {suffix} cannot hold {len(file.clouds)} clouds; .npz can")
    token = FILE.set(str(name))
    try:
        return form.encode(file, suffix.lower())
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    finally:
        FILE.reset(token)


def write_mesh(path: str | Path, mesh: Mesh, *, force: bool = False) -> None:
    """Writes a mesh atomically.

    Args:
        path: file; the suffix, one of `MESH_SUFFIXES`, selects the format.
        mesh: the mesh; one without faces becomes a file without faces.
        force: replace an existing file.

    Raises:
        DataError: if the file exists already, its folder does not, its suffix is unknown, or it cannot be
            written.

    Examples:
        >>> mesh = ifdefense.Mesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]])
        >>> write_mesh("mesh.off", mesh)
        >>> read_mesh("mesh.off")
        Mesh(vertices=3, faces=1)
    """
    path = Path(path)
    form = FORMATS.get(path.suffix.lower())
    if form is None or form.encode_mesh is None:
        raise DataError(
            f"{path}: no mesh is written to {path.suffix or 'a file without suffix'}; {_known(MESH_SUFFIXES)}"
        )
    with naming(path):
        data = form.encode_mesh(mesh, path.suffix.lower())
    write_bytes(path, data, force=force)


def _opened(
    path: str | Path | BinaryIO,
    suffix: str | None,
    options: Options,
    known: Iterable[str],
    what: str,
) -> tuple[str, Format, bytes]:
    """Name, format and contents of a file."""
    if isinstance(path, (str, Path)):
        name = str(path)
        suffix = Path(path).suffix if suffix is None else suffix
    else:
        name = "-"
    if (suffix or "").lower() not in known:
        if isinstance(path, (str, Path)):
            with naming(name):
                read_bytes(path, options)  # report a missing file first
        raise DataError(
            f"{name}: no {what} is read from {suffix or 'a file without suffix'}; {_known(known)}"
        )
    with naming(name):
        if isinstance(path, (str, Path)):
            data = read_bytes(path, options)
        else:
            data = path.read()
            check_content(data)
    assert suffix is not None
    return name, FORMATS[suffix.lower()], data


def _known(suffixes: Iterable[str]) -> str:
    return f"known are {', '.join(suffixes)}"


def _plain_file(clouds: Sequence[NDArray[Any]], fields: dict[str, NDArray[Any]]) -> CloudFile:
    """Contents of a file of clouds with default layout."""
    single = all(cloud.dtype.kind == "f" and cloud.dtype.itemsize <= 4 for cloud in clouds)
    named = bool(fields)
    tables = [PointTable(cloud.astype(np.float64), fields) for cloud in clouds]
    return CloudFile(tables, FileLayout(single=single, named=named))


def _as_clouds(found: CloudFile | Geometry, mesh_points: int, seed: int) -> CloudFile:
    """Clouds of a file; samples of a mesh take the attributes of the nearest corner of their face."""
    if isinstance(found, CloudFile):
        return found
    if not len(found.faces):
        return CloudFile([found.vertices], found.layout)
    from ifdefense.geometry.sampling import sample_surface

    mesh = _mesh(found)
    low, high = mesh.vertices.min(axis=0), mesh.vertices.max(axis=0)
    centre, side = low / 2 + high / 2, float((high - low).max()) or 1.0
    # Centred, with side 1, so that float32 is precise enough.
    near = Mesh((mesh.vertices - centre) / side, mesh.faces)
    try:
        points, face = sample_surface(near, mesh_points, generator=np.random.default_rng(seed))
    except ValueError as error:
        raise DataError(str(error)) from None
    sampled = checked_points(points.astype(np.float64) * side + centre)
    index = found.faces[face]
    nearest = ((near.vertices[index] - points[:, None]) ** 2).sum(axis=2).argmin(axis=1)
    rows = index[np.arange(len(index)), nearest]
    fields = {name: values[rows] for name, values in found.vertices.fields.items()}
    fields |= {name: values[face, nearest] for name, values in found.corners.items()}
    return CloudFile([PointTable(sampled, fields)], found.layout)


def _mesh(geometry: Geometry) -> Mesh:
    try:
        return Mesh(geometry.vertices.points, geometry.faces)
    except ValueError as error:
        raise DataError(str(error)) from None
