"""Text in columns: .xyz, .txt, .csv, .pts.

Columns are separated by blanks, commas or semicolons. Before the points there may be a line of names,
comments (``#``, ``//``, ``%`` or ``!``) with the names in the last one, and, as in .pts, the number of
points, also before each further scan. Without names, x, y and z are the first three columns.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ifdefense.data.errors import DataError
from ifdefense.data.formats.files import decoded_text
from ifdefense.data.formats.table import (
    CloudFile,
    Columns,
    FileLayout,
    Options,
    find_coordinates,
    flat_columns,
    short,
    table_of,
    unique_names,
)

KIND = "text"
EXACT = 2**53
"""Whole numbers up to this are exact in float64."""
NAN = re.compile(r"[+-]?(nan(\(\w+\))?|1\.#(QNAN|SNAN|IND)\d*)", re.IGNORECASE)
"""NaN, also as printed by Microsoft's compilers."""

Rows = list[tuple[int, str]]
"""Lines with their numbers, from 1."""


def decode(data: bytes, options: Options) -> CloudFile:
    """Reads columns; those other than the coordinates become fields.

    Raises:
        DataError: if there are no points, rows differ in length, a coordinate is blank or not a number, or
            the columns of the coordinates are ambiguous.
    """
    rows, comment = _rows(decoded_text(data))
    if not rows:
        raise DataError("there are no points in it")
    delimiter = _delimiter(rows)
    rows, counted = _without_counts(rows, options)
    first = _split(rows[0], delimiter)
    names, header = None, None
    if _is_header(first, rows[1:3], delimiter, options.columns):
        names, header, rows = unique_names(first), "", rows[1:]
        if options.columns is None and {"0", "1", "2"} <= set(names):  # as pandas numbers them
            options = dataclasses.replace(options, columns=("0", "1", "2"))
        if not rows:
            raise DataError("there are no points in it, only a line of names")
    elif comment is not None:
        words = comment.lstrip("#/%! \t")
        found = [word.strip(" \t\"'") for word in (words.split(delimiter) if delimiter else words.split())]
        if len(found) == len(first) and {"x", "y", "z"} <= {word.lower() for word in found}:
            names, header = unique_names(found), comment[: len(comment) - len(words)]
    options.check_points(len(rows))
    if options.max_rows is not None:
        rows = rows[: options.max_rows]
    columns = _columns(rows, delimiter, names, options)
    if len(columns) < 3:
        raise DataError(f"line {rows[0][0]}: three coordinates are needed, there are {len(columns)} columns")
    if names is None and options.columns is None:
        _refuse_index(columns)
        options = dataclasses.replace(options, columns=tuple(list(columns)[:3]))
    table, coordinates, _ = table_of(columns, options, drop_missing=True)
    layout = FileLayout(
        kind=KIND,
        columns=tuple(columns),
        coordinates=coordinates,
        named=names is not None,
        header=header,
        delimiter=delimiter or " ",
        counted=counted,
    )
    return CloudFile([table], layout)


def encode(file: CloudFile, suffix: str) -> bytes:
    """One point per line, numbers in their shortest exact form."""
    (table,) = file.clouds
    layout = file.laid_out(KIND)
    columns = flat_columns(table, layout, text=True)
    header, delimiter = layout.header, layout.delimiter or ("," if suffix == ".csv" else " ")
    counted = layout.counted
    if file.layout.kind != KIND:
        counted = suffix == ".pts"
        if len(columns) > 3 and layout.named and not counted:
            header = "" if suffix == ".csv" else "# "
    strings = {name for name, values in columns.items() if values.dtype.kind not in "fiub"}
    if delimiter == " " and any(re.search(r"\s", str(v)) for name in strings for v in columns[name]):
        delimiter = ","
    start = f"{len(table.points)}\n" if counted else ""
    if header is not None:
        start += header + _line(list(columns), delimiter)
    cells = [
        values.astype(str).tolist() if name in strings else _digits(values)
        for name, values in columns.items()
    ]
    if strings:
        body = "".join(_line(row, delimiter) for row in zip(*cells, strict=True))
    else:
        body = "".join(delimiter.join(row) + "\n" for row in zip(*cells, strict=True))
    return (start + body).encode("utf-8")


def _line(cells: Sequence[str], delimiter: str) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter, lineterminator="\n").writerow(cells)
    return buffer.getvalue()


def _digits(values: NDArray[np.generic]) -> list[str]:
    """Shortest exact decimal forms."""
    if values.dtype.kind == "f" and values.dtype.itemsize <= 4:
        return [str(value) for value in values.astype(np.float32)]
    return [repr(value) for value in (values.astype(int) if values.dtype.kind == "b" else values).tolist()]


def _rows(text: str) -> tuple[Rows, str | None]:
    """Lines that are not blank or comments, and the last comment before them."""
    rows: Rows = []
    comment = None
    for number, line in enumerate(text.split("\n"), 1):
        stripped = line.strip()
        if stripped.startswith(("#", "//", "%", "!")):
            comment = stripped if not rows else comment
        elif number == 1 and re.fullmatch("sep=.", stripped):  # for Excel
            continue
        elif stripped:
            rows.append((number, line))
    return rows, comment


def _delimiter(rows: Rows) -> str | None:
    """Semicolon, comma, or ``None`` for blanks."""
    semicolon = comma = False
    for number, line in rows:
        bare = re.sub(r'"[^"]*"', "", line) if '"' in line else line
        semicolon, comma = semicolon or ";" in bare, comma or "," in bare
        if semicolon and comma:
            raise DataError(
                f"line {number}: commas beside semicolons; decimal commas are not read, write points"
            )
    return ";" if semicolon else "," if comma else None


