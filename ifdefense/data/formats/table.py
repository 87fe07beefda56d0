"""Contents of files: points with named attributes, and the layout of the file."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ifdefense.data.errors import DataError

logger = logging.getLogger(__name__)

FILE: ContextVar[str] = ContextVar("FILE", default="-")
"""Name of the current file, for warnings."""

MAX_POINTS = 20_000_000
"""Default limit on the points of a file."""

BYTES_PER_POINT = 32
"""Limit on the decoded size per point of the limit on points."""

UNIT = re.compile(r"\s*(\[\w+\]|\(\w+\))$")
"""A unit behind the name of a column."""

Columns = dict[str, NDArray[Any]]
"""``(N,)`` or ``(N, C)`` arrays by name."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options for reading a file.

    Attributes:
        columns: names or numbers (from 0) of the columns with x, y and z; found by their names by default.
        key: name of the array of points in an .npz or .h5 file; one of the usual names by default.
        max_points: limit on the points of a file.
        max_rows: rows of a text file to read; all by default.
    """

    columns: tuple[str, ...] | None = None
    key: str | None = None
    max_points: int = MAX_POINTS
    max_rows: int | None = None

    def __post_init__(self) -> None:
        columns = self.columns
        if columns is not None:
            names = tuple(str(name).strip() for name in columns)
            if len(names) != 3 or len(set(names)) != 3 or not all(names):
                raise ValueError(f"columns must be three different names or numbers, got {columns!r}")
            object.__setattr__(self, "columns", names)
        if self.max_points < 1:
            raise ValueError(f"max_points must be at least 1, got {self.max_points}")

    def check_points(self, count: int) -> None:
        """Checks the number of points against the limit.

        Raises:
            DataError: if there are too many.
        """
        if count > self.max_points:
            raise DataError(
                f"it declares {count} points, more than the limit of {self.max_points}; "
                "max_points (--max-points) raises it"
            )

    def check_bytes(self, size: int) -> None:
        """Checks the decoded size against `BYTES_PER_POINT` times the limit.

        Raises:
            DataError: if it is larger.
        """
        if size > BYTES_PER_POINT * self.max_points:
            raise DataError(
                f"it declares {size} bytes, more than the limit of {BYTES_PER_POINT * self.max_points}; "
                "max_points (--max-points) raises it"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class PointTable:
    """A cloud and the attributes of its points.

    Attributes:
        points: ``(N, 3)`` float64.
        fields: ``(N,)`` or ``(N, C)`` attributes by their names in the file.

    Examples:
        >>> table = PointTable(points[0].numpy(), {"label": np.arange(64)})
        >>> sorted(table.fields)
        ['label']
    """

    points: NDArray[np.float64]
    fields: Mapping[str, NDArray[Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.points.ndim != 2 or self.points.shape[1] != 3:
            raise ValueError(f"the points must be (N, 3), got {self.points.shape}")
        for name, values in self.fields.items():
            if values.ndim not in (1, 2) or len(values) != len(self.points):
                raise ValueError(f"{name} must have one row per point, got {values.shape}")

    def moved(self, points: NDArray[np.floating]) -> PointTable:
        """Replaces the points, with attributes of the nearest old point (`transfer_attributes`)."""
        from ifdefense.attributes import transfer_attributes

        return PointTable(
            np.asarray(points, np.float64), transfer_attributes(self.points, dict(self.fields), points)
        )


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """Layout of the points in a file, used to write results in the same way.

    Attributes:
        kind: name of the format.
        columns: names of the columns of the array, table or vertex element, coordinates included.
        coordinates: the ones with x, y and z.
        key: name of the array of points.
        named: whether the file has names of columns.
        header: prefix of the line of names in a text file, ``None`` without that line.
        delimiter: between the cells of a text file.
        counted: whether a text file starts with the number of points.
        text: whether the text variant of the format is used.
        single: whether the coordinates are float32 or float16.
        batched: whether the array is ``(S, N, C)``.
        viewpoint: pose of the sensor in a .pcd.

    Examples:
        >>> from ifdefense.data import read_cloud_file
        >>> np.save("clouds.npy", points)
        >>> read_cloud_file("clouds.npy").layout.batched
        True
    """

    kind: str = ""
    columns: tuple[str, ...] = ("x", "y", "z")
    coordinates: tuple[str, str, str] = ("x", "y", "z")
    key: str = "points"
    named: bool = False
    header: str | None = None
    delimiter: str | None = None
    counted: bool = False
    text: bool = False
    single: bool = False
    batched: bool = False
    viewpoint: str = "0 0 0 1 0 0 0"


@dataclasses.dataclass(frozen=True, eq=False)
class CloudFile:
    """Contents of a file of clouds.

    Attributes:
        clouds: the clouds with the attributes of their points.
        layout: layout of the file.
        extras: arrays that belong to whole clouds or to the file, such as labels, by name.

    Examples:
        >>> CloudFile([PointTable(points[0].numpy())]).clouds[0].points.shape
        (64, 3)
    """

    clouds: list[PointTable]
    layout: FileLayout = FileLayout()
    extras: Mapping[str, NDArray[Any]] = dataclasses.field(default_factory=dict)

    def moved(self, results: Sequence[NDArray[np.floating]]) -> CloudFile:
        """The same file with other points; each takes the attributes of its nearest input point.

        Args:
            results: ``(M, 3)`` points for each cloud.
        """
        pairs = zip(self.clouds, results, strict=True)
        return dataclasses.replace(self, clouds=[cloud.moved(points) for cloud, points in pairs])

    def laid_out(self, kind: str) -> FileLayout:
        """Layout of this file if it has that format, else a default one with the coordinates first."""
        if self.layout.kind == kind:
            return self.layout
        layout = FileLayout(kind=kind, single=self.layout.single, named=self.layout.named)
        return dataclasses.replace(layout, batched=len(self.clouds) > 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Geometry:
    """Vertices and triangles of a file that holds a mesh or, without triangles, a cloud.

    Attributes:
        vertices: vertices with their attributes.
        faces: ``(F, 3)`` int64.
        layout: layout of the vertices in the file.
        corners: ``(F, 3)`` attributes of the corners of the faces by name, such as normals per face.
    """

    vertices: PointTable
    faces: NDArray[np.int64]
    layout: FileLayout
    corners: Mapping[str, NDArray[Any]] = dataclasses.field(default_factory=dict)


def find_coordinates(names: Sequence[str], wanted: Sequence[str] | None) -> tuple[int, int, int]:
    """Finds the columns with x, y and z.

    Args:
        names: names of the columns.
        wanted: names or numbers given by the caller.

    Raises:
        DataError: if there are none or several candidates.
    """
    listing = ", ".join(name or "''" for name in names)
    found = []
    for want in wanted or ("x", "y", "z"):
        matches = [index for index, name in enumerate(names) if name == want]
        matches = matches or [i for i, name in enumerate(names) if name.casefold() == want.casefold()]
        matches = matches or [
            i for i, name in enumerate(names) if UNIT.sub("", name).casefold() == want.casefold()
        ]
        if not matches and wanted and want.isdigit() and int(want) < len(names):
            matches = [int(want)]
        if len(matches) != 1:
            raise DataError(
                f"{'no' if not matches else 'more than one'} column {want} among {listing}; "
                "columns (--columns) says which are x, y and z"
            )
        found += matches
    return found[0], found[1], found[2]


def unique_names(names: Sequence[str]) -> list[str]:
    """Makes names unique by appending numbers, as pandas does."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        count = seen.get(name, 0)
        seen[name] = count + 1
        result.append(f"{name}.{count}" if count else name)
    return result


