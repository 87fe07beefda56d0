"""The catalogue of data sets, the command ``ifdefense data``, and what is said of a missing data set."""

from __future__ import annotations

import functools
import http.server
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trimesh
from click.testing import CliRunner, Result

from benchmarks.cli import main as bench
from benchmarks.clouds import load_clouds
from ifdefense.cli import main
from ifdefense.data import DataError, fetching, load_modelnet40, load_part
from ifdefense.data.catalogue import CATALOGUE
from ifdefense.data.layouts import LAYOUTS

CLASSES = ("bathtub", "bed")
MISSING = "`ifdefense data modelnet40` says how to get it"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["data", *map(str, arguments)])


def test_every_data_set_is_listed_with_source_licence_size_and_layout() -> None:
    result = run()
    assert result.exit_code == 0
    for name, entry in CATALOGUE.items():
        for text in (f"{name}: ", entry.source, entry.licence, entry.size, entry.layout):
            assert text in result.output
        assert (entry.fetched is None) == bool(entry.instructions)
    assert len(LAYOUTS) > len(CATALOGUE) >= 5


def test_a_data_set_is_described_with_how_to_get_it() -> None:
    result = run("scanobjectnn")
    assert result.exit_code == 0
    assert "accept the terms" in result.output and "DIR/scanobjectnn has main_split/" in result.output
    assert "modelnet" not in result.output
    assert "ifdefense data modelnet40 --root DIR" in run("modelnet40").output


def test_unknown_names_get_the_nearest_match() -> None:
    result = run("modelnt40")
    assert result.exit_code == 2
    assert "unknown data set 'modelnt40' (did you mean 'modelnet40'?)" in result.output
    assert run("--root", "x").exit_code == 2


def test_what_may_not_be_fetched_is_refused_with_its_instructions(tmp_path: Path) -> None:
    result = run("scanobjectnn", "--root", tmp_path)
    assert result.exit_code == 1
    assert "scanobjectnn cannot be fetched: accept the terms on its page" in result.output
    assert f"{tmp_path / 'scanobjectnn'} has main_split/" in result.output
    assert not any(tmp_path.iterdir())


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder served on the loopback interface in place of ModelNet's site, with a miniature ModelNet40."""
    datasets = pytest.importorskip("torch_geometric.datasets", reason="PyTorch Geometric is not installed")
    folder = tmp_path / "served"
    folder.mkdir()
    with zipfile.ZipFile(folder / "ModelNet40.zip", "w") as archive:
        for name, side in zip(CLASSES, (1.0, 2.0), strict=True):
            for part, numbers in (("train", (1, 2, 3)), ("test", (4,))):
                for number in numbers:
                    box = trimesh.creation.box((side, side, number * side))
                    text = box.export(file_type="off")
                    archive.writestr(f"ModelNet40/{name}/{part}/{name}_{number:04d}.off", text)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    except OSError as error:
        pytest.skip(f"no sockets here: {error}")
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetching, "TIMEOUT", 5.0)
    address = f"http://127.0.0.1:{server.server_port}/ModelNet40.zip"
    monkeypatch.setattr(datasets.ModelNet, "urls", {"40": address})
    yield folder
    server.shutdown()
    server.server_close()


@pytest.mark.timeout(60)
def test_modelnet40_is_fetched_and_sampled(served: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    result = run("modelnet40", "--root", root)
    assert result.exit_code == 0, result.output
    assert f"set IFDEFENSE_DATA to {root}" in result.output
    assert [path.name for path in root.iterdir()] == ["modelnet40"]  # nothing of the download is left
    train, test = (load_part(root / "modelnet40", part) for part in ("train", "test"))
    assert train.classes == CLASSES and train.up == "z"
    assert train.names.tolist() == [f"{name}_000{number}" for name in CLASSES for number in (1, 2, 3)]
    assert test.names.tolist() == ["bathtub_0004", "bed_0004"] and test.labels.tolist() == [0, 1]
    assert train.points.shape == (6, 1024, 3)
    np.testing.assert_allclose(np.linalg.norm(train.points, axis=2).max(1), 1, atol=1e-4)
    # A column three times as high as wide: uniform by area, 2 of 14 points are on its ends.
    column = train.points[2]
    np.testing.assert_allclose(np.ptp(column[:, 2]) / np.ptp(column[:, :2], axis=0), 3, rtol=0.03)
    ends = np.minimum(column[:, 2].max() - column[:, 2], column[:, 2] - column[:, 2].min()) < 1e-3
    assert 0.11 < ends.mean() < 0.18
    assert len(load_modelnet40(root, "validation")) == 2
    again = run("modelnet40", "--root", root)
    assert again.exit_code == 1 and "exists already: remove it to fetch modelnet40 again" in again.output


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", ["missing", "no archive"])
def test_a_failed_download_is_one_line_and_leaves_nothing(served: Path, tmp_path: Path, damage: str) -> None:
    archive = served / "ModelNet40.zip"
    if damage == "missing":
        archive.unlink()
    else:
        archive.write_bytes(b"<html>moved</html>")
    result = run("modelnet40", "--root", tmp_path / "data")
    assert result.exit_code == 1
    assert result.output.startswith("Error: modelnet40 could not be fetched from https://modelnet.cs.princet")
    assert result.output.count("\n") == 1
    assert not any((tmp_path / "data").iterdir())


def test_a_missing_data_set_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IFDEFENSE_DATA", raising=False)
    for root in (None, tmp_path, tmp_path / "nowhere"):
        for load in (lambda root: load_modelnet40(root), lambda root: load_clouds("modelnet40", root=root)):
            with pytest.raises(DataError, match=MISSING):
                load(root)
    with pytest.raises(DataError, match="`ifdefense data scanobjectnn` says"):
        load_clouds("scanobjectnn", root=tmp_path)


@pytest.mark.parametrize("program", ["train", "bench"])
def test_a_missing_data_set_is_one_line_of_a_command(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IFDEFENSE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    group, arguments = {
        "train": (main, ["train", "autoencoder", "--run", "run"]),
        "bench": (bench, ["purified-set", "--out", "out.npz"]),
    }[program]
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 1
    errors = [line for line in result.output.splitlines() if MISSING in line]
    assert len(errors) == 1 and errors[0].startswith("Error: ")
    assert "Traceback" not in result.output
