"""Files of attacked clouds: written, read, checked; and those of IF-Defense."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from benchmarks.attacked_clouds import AttackedFile, make_attacked, read_attacked, write_attacked
from benchmarks.cli import main
from benchmarks.clouds import load_clouds
from benchmarks.foreign import victim_of
from ifdefense.data import DataError

VICTIM = f"{__name__}:Extents"


class Extents(nn.Module):
    """A linear classifier of mean squares, fast and easy to fool."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, points: Tensor) -> Tensor:
        return 10 * points.square().mean(1) @ self.weight


@pytest.fixture(scope="module")
def made() -> AttackedFile:
    return make_attacked(victim_of(Extents), "fgm", clouds=6, seed=1)


def test_the_file_has_what_was_attacked_and_how(made: AttackedFile, tmp_path: Path) -> None:
    clean = load_clouds(clouds=6, seed=1)
    write_attacked(tmp_path / "a.npz", made)
    found = read_attacked(tmp_path / "a.npz")
    assert found.clouds.name == "a.npz" and found.clouds.classes == clean.classes
    assert torch.equal(found.clouds.points, made.clouds.points)
    assert not torch.equal(found.clouds.points, clean.points)
    assert torch.equal(found.clouds.labels, clean.labels) and torch.equal(found.clouds.targets, clean.targets)
    # FGM is targeted, and its success is that on the victim.
    with torch.no_grad():
        reached = Extents()(found.clouds.points).argmax(1) == clean.targets
    assert found.success is not None and torch.equal(found.success, reached)
    about = found.about
    assert about["attack"] == "fgm" and about["settings"].startswith("FGM(") and about["targeted"]
    assert about["success"] == round(100 * reached.float().mean().item(), 2)
    assert about["victim"] == {"title": "Extents", "weights": victim_of(Extents).weights}
    assert about["data"] == {"name": "procedural", "clouds": 6, "seed": 1, "digest": clean.digest()}
    assert {"ifdefense", "torch"} <= about["versions"].keys()


def test_an_existing_file_is_replaced_only_on_demand(made: AttackedFile, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_attacked(path, made)
    with pytest.raises(DataError, match=r"a\.npz: it exists already"):
        write_attacked(path, made)
    write_attacked(path, made, force=True)
    assert [each.name for each in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize(
    "damage", ["points", "labels", "description", "format", "truncated", "other", "gone"]
)
def test_damaged_files_are_refused(damage: str, made: AttackedFile, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_attacked(path, made)
    with np.load(path) as file:
        arrays = dict(file)
    about = json.loads(str(arrays["about"]))
    message = "its arrays differ from those that were written"
    if damage == "points":
        arrays["points"][0, 0, 0] += 1e-3
    elif damage == "labels":
        arrays["label"][0] = (arrays["label"][0] + 1) % 16
    elif damage == "description":
        arrays["about"], message = np.array("{"), "its description is damaged"
    elif damage == "format":
        arrays["about"], message = (
            np.array(json.dumps(about | {"format": 9})),
            "its format is 9, this version",
        )
    elif damage == "other":
        arrays, message = {"clouds": arrays["points"]}, "points or .* missing; it holds clouds"
    np.savez(path, **arrays)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        message = r"a\.npz"
    elif damage == "gone":
        path.unlink()
        message = r"a\.npz: there is no such file"
    with pytest.raises(DataError, match=message):
        read_attacked(path)


@pytest.mark.parametrize(("size", "targeted"), [(1536, True), (824, False)])
def test_files_of_if_defense_are_read_whole(size: int, targeted: bool, tmp_path: Path) -> None:
    """Add-CD has 512 more points, Drop-200 has 200 fewer; y is up; attacked clouds keep their frame."""
    rng = np.random.default_rng(0)
    points = rng.uniform(-0.8, 0.9, (4, size, 3)).astype(np.float32)
    arrays = {"test_pc": points, "test_label": np.int64([0, 7, 39, 3])}
    if targeted:
        arrays["target_label"] = np.int64([1, 2, 3, 4])
    np.savez(tmp_path / "theirs.npz", **arrays)
    found = read_attacked(tmp_path / "theirs.npz")
    expected = np.stack([points[..., 0], -points[..., 2], points[..., 1]], -1)
    assert torch.equal(found.clouds.points, torch.from_numpy(expected))
    assert found.clouds.labels.tolist() == [0, 7, 39, 3] and len(found.clouds.classes) == 40
    if targeted:
        assert found.clouds.targets.tolist() == [1, 2, 3, 4]
    assert (found.clouds.targets != found.clouds.labels).all()
    assert found.success is None and found.about == {}


def test_files_of_your_own_attack_need_points_and_labels_alone(tmp_path: Path) -> None:
    """They are neither turned nor normalised nor cut to a number of points."""
    points = np.random.default_rng(0).uniform(-0.8, 0.9, (4, 40, 3)).astype(np.float32)
    labels = np.int64([0, 2, 1, 3])
    np.savez(tmp_path / "mine.npz", points=points, label=labels, success=[1, 0, 0, 1])
    found = read_attacked(tmp_path / "mine.npz")
    assert torch.equal(found.clouds.points, torch.from_numpy(points))
    assert found.clouds.labels.tolist() == labels.tolist() and found.clouds.classes == ("0", "1", "2", "3")
    assert found.success is not None and found.success.tolist() == [True, False, False, True]
    np.savez(tmp_path / "short.npz", points=points, label=labels, success=[1, 0])
    with pytest.raises(DataError, match=r"short\.npz: success must be \(4,\), one a cloud, got 2"):
        read_attacked(tmp_path / "short.npz")


def run(path: Path, *arguments: str) -> Result:
    command = ["attacked", "--out", str(path / "a.npz"), "--store", str(path / "store"), "--clouds", "4"]
    return CliRunner().invoke(main, [*command, "--victim", VICTIM, *arguments])


def test_the_command_writes_a_file_and_resumes(tmp_path: Path) -> None:
    result = run(tmp_path, "--attack", "fgm")
    assert result.exit_code == 0, result.output
    assert "4 clouds in" in result.output and "with Extents" in result.output
    first = read_attacked(tmp_path / "a.npz")
    assert len(first.clouds) == 4 and first.about["victim"]["title"] == "Extents"
    assert len(list((tmp_path / "store").rglob("*.npz"))) == 1
    again = run(tmp_path, "--attack", "fgm")
    assert again.exit_code == 2 and "exists already; --force replaces it" in again.output
    assert run(tmp_path, "--attack", "fgm", "--force").exit_code == 0
    assert torch.equal(read_attacked(tmp_path / "a.npz").clouds.points, first.clouds.points)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attack", "pdg"], "unknown attack 'pdg' (did you mean 'pgd'?)"),
        (["--victim", "pointnet-modelnet40"], "distinguishes 40 classes, procedural has 16"),
        (["--victim", "nothing"], "unknown victim 'nothing'"),
        (["--data", "nowhere"], "there is no data set, file or folder 'nowhere'"),
        (["--out", "a.txt"], "attacked clouds are written as .npz"),
    ],
)
def test_an_invalid_call_is_one_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run(tmp_path, *arguments)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")
    assert not (tmp_path / "a.npz").exists()