def table_of(
    columns: Columns, options: Options, *, drop_missing: bool = False
) -> tuple[PointTable, tuple[str, str, str], bool]:
    """A table of named columns, the names of its coordinates, and whether these are float32.

    Args:
        columns: the columns.
        options: which of them are the coordinates.
        drop_missing: drop points whose coordinates are all NaN, as written by scanners, with a warning.

    Raises:
        DataError: if the coordinates cannot be found, are not real numbers or not finite.
    """
    names = list(columns)
    chosen = [names[index] for index in find_coordinates(names, options.columns)]
    axes = [columns[name] for name in chosen]
    for name, axis in zip(chosen, axes, strict=True):
        if axis.ndim != 1 or axis.dtype.kind not in "fiu":
            raise DataError(f"column {name} must be real numbers, got {axis.dtype} {axis.shape}")
    with np.errstate(invalid="ignore"):  # a damaged NaN
        points = np.stack([axis.astype(np.float64) for axis in axes], axis=1)
    fields = {name: values for name, values in columns.items() if name not in chosen}
    missing = np.isnan(points).all(axis=1)
    if drop_missing and missing.any() and not missing.all():
        warn(
            f"{np.count_nonzero(missing)} of {len(points)} points have no coordinates (NaN) and are left out"
        )
        points, fields = points[~missing], {name: values[~missing] for name, values in fields.items()}
    points = checked_points(points)
    single = all(axis.dtype.kind == "f" and axis.dtype.itemsize <= 4 for axis in axes)
    return PointTable(points, fields), (chosen[0], chosen[1], chosen[2]), single