def _without_counts(rows: Rows, options: Options) -> tuple[Rows, bool]:
    """Removes the lines with the number of points."""

    def count_of(line: str) -> int | None:
        word = line.strip()
        return int(word) if word.isascii() and word.isdigit() and len(word) <= 18 else None

    if count_of(rows[0][1]) is None or len(rows) == 1:
        return rows, False
    result: Rows = []
    start = 0
    while start < len(rows):
        number, line = rows[start]
        count = count_of(line)
        if count is None:
            raise DataError(f"line {number}: there are more points than the number in front of them says")
        options.check_points(count)
        if start + 1 + count > len(rows):
            raise short(count, len(rows) - start - 1, "points")
        result += rows[start + 1 : start + 1 + count]
        start += 1 + count
    if not result:
        raise DataError("there are no points in it")
    return result, True


def _split(row: tuple[int, str], delimiter: str | None) -> list[str]:
    number, line = row
    if delimiter is None:
        return re.split(r"\s+(?:#|//)", line)[0].split()
    try:
        cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise DataError(f"line {number}: {error}") from None
    return [cell.strip() for cell in cells]


def _number(cell: str) -> float | None:
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return float("nan") if NAN.fullmatch(cell) else None


def _is_header(
    first: list[str], following: Rows, delimiter: str | None, wanted: tuple[str, ...] | None
) -> bool:
    """Whether the first row is a header; numbers are names only in the format of pandas."""
    numbers = [_number(cell) for cell in first]
    if all(number is None for number in numbers):
        return any(_number(cell) is not None for row in following for cell in _split(row, delimiter))
    lower = [cell.lower() for cell in first]
    if all(name in lower for name in ("x", "y", "z")) or (
        wanted is not None and any(n is None for n in numbers) and set(wanted) <= set(first)
    ):
        return True
    counts = first[1:] if not first[0] else first
    if delimiter != "," or len(counts) < 3 or counts != [str(index) for index in range(len(counts))]:
        return False
    if not first[0]:
        return True  # a blank above pandas' index
    cells = [cell for row in following for cell in _split(row, delimiter)]
    return bool(cells) and not any(re.fullmatch(r"[+-]?\d+", cell) for cell in cells)


def _columns(rows: Rows, delimiter: str | None, names: list[str] | None, options: Options) -> Columns:
    """Columns by name: numbers if all cells are numbers, else strings."""
    first = _split(rows[0], delimiter)
    block = _numbers(rows, delimiter)
    if block is not None and (names is None or len(names) == block.shape[1]):
        labels = names or [f"column_{index}" for index in range(block.shape[1])]
        columns: Columns = {}
        for name, cell, values in zip(labels, first, block.T, strict=True):
            whole = re.fullmatch(r"[+-]?\d+", cell) and np.array_equal(values, np.round(values))
            if whole and np.abs(values).max() >= EXACT:
                break
            columns[name] = values.astype(np.int64) if whole else values
        else:
            return columns
    return _cells(rows, delimiter, names, options)


def _numbers(rows: Rows, delimiter: str | None) -> NDArray[np.float64] | None:
    """All cells as numbers, or ``None`` if one is not a number."""
    try:
        return np.loadtxt(
            [line for _, line in rows],
            delimiter=delimiter,
            ndmin=2,
            comments=["#", "//"] if delimiter is None else None,
            quotechar='"' if delimiter else None,
            dtype=np.float64,
        )
    except ValueError:
        return None


def _cells(rows: Rows, delimiter: str | None, names: list[str] | None, options: Options) -> Columns:
    """Reads column by column; errors name the line."""
    table = [_split(row, delimiter) for row in rows]
    named = names is not None
    if delimiter and all(not cells[-1] for cells in table):  # every line ends with a delimiter
        if names and len(names) == len(table[0]) and not names[-1]:
            names = names[:-1]
        if names is None or len(names) == len(table[0]) - 1:
            table = [cells[:-1] for cells in table]
    width = len(names) if names else len(table[0])
    for (number, _), cells in zip(rows, table, strict=True):
        if len(cells) != width:
            raise DataError(f"line {number} has {len(cells)} columns, {width} are expected")
    names = names or [f"column_{index}" for index in range(width)]
    if width < 3:
        return {name: np.zeros(0) for name in names}  # refused by the caller
    chosen = find_coordinates(names, options.columns) if named or options.columns else (0, 1, 2)
    columns: Columns = {}
    for index, name in enumerate(names):
        cells = [row[index] for row in table]
        columns[name] = _column(cells)
        if index in chosen and columns[name].dtype.kind not in "fi":
            wrong = next(position for position, cell in enumerate(cells) if _number(cell) is None)
            what = f"{cells[wrong]!r} is not a number" if cells[wrong] else "a blank cell"
            raise DataError(f"not numbers in columns: line {rows[wrong][0]}, column {name}: {what}")
    return columns


def _column(cells: list[str]) -> NDArray[np.generic]:
    if all(re.fullmatch(r"[+-]?\d+", cell) for cell in cells):
        whole = [int(cell) for cell in cells]
        if all(-(2**63) <= value < 2**63 for value in whole):
            return np.array(whole, dtype=np.int64)
    numbers = [_number(cell) for cell in cells]
    if any(number is None for number in numbers):
        return np.array(cells, dtype=np.str_)
    return np.array(numbers, dtype=np.float64)


def _refuse_index(columns: Columns) -> None:
    """Rejects a first column of row numbers.

    Raises:
        DataError: if the first column counts the rows.
    """
    first = next(iter(columns.values()))
    if len(columns) > 3 and len(first) > 3 and first.dtype.kind == "i":
        for start in (0, 1):
            if np.array_equal(first, np.arange(start, start + len(first))):
                raise DataError(
                    "the first column counts the rows; columns (--columns) says which are x, y and z, "
                    "for example 1,2,3"
                )
