"""Text in columns: names, delimiters, counts, ambiguous files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ifdefense.data.formats import DataError, PointTable, read_cloud, read_cloud_file, write_cloud_file

XYZ = [[0.5, 1.5, 2.5], [3.5, 4.5, 5.5], [6.5, 7.5, 8.5], [9.5, 1.5, 2.5]]


def table(path: Path, text: str) -> PointTable:
    path.write_text(text, encoding="utf-8")
    (cloud,) = read_cloud_file(path).clouds
    return cloud


def rows(*columns: str) -> str:
    """Four lines of the given cells; x, y and z stand for coordinates and n for the number of the line."""
    lines = []
    for number, (x, y, z) in enumerate(XYZ):
        cells = {"x": str(x), "y": str(y), "z": str(z), "n": str(number)}
        lines.append(",".join(cells.get(column, column) for column in columns) + "\n")
    return "".join(lines)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("id,x,y,z\n" + rows("n", "x", "y", "z"), {"id": [0, 1, 2, 3]}),
        (",x,y,z\n" + rows("n", "x", "y", "z"), {"": [0, 1, 2, 3]}),  # pandas' index
        ("intensity,x,y,z\n" + rows("0.25", "x", "y", "z"), {"intensity": [0.25] * 4}),
        ("z,y,x\n" + rows("z", "y", "x"), {}),
        ("X,Y,Z,Label\n" + rows("x", "y", "z", "7"), {"Label": [7] * 4}),
        (",0,1,2\n" + rows("n", "x", "y", "z"), {"": [0, 1, 2, 3]}),  # pandas without names
        ("0,1,2\n" + rows("x", "y", "z"), {}),  # pandas without names or index
        ('"x","y","z","class"\n' + rows("x", "y", "z", '"a, b"'), {"class": ["a, b"] * 4}),
        ("x,y,z,\n" + rows("x", "y", "z", ""), {}),
        ("# x y z\n" + rows("x", "y", "z").replace(",", " "), {}),
        ("//X Y Z R\n" + rows("x", "y", "z", "7").replace(",", " "), {"R": [7] * 4}),
        ("x;y;z\n" + rows("x", "y", "z").replace(",", ";"), {}),
        (rows("x", "y", "z").replace("\n", "\r"), {}),
    ],
)
def test_names_say_which_columns_are_coordinates(
    text: str, fields: dict[str, list[object]], tmp_path: Path
) -> None:
    cloud = table(tmp_path / "a.csv", text)
    np.testing.assert_array_equal(cloud.points, XYZ)
    assert {name: values.tolist() for name, values in cloud.fields.items()} == fields


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("1,5;2,5;3,5\n1,5;2,5;3,6\n", "line 1: commas beside semicolons"),
        ("x;y;z\n1,5;2,5;3,5\n", "line 2: commas beside semicolons"),
        ("x,y,z\n1,2,3\n4,,6\n", "line 3, column y: a blank cell"),
        ("1,2,3\n4,,6\n", "line 2, column column_1: a blank cell"),
        ("1,2,3,9\n4,,6,9\n", "line 2, column column_1: a blank cell"),
        ("1,5 2,5 3,5\n1,5 2,5 3,5\n", "'5 2' is not a number"),
        ("lon,lat,height\n1,2,3\n", "no column x among lon, lat, height; columns"),
        ("x,y,z,x\n1,2,3,4\n", None),
        (rows("n", "x", "y", "z"), "the first column counts the rows"),
        ("0 1 2\n3 4\n", "line 2 has 2 columns, 3 are expected"),
        ("x,y,z\n", "not numbers in columns|only a line of names"),
        ("1_0 2 3\n4 5 6\n", "'1_0' is not a number"),
        ("5\n0 1 2\n3 4 5\n", "it declares 5 points, has 2"),
        ("1\n0 1 2\n3 4 5\n", "line 3: there are more points than the number"),
        ("1000000000000\n0 1 2\n", "1000000000000 points, more than the limit"),
        ("2\n0 1 2\n3 4 5\n2\n0 1 2\n", "it declares 2 points, has 1"),
        ("C 0 1 2\nH 3 4 5\n", "column column_0: 'C' is not a number"),
    ],
)
def test_what_is_ambiguous_or_cut_is_refused(text: str, match: str | None, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    if match is None:  # a second x gets a name of its own
        assert list(read_cloud_file(tmp_path / "a.csv").clouds[0].fields) == ["x.1"]
        return
    with pytest.raises(DataError, match=rf"a\.csv: .*(?:{match})"):
        read_cloud(tmp_path / "a.csv")


@pytest.mark.parametrize("columns", ["east,north,up", "1,2,3", ("east", "2", "up")])
def test_columns_are_named_or_numbered(columns: str | tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,east,north,up\n" + rows("n", "x", "y", "z"))
    np.testing.assert_array_equal(read_cloud(tmp_path / "a.csv", columns=columns), XYZ)


@pytest.mark.parametrize("columns", ["a,b", "x,x,y", "x,,y"])
def test_columns_must_be_three(columns: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y,z\n1,2,3\n")
    with pytest.raises(ValueError, match="three different names or numbers"):
        read_cloud(tmp_path / "a.csv", columns=columns)


def test_a_file_of_several_scans_is_one_cloud(tmp_path: Path) -> None:
    text = "2\n0 1 2 -5 255 0 0\n3 4 5 -5 255 0 0\n1\n6 7 8 -5 0 0 0\n"
    cloud = table(tmp_path / "a.pts", text)
    np.testing.assert_array_equal(cloud.points, [[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    assert list(cloud.fields) == ["column_3", "column_4", "column_5", "column_6"]


@pytest.mark.parametrize(
    "text",
    [
        'id,z,y,x,class\n7,0.1,0.2,0.30000000000000004,a b\n8,1.0,2.0,3.0,"c, d"\n',
        "0.1;0.2;0.3;1\n0.5;0.25;1e-20;0\n",
        "2\n0.1 0.2 0.3 17\n0.4 0.5 0.6 18\n",
        "# x y z label\n0.1 0.2 0.3 9007199254740993\n0.4 0.5 0.6 3\n",
    ],
)
def test_a_file_is_written_as_it_was(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    write_cloud_file(tmp_path / "b.csv", read_cloud_file(tmp_path / "a.csv"))
    assert (tmp_path / "b.csv").read_text() == text


def test_large_coordinates_keep_their_millimetres(tmp_path: Path) -> None:
    whole = 4_500_000_000 + np.arange(300, dtype=np.int64).reshape(100, 3)
    np.save(tmp_path / "a.npy", whole)
    np.savetxt(tmp_path / "a.txt", whole / 1000, fmt="%.3f")
    assert len(np.unique(read_cloud(tmp_path / "a.npy"), axis=0)) == 100
    np.testing.assert_array_equal(read_cloud(tmp_path / "a.npy"), whole)
    np.testing.assert_array_equal(read_cloud(tmp_path / "a.txt"), whole / 1000)