def checked_points(points: NDArray[Any], which: str = "") -> NDArray[np.float64]:
    """The points ``(N, 3)`` in float64.

    Args:
        points: what a file holds.
        which: the cloud in the file, for the message.

    Raises:
        DataError: if there is no point, or one is not finite.
    """
    if not len(points):
        raise DataError(f"{which}there are no points in it")
    finite = np.isfinite(points).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise DataError(f"{which}point {row} is not finite: {points[row]}")
    return np.ascontiguousarray(points, dtype=np.float64)


def needs_double(points: NDArray[np.floating]) -> bool:
    """Whether float32 is too coarse, as for scans far from the origin."""
    rounding = float(np.abs(points).max(initial=0)) * float(np.finfo(np.float32).eps)
    return rounding > 1e-4 * float(np.ptp(points, axis=0).max()) or rounding > 1e30


def stored_coordinates(table: PointTable, layout: FileLayout) -> NDArray[np.floating]:
    """Coordinates in the precision of the file."""
    if layout.single and not needs_double(table.points):
        return table.points.astype(np.float32)
    return table.points


SPLIT = {
    "normal": ("nx", "ny", "nz"),
    "normals": ("nx", "ny", "nz"),
    "color": ("red", "green", "blue"),
    "colors": ("red", "green", "blue"),
}
"""Names of the columns of fields that hold vectors."""


def flat_columns(table: PointTable, layout: FileLayout, *, text: bool = False) -> Columns:
    """Coordinates and attributes as ``(N,)`` columns in the order of the layout.

    Args:
        table: the cloud.
        layout: order of the first columns; other fields follow.
        text: whether columns of strings can be stored; otherwise they are dropped with a warning.
    """
    coordinates = stored_coordinates(table, layout)
    columns: Columns = {}
    rest = [name for name in table.fields if name not in layout.columns]
    for name in [*layout.columns, *rest]:
        if name in layout.coordinates:
            columns[name] = coordinates[:, layout.coordinates.index(name)]
        elif name in table.fields:
            values = table.fields[name]
            wide = values.ndim == 2
            parts: tuple[str, ...] = SPLIT.get(name, ()) if wide else (name,)
            if wide and len(parts) != values.shape[1]:
                parts = tuple(f"{name}_{index}" for index in range(values.shape[1]))
            for part, column in zip(parts, values.T if wide else [values], strict=True):
                unique = part
                while unique in columns or unique in layout.coordinates:
                    unique += "_"
                columns[unique] = column
    kinds = "fiub" if not text else "fiubSUO"
    lost = [name for name, values in columns.items() if values.dtype.kind not in kinds]
    warn_lost(lost, layout.kind)
    return {name: values for name, values in columns.items() if name not in lost}


def warn_lost(names: Sequence[str], kind: str) -> None:
    """Warns about fields that the format cannot store."""
    if names:
        warn(f"a .{kind} file cannot hold the fields {', '.join(names)}; they are left out")


def warn(message: str) -> None:
    """Logs a warning with the name of the current file."""
    logger.warning("%s: %s", FILE.get(), message)


def plain_strings(values: NDArray[Any]) -> NDArray[Any]:
    """Converts arrays of Python strings, as from HDF5, to a dtype that needs no pickling."""
    if values.dtype.kind != "O":
        return values
    flat = [item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item) for item in values.flat]
    return np.array(flat, dtype=np.str_).reshape(values.shape)


def declared(word: str, what: str) -> int:
    """Parses a count in the header of a file.

    Raises:
        DataError: if it is not a whole number.
    """
    if not (word.isascii() and word.isdigit()):
        raise DataError(f"the number of {what} must be a whole number, got {word[:40]!r}")
    if len(word) > 18:
        raise DataError(f"it declares {word[:40]} {what}, more than any file holds")
    return int(word)


def short(declared_count: int, found: int, what: str) -> DataError:
    """Error for a number of elements other than declared in the header."""
    return DataError(f"the file is truncated or damaged: it declares {declared_count} {what}, has {found}")


def fan(polygons: Sequence[Sequence[int]] | NDArray[np.integer]) -> NDArray[np.int64]:
    """Triangles ``(F, 3)`` of polygons, as fans around the first corner."""
    if isinstance(polygons, np.ndarray):
        corners = [polygons[:, (0, index, index + 1)] for index in range(1, polygons.shape[1] - 1)]
        return np.stack(corners, axis=1).reshape(-1, 3).astype(np.int64)
    triangles = [
        (corners[0], corners[index], corners[index + 1])
        for corners in polygons
        for index in range(1, len(corners) - 1)
    ]
    return np.array(triangles, dtype=np.int64).reshape(-1, 3)
