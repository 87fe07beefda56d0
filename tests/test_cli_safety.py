"""``ifdefense purify`` never overwrites files, continues after failures and reports them."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

import ifdefense
from ifdefense import batch, cli
from ifdefense.clouds import Unpacked
from ifdefense.data.formats import (
    CLOUD_SUFFIXES,
    read_cloud,
    read_cloud_file,
    read_mesh,
    write_cloud,
    write_clouds,
)
from ifdefense.purifiers import loading
from ifdefense.purifiers.base import Purifier, Trace
from ifdefense.purifiers.registry import METHODS

Points = NDArray[np.float32]


def purify(*arguments: object, stdin: bytes | None = None, method: str | None = "sor") -> Result:
    given = ["purify", *(["--method", method] if method else []), *(str(argument) for argument in arguments)]
    return CliRunner().invoke(cli.main, given, input=stdin)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its contents."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def here(tmp_path: Path, box_cloud: Points, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a few clouds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans" / "deep").mkdir(parents=True)
    for name in ("a.ply", "scans/s.ply", "scans/s.xyz", "scans/deep/t.npy"):
        write_cloud(tmp_path / name, box_cloud[:200])
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.ply", "-o", "a.ply"], "the result a.ply would be written over the input a.ply"),
        (["a.ply", "-o", "."], "would be written over the input a.ply"),
        (["scans/../a.ply", "-o", "scans/../a.ply"], "would be written over the input"),
        (["a.ply", "-o", "link.ply"], "would be written over the input a.ply"),
        (["scans", "-o", "scans"], "results cannot go into the folder that is read"),
        (["scans", "-o", "scans/../scans"], "results cannot go into the folder that is read"),
        (["scans/deep", "-o", "scans/deep/../deep/."], "results cannot go into the folder that is read"),
        (
            ["a.ply", "-o", "b.ply", "--report", "a.ply"],
            "report a.ply would be written over the input a.ply",
        ),
        (
            ["a.ply", "-o", "b.ply", "--report", "b.ply"],
            "report b.ply would be written over the result b.ply",
        ),
        (["a.ply", "-o", "b.ply", "--report", "./scans/../b.ply"], "would be written over the result b.ply"),
        (
            ["a.ply", "-o", "b.ply", "--report", "b.mesh.ply"],
            "b.mesh.ply has the ending of a mesh",
        ),
        (["a.ply", "-o", "b.ply", "--report", "scans"], "scans is a folder"),
        (["a.ply", "-o", "b.ply", "--report", "a.ply/r.html"], "a.ply is no folder"),
        (["a.ply", "-o", "a.ply/b.ply"], "a.ply is no folder"),
        (["a.ply", "-o", "b.ply", "--skip-existing"], "either replaced or skipped"),
        (["a.ply", "-o", "b.las"], "b.las: no cloud is written to .las; known are .ply"),
        (["a.ply", "-o", "b.stl"], "b.stl: no cloud is written to .stl"),
        (["a.ply", "scans/s.ply", "-o", "b.npz"], "b.npz names a file: several results need a folder"),
        (["scans", "-o", "-"], "standard output holds one result"),
        (["-", "-o", "b.ply"], "standard input needs --format"),
        (["-", "-o", "out/", "--format", "ply"], "needs a file or -"),
        (["-", "a.ply", "-o", "out", "--format", "ply"], "standard input cannot be one of several"),
        (["a.ply", "-o", "-", "--format", "las"], "unknown format 'las'; there are ply"),
        (["a.ply", "-o", "-", "--format", "stl"], "no cloud is written to .stl"),
        (["a.ply", "-o", "b.ply", "--columns", "x,y"], "columns must be three"),
        (["a.ply", "-o", "b.ply", "--mesh"], "the method sor has no surface"),
        (["a.ply", "-o", "b.ply", "--seed", "-1"], "-1 is not in the range"),
    ],
)
def test_a_call_that_cannot_go_well_is_refused_before_any_work(
    arguments: list[str], message: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "link.ply").symlink_to("a.ply")
    before = tree(here)

    def fail(*_: object) -> None:
        pytest.fail("the method was loaded")

    monkeypatch.setattr(loading, "load", fail)
    result = purify(*arguments, "--force")
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert tree(here) == before


def test_a_file_that_is_named_twice_is_purified_once(here: Path) -> None:
    result = purify("scans/s.ply", "./scans/s.ply", "scans", "-o", "out")
    assert result.exit_code == 0
    assert "3 of 3 files done" in result.output


def test_a_hard_link_to_an_input_is_no_result(here: Path) -> None:
    os.link("a.ply", "same.ply")
    result = purify("a.ply", "-o", "same.ply", "--force")
    assert result.exit_code == 2
    assert "would be written over the input" in result.output


def test_the_output_may_lie_in_the_input_and_is_never_read(here: Path) -> None:
    assert purify("scans", "-o", "scans/clean").exit_code == 0
    first = tree(here / "scans")
    assert len(first) == 6
    for output in ("scans/clean", "./scans/../scans/clean", str(here / "scans" / "clean")):
        result = purify("scans", "-o", output, "--force")
        assert "3 of 3 files done" in result.output
        assert tree(here / "scans") == first


def test_hidden_files_and_meshes_are_no_clouds(here: Path) -> None:
    (here / "scans" / ".s.ply").write_text("half a file")
    (here / "scans" / "s.mesh.ply").write_text("a mesh of an earlier run")
    (here / "scans" / ".cache").mkdir()
    (here / "scans" / ".cache" / "b.ply").write_text("not for us")
    result = purify("scans", "-o", "out")
    assert result.exit_code == 0, result.output
    assert "3 of 3 files done" in result.output


def test_linked_folders_are_read_once(here: Path) -> None:
    (here / "scans" / "loop").symlink_to(here / "scans")
    (here / "elsewhere").mkdir()
    (here / "a.ply").rename(here / "elsewhere" / "a.ply")
    (here / "scans" / "more").symlink_to(here / "elsewhere")
    result = purify("scans", "-o", "out")
    assert "4 of 4 files done" in result.output
    assert (here / "out" / "more" / "a.ply").is_file()


def test_a_folder_that_cannot_be_read_is_an_error_and_the_rest_is_done(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refuse(path: object = ".") -> object:
        if str(path).endswith("deep"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", refuse)
    result = purify("scans", "-o", "out")
    assert result.exit_code == 1
    assert "scans/deep: the folder cannot be read: Permission denied" in result.output
    assert "2 of 2 files done" in result.output


def test_finished_files_are_skipped_on_request(here: Path) -> None:
    assert purify("scans", "-o", "out").exit_code == 0
    (here / "out" / "s.ply").unlink()
    times = {path: path.stat().st_mtime_ns for path in (here / "out").rglob("*.*")}
    again = purify("scans", "-o", "out")
    assert again.exit_code == 1
    assert "--skip-existing keeps it" in again.output
    (here / "out" / "s.ply").unlink()
    result = purify("scans", "-o", "out", "--skip-existing")
    assert result.exit_code == 0
    assert "1 of 3 files done, 2 skipped" in result.output
    assert (here / "out" / "s.ply").is_file()
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_a_crash_in_one_file_does_not_stop_the_others(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = batch.read_cloud_file

    def crash(path: Path, *arguments: object, **options: object) -> object:
        if path.name == "s.ply":
            raise MemoryError
        if path.name == "s.xyz":
            raise KeyError("what no one thought of")
        return real(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(batch, "read_cloud_file", crash)
    result = purify("scans", "-o", "out")
    assert result.exit_code == 1
    assert "s.ply: there is not enough memory" in result.output
    assert "s.xyz: KeyError: 'what no one thought of'" in result.output
    assert "1 of 3 files done" in result.output


def test_a_crash_of_the_method_is_an_error_of_its_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Purifier.trace

    def crash(self: Purifier, clouds: Unpacked, *arguments: object, **options: object) -> list[Trace]:
        if any(len(cloud) == 150 for cloud in clouds.clouds):
            raise MemoryError
        return real(self, clouds, *arguments, **options)  # type: ignore[arg-type]

    write_cloud("scans/big.ply", read_cloud("a.ply")[:150])
    monkeypatch.setattr(Purifier, "trace", crash)
    result = purify("scans", "-o", "out")
    assert "scans/big.ply: there is not enough memory" in result.output
    assert "3 of 4 files done" in result.output


def test_a_report_that_cannot_be_written_is_told_and_the_results_stay(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(batch, "write_bytes", fail)
    result = purify("a.ply", "-o", "b.ply", "--report", "r.html")
    assert result.exit_code == 1
    assert "r.html: the report could not be written: " in result.output
    assert "1 of 1 files done" in result.output
    assert len(read_cloud("b.ply")) == 200


def test_a_report_says_how_much_it_shows(here: Path, box_cloud: Points) -> None:
    write_clouds("many.npz", [box_cloud[start : start + 100] for start in range(14)])
    result = purify("many.npz", "-o", "out.npz", "--report", "r.html")
    assert "the report shows the first 12 of 14 clouds; --report-clouds shows more" in result.output
    page = (here / "r.html").read_text()
    assert "the first 12 of 14" in page
    assert "many.npz, cloud 11" in page
    assert "many.npz, cloud 12" not in page
    result = purify("many.npz", "-o", "out.npz", "--report", "r.html", "--report-clouds", "20", "--force")
    assert "shows the first" not in result.output
    assert "many.npz, cloud 13" in (here / "r.html").read_text()


def fallback(self: Purifier, clouds: Unpacked, *_: object, **__: object) -> list[Trace]:
    """A method that finds a surface for clouds of 200 points alone."""
    mesh = ifdefense.Mesh(np.eye(3) + 5e6, np.int64([[0, 1, 2]]))
    return [
        Trace(
            cloud, np.ones(len(cloud), bool), None, None, None,
            mesh if len(cloud) == 200 else None, cloud, None if len(cloud) == 200 else "no surface", {},
        )
        for cloud in (each.numpy() for each in clouds.clouds)
    ]  # fmt: skip


def test_meshes_have_names_of_their_own(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Purifier, "trace", fallback)
    write_clouds("scans/m.npz", [read_cloud("a.ply")] * 2)
    result = purify("scans", "-o", "out", "--mesh", method="onet-mesh")
    assert result.exit_code == 0, result.output
    meshes = sorted(path.name for path in (here / "out").rglob("*.mesh.ply"))
    assert meshes == ["m-0000.mesh.ply", "m-0001.mesh.ply", "s.ply.mesh.ply", "s.xyz.mesh.ply", "t.mesh.ply"]
    # Float64 all the way: float32 has steps of 0.5 there.
    np.testing.assert_array_equal(read_mesh(here / "out" / "s.ply.mesh.ply").vertices, np.eye(3) + 5e6)


def test_a_mesh_never_replaces_a_file_of_the_same_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Purifier, "trace", fallback)
    write_clouds("scans/m.npz", [read_cloud("a.ply")] * 2)
    write_cloud("scans/m-0001.xyz", read_cloud("a.ply"))
    result = purify("scans", "-o", "out", "--mesh", "--force", method="onet-mesh")
    assert result.exit_code == 1
    assert "m-0001.mesh.ply would be written over" in result.output
    assert "4 of 5 files done" in result.output


def test_a_fallback_names_its_file_and_is_no_success_for_meshes(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Purifier, "trace", fallback)
    write_clouds("scans/m.npz", [read_cloud("a.ply")[:100]] * 2)
    result = purify("scans", "-o", "out", method="onet-mesh")
    assert result.exit_code == 0
    assert "warning: scans/m.npz, cloud 1: no surface, the filtered input is resampled" in result.output
    result = purify("scans", "-o", "out", "--mesh", "--force", method="onet-mesh")
    assert result.exit_code == 1
    assert "scans/m.npz, cloud 0: there is no surface, so no mesh of it was written" in result.output
    assert "3 of 4 files done" in result.output


def test_standard_input_and_output(here: Path, box_cloud: Points) -> None:
    source = (here / "a.ply").read_bytes()
    expected = purify("a.ply", "-o", "b.ply")
    assert expected.exit_code == 0
    result = purify("-", "-o", "-", "--format", "ply", stdin=source)
    assert result.exit_code == 0
    assert result.stdout_bytes == (here / "b.ply").read_bytes()
    assert "1 of 1 files done" in result.stderr
    result = purify("-", "-o", "c.npy", "--format", ".PLY", stdin=source)
    np.testing.assert_array_equal(np.load("c.npy"), read_cloud("b.ply"))
    result = purify("a.ply", "-o", "-", "--format", "csv")
    found = np.loadtxt(io.BytesIO(result.stdout_bytes), delimiter=",")
    np.testing.assert_allclose(found, read_cloud("b.ply"), atol=1e-7)
    result = purify("-", "-o", "-", "--format", "ply", stdin=source[:300])
    assert result.exit_code == 1
    assert "error: -: the file is truncated" in result.stderr
    assert result.stdout_bytes == b""


def test_options_of_reading_reach_the_reader(here: Path, box_cloud: Points) -> None:
    rows = "".join(f"{index},{z},{y},{x}\n" for index, (x, y, z) in enumerate(box_cloud[:200].tolist()))
    Path("a.csv").write_text("id,up,north,east\n" + rows)
    assert "no column x among id, up, north, east" in purify("a.csv", "-o", "b.csv").output
    assert purify("a.csv", "-o", "b.csv", "--columns", "east,north,up").exit_code == 0
    assert Path("b.csv").read_text().startswith("id,up,north,east\n")
    (known,) = read_cloud_file("a.csv", columns="east,north,up").clouds
    (found,) = read_cloud_file("b.csv", columns="east,north,up").clouds
    order = {tuple(point): index for point, index in zip(known.points, known.fields["id"], strict=True)}
    assert [order[tuple(point)] for point in found.points] == found.fields["id"].tolist()

    np.savez("a.npz", first=box_cloud[:200], second=box_cloud[:300])
    assert "--key" in purify("a.npz", "-o", "b.npz").output
    assert purify("a.npz", "-o", "b.npz", "--key", "second").exit_code == 0
    assert np.load("b.npz")["second"].shape == (300, 3)
    np.testing.assert_array_equal(np.load("b.npz")["first"], box_cloud[:200])
    result = purify("a.ply", "-o", "b.ply", "--max-points", "100")
    assert "200 points, more than the limit of 100; max_points (--max-points) raises it" in result.output


def test_coordinates_far_from_the_origin_stay_apart(here: Path, box_cloud: Points) -> None:
    far = box_cloud.astype(np.float64) + np.array([500_000.0, 5_000_000.0, 100.0])
    np.savetxt("far.txt", far, fmt="%.6f")
    assert purify("far.txt", "-o", "out.txt").exit_code == 0
    known = {tuple(point) for point in np.loadtxt("far.txt").tolist()}
    found = [tuple(point) for point in np.loadtxt("out.txt").tolist()]
    assert set(found) <= known
    assert len(set(found)) > 700


def test_the_module_is_the_command(here: Path) -> None:
    command = [sys.executable, "-m", "ifdefense", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"ifdefense, version {ifdefense.__version__}\n"


def test_a_shell_completes_methods_and_options() -> None:
    environment = {
        **os.environ,
        "_IFDEFENSE_COMPLETE": "bash_complete",
        "COMP_WORDS": "ifdefense purify --method so",
        "COMP_CWORD": "3",
    }
    script = Path(sys.executable).parent / "ifdefense"
    result = subprocess.run([script], capture_output=True, text=True, env=environment, check=True)
    assert [line.split(",")[1] for line in result.stdout.split()] == [
        name for name in METHODS if name.startswith("so")
    ]


def test_help_lists_the_methods_and_exit_codes() -> None:
    text = " ".join(CliRunner().invoke(cli.main, ["purify", "--help"]).output.split())
    assert "|".join(METHODS) in text
    assert "Exit codes: 0" in text


def test_every_option_and_format_is_documented() -> None:
    folder = Path(__file__).parent.parent / "docs"
    text, data = ((folder / name).read_text(encoding="utf-8") for name in ("cli.md", "data.md"))
    options = {name for option in cli.purify.params for name in option.opts if name.startswith("--")}
    assert [name for name in sorted(options - {"--output"}) if f"| `{name}" not in text] == []
    assert [suffix for suffix in CLOUD_SUFFIXES if f"`{suffix}`" not in data] == []
    listed = cli.purify.help or ""
    assert [suffix for suffix in CLOUD_SUFFIXES if suffix not in (".hdf5",) and suffix not in listed] == []
