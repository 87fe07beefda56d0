"""The command line through its entry point, on real files."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from ifdefense import cli
from ifdefense.data.formats import (
    files,
    read_cloud,
    read_clouds,
    read_mesh,
    write_cloud,
    write_clouds,
    write_mesh,
)
from ifdefense.geometry.mesh import Mesh

Points = NDArray[np.float32]
TETRAHEDRON = Mesh(
    np.float32([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    np.int64([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]),
)


def call(*arguments: object) -> Result:
    (entry,) = entry_points(group="console_scripts", name="ifdefense")
    return CliRunner().invoke(entry.load(), [str(argument) for argument in arguments])


def purify(*arguments: object) -> Result:
    return call("purify", "--method", "sor", *arguments)


FAULTS = """
import resource, sys
from ifdefense.console import use_huge_pages
if sys.argv[1] == "huge":
    use_huge_pages()
import torch
torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    """Page faults of filling 64 MiB."""
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, "-c", FAULTS, mode]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(run.stdout)


def test_huge_pages_leave_few_page_faults() -> None:
    state = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not state.is_file() or "[madvise]" not in state.read_text():
        pytest.skip("Linux has no huge pages on request here")
    assert page_faults("huge") < page_faults("plain") / 10


def test_installed_script_answers() -> None:
    script = Path(sys.executable).parent / "ifdefense"
    result = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert all(command in result.stdout for command in ("purify", "train", "info"))


def test_info_names_versions_methods_and_weights() -> None:
    result = call("info")
    assert result.exit_code == 0
    assert all(word in result.output for word in ("torch", "device", *cli.METHODS, "weights onet"))


def test_train_imports_its_command_when_it_is_called() -> None:
    assert "onet" in call("train", "--help").output
    assert "--steps" in call("train", "onet", "--help").output


@pytest.mark.parametrize(
    "suffix", [".ply", ".off", ".obj", ".xyz", ".txt", ".npy", ".npz", ".h5", ".pcd", ".glb"]
)
def test_purify_writes_the_format_it_read(suffix: str, tmp_path: Path, box_cloud: Points) -> None:
    # The last three points lie so far out that they must go.
    cloud = np.concatenate([box_cloud[:1021], 3 + np.eye(3, dtype=np.float32)])
    source, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    write_cloud(source, cloud)
    before = source.read_bytes()
    result = purify(source, "-o", target)
    assert result.exit_code == 0, result.output
    purified = read_cloud(target)
    assert purified.shape == (1024, 3)
    known = {tuple(point) for point in cloud[:1021].tolist()}
    assert {tuple(point) for point in purified.astype(np.float32).tolist()} <= known
    assert source.read_bytes() == before


def test_purify_samples_a_mesh(tmp_path: Path) -> None:
    write_mesh(tmp_path / "solid.stl", TETRAHEDRON)
    assert purify(tmp_path / "solid.stl", "-o", tmp_path / "out", "--num-points", 200).exit_code == 0
    points = read_cloud(tmp_path / "out" / "solid.ply")
    assert points.shape == (200, 3)
    on_a_face = np.minimum(np.abs(points).min(axis=1), np.abs(points.sum(axis=1) - 1))
    assert on_a_face.max() < 1e-5


def test_purify_keeps_the_tree_of_a_folder_and_every_cloud_of_a_file(
    tmp_path: Path, box_cloud: Points, sphere_cloud: Points
) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    write_cloud(tmp_path / "in" / "one.ply", box_cloud)
    write_clouds(tmp_path / "in" / "sub" / "many.npz", [box_cloud, sphere_cloud, 2 * box_cloud])
    assert purify(tmp_path / "in", "-o", tmp_path / "out", "--num-points", 64).exit_code == 0
    assert len(read_cloud(tmp_path / "out" / "one.ply")) == 64
    many = read_clouds(tmp_path / "out" / "sub" / "many.npz")
    assert [cloud.shape for cloud in many] == [(64, 3)] * 3
    assert np.allclose(np.linalg.norm(many[1], axis=1), 0.5, atol=1e-5)


def test_results_do_not_depend_on_the_other_files(
    tmp_path: Path, box_cloud: Points, table_cloud: Points
) -> None:
    write_cloud(tmp_path / "a.npy", box_cloud)
    write_cloud(tmp_path / "b.npy", table_cloud)
    assert purify(tmp_path / "a.npy", tmp_path / "b.npy", "-o", tmp_path / "both", "--seed", 3).exit_code == 0
    assert purify(tmp_path / "b.npy", "-o", tmp_path / "alone.npy", "--seed", 3).exit_code == 0
    assert np.array_equal(read_cloud(tmp_path / "both" / "b.npy"), read_cloud(tmp_path / "alone.npy"))


def test_one_bad_file_is_reported_and_the_rest_are_done(tmp_path: Path, box_cloud: Points) -> None:
    write_cloud(tmp_path / "good.ply", box_cloud)
    write_cloud(tmp_path / "flat.npy", np.ones((100, 3), np.float32))
    (tmp_path / "cut.ply").write_bytes((tmp_path / "good.ply").read_bytes()[:400])
    sources = [tmp_path / name for name in ("cut.ply", "flat.npy", "good.ply", "missing.xyz")]
    result = purify(*sources, "-o", tmp_path / "out")
    assert result.exit_code == 1
    for bad, reason in (
        ("cut.ply", "truncated"),
        ("flat.npy", "zero extent"),
        ("missing.xyz", "no such file"),
    ):
        assert any(bad in line and reason in line for line in result.output.splitlines()), result.output
    assert "1 of 4 files done" in result.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.ply"]


def test_nothing_is_written_over_unless_forced(tmp_path: Path, box_cloud: Points) -> None:
    source, target = tmp_path / "in.ply", tmp_path / "out.ply"
    write_cloud(source, box_cloud)
    target.write_text("precious")
    result = purify(source, "-o", target)
    assert result.exit_code == 1
    assert "out.ply exists already" in result.output
    assert target.read_text() == "precious"
    assert purify(source, "-o", target, "--force").exit_code == 0
    assert len(read_cloud(target)) == 1024

    report = tmp_path / "page.html"
    report.write_text("precious")
    result = purify(source, "-o", tmp_path / "other.ply", "--report", report)
    assert result.exit_code == 2
    assert report.read_text() == "precious"
    assert not (tmp_path / "other.ply").exists()


def test_nothing_half_written_stays_behind(
    tmp_path: Path, box_cloud: Points, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out_of_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_cloud(tmp_path / "in.ply", box_cloud)
    monkeypatch.setattr(files.os, "fsync", run_out_of_space)
    result = purify(tmp_path / "in.ply", "-o", tmp_path / "out/", "--force")
    assert result.exit_code == 1
    assert "in.ply: it could not be written: No space left" in result.output
    assert "0 of 1 files done. With more space, the same command starts again" in result.output
    assert list((tmp_path / "out").iterdir()) == []


def test_a_subfolder_that_cannot_be_made_is_told_like_a_file_that_cannot_be_written(
    tmp_path: Path, box_cloud: Points, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    (tmp_path / "scans" / "sub").mkdir(parents=True)
    write_cloud(tmp_path / "scans" / "sub" / "in.ply", box_cloud)
    monkeypatch.setattr(Path, "mkdir", refuse)
    result = purify(tmp_path / "scans", "-o", tmp_path / "out")
    assert result.exit_code == 1
    target = tmp_path / "out" / "sub" / "in.ply"
    assert f"{target}: it could not be written: Read-only file system\n" in result.output
    assert "Errno" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["empty", "-o", "out"], "no point clouds in this folder"),
        (["a.ply", "a.stl", "-o", "out"], "would both be written to"),
        (["a.ply", "b.ply", "-o", "a.ply"], "several results need a folder"),
        (["many.npz", "-o", "many.ply"], "cannot hold 2 clouds"),
        (["a.ply", "-o", "out", "--num-points", "0"], "0 is not in the range"),
        (["a.ply", "-o", "out", "--method", "magic"], "unknown method 'magic'"),
        (["a.ply", "-o", "out", "--method", "local-newton"], "no longer a method: use local-mesh"),
        (["a.ply", "-o", "out", "--device", "nowhere"], "nowhere"),
    ],
)
def test_errors(
    arguments: list[str], message: str, tmp_path: Path, box_cloud: Points, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("a.ply", "b.ply"):
        write_cloud(tmp_path / name, box_cloud)
    write_mesh(tmp_path / "a.stl", TETRAHEDRON)
    write_clouds(tmp_path / "many.npz", [box_cloud, box_cloud])
    result = purify(*arguments)
    assert result.exit_code in (1, 2)
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_surface_of_the_default_method_is_written_and_shown(tmp_path: Path, table_cloud: Points) -> None:
    utm = np.array([500_000.0, 5_000_000.0, 100.0])  # where float32 has steps of 0.5
    write_cloud(tmp_path / "table.ply", table_cloud + utm)
    page = tmp_path / "pages" / "report.html"
    result = call("purify", tmp_path / "table.ply", "-o", tmp_path / "out", "--mesh", "--report", page)
    assert result.exit_code == 0, result.output
    mesh, points = read_mesh(tmp_path / "out" / "table.mesh.ply"), read_cloud(tmp_path / "out" / "table.ply")
    assert mesh.is_watertight
    assert np.abs(mesh.vertices - utm).max() < 0.6
    assert len(np.unique(mesh.vertices[:, 1])) > 100
    assert len(np.unique(points, axis=0)) > 800
    assert points.shape == (1024, 3)
    assert "table" in page.read_text()


def test_lazy_group_lists_commands_without_importing_them() -> None:
    group = cli.LazyGroup("tools", lazy={"far": ("no.such.module:command", "Never imported here.")})
    result = CliRunner().invoke(group, ["--help"])
    assert result.exit_code == 0
    assert "Never imported here." in result.output
    with pytest.raises(ModuleNotFoundError, match="no"):
        group.get_command(click.Context(group), "far")


def test_info_has_one_line_per_weight_and_the_card_of_one() -> None:
    lines = call("info").output.splitlines()
    assert len(lines) < 60
    assert sum(line.startswith("weights punet (1.6 MB): PU-Net of") for line in lines) == 1
    assert call("info", "punet").output.startswith("# punet")
    result = call("info", "punett")
    assert result.exit_code == 2 and "unknown weights 'punett' (did you mean 'punet'?)" in result.output


def test_the_list_of_commands_is_not_cut_off() -> None:
    listed = call("--help").output
    assert "Lists, describes or fetches data sets." in listed
    assert "Purifies point clouds in files and folders." in listed
