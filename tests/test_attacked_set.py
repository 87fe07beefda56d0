"""Attacked clouds of known surfaces: made by the benchmarks, checked, and drawn in training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_train_local import SAMPLING, solids

import attacks
from benchmarks import attacked_set
from ifdefense.data.errors import DataError
from ifdefense.training.data.attacked_clouds import AttackedClouds
from ifdefense.training.data.surfaces import DenseSurfaces
from ifdefense.training.examples.thickened_surfaces import Surface, ThickenedSampler

DELTA = 0.1
SHORT = {"pgd": (1, attacks.PGD, {"norm": "linf", "delta": DELTA, "iterations": 2})}


def made(out: Path, clouds: int, monkeypatch: pytest.MonkeyPatch, *options: str) -> AttackedClouds:
    """Balls and boxes, attacked by a short PGD."""
    monkeypatch.setattr(attacked_set, "collect", lambda *_: solids())
    for name, value in {"ATTACKS": SHORT, "CHUNK": 4, "POINTS": 96, "HELD": 0.5}.items():
        monkeypatch.setattr(attacked_set, name, value)
    arguments = ["--mix", "meshes", "--victim", "pointnet-procedural", "--clouds", str(clouds)]
    result = CliRunner().invoke(
        attacked_set.attacked_set, [*arguments, "--out", str(out), *options], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return AttackedClouds.load(out)


@pytest.fixture(scope="module")
def clouds(tmp_path_factory: pytest.TempPathFactory) -> AttackedClouds:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return made(tmp_path_factory.mktemp("attacked") / "set.npz", 16, monkeypatch)


def saved(clouds: AttackedClouds, path: Path, **changes: Any) -> Path:
    arrays = {field.name: getattr(clouds, field.name) for field in dataclasses.fields(clouds)}
    np.savez(path, **{name: value for name, value in (arrays | changes).items() if value is not None})
    return path


def test_clouds_lie_about_their_surfaces_within_the_budget(clouds: AttackedClouds) -> None:
    """The frame of the surface: a shift of at most 0.1 in the unit sphere, whose radius is below 1 there."""
    surfaces = {"meshes": solids()}
    clouds.check(surfaces)
    assert len(clouds) == 16 and 0 < clouds.held(surfaces).sum() < 16
    for row in range(len(clouds)):
        cloud, points, normals = clouds.pair(row, surfaces)
        assert cloud.shape == (96, 3)
        distance = Surface(points, normals, 0.05).distances(cloud)
        assert distance.max() < np.sqrt(3) * DELTA
        assert np.median(distance) > 0.005


def test_more_clouds_go_on_from_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = made(tmp_path / "set.npz", 4, monkeypatch)
    calls = []
    original = attacked_set._attacked
    monkeypatch.setattr(attacked_set, "_attacked", lambda *args: calls.append(1) or original(*args))
    more = made(tmp_path / "set.npz", 8, monkeypatch)
    assert len(calls) == 1 and len(more) == 8
    np.testing.assert_array_equal(more.points[: len(some.points)], some.points)


def test_training_draws_attacked_clouds_and_validates_on_held_out_ones(
    clouds: AttackedClouds, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {"meshes": solids()}
    plain = ThickenedSampler(sources, SAMPLING)
    only = ThickenedSampler(sources, SAMPLING, attacked=clouds, attacked_share=1.0)
    assert plain.describe().keys() < only.describe().keys()
    assert set(plain.validation(2, 64)) == {"clean", "corrupted"}
    seen: list[int] = []
    original = AttackedClouds.pair
    monkeypatch.setattr(
        AttackedClouds, "pair", lambda self, row, *rest: seen.append(row) or original(self, row, *rest)
    )
    given, queries, labels = only.draw(torch.Generator().manual_seed(0))
    assert given.shape == (4, 64, 3) and queries.shape == (4, 64, 3) and labels.shape == (4, 64)
    assert (labels > 0.5).any() and (labels < 0.5).any()
    assert torch.equal(given, only.draw(torch.Generator().manual_seed(0))[0])
    held = clouds.held(sources)
    assert len(seen) == 8 and not held[seen].any()
    seen.clear()
    assert sum(len(batch[0]) for batch in only.validation(3, 64)["attacked"]) == 3
    assert len(seen) == 3 and held[seen].all()


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_is_needed_with_attacked_clouds(clouds: AttackedClouds, share: float) -> None:
    with pytest.raises(ValueError, match="attacked_share"):
        ThickenedSampler({"meshes": solids()}, SAMPLING, attacked=clouds, attacked_share=share)


def test_other_surfaces_are_refused(clouds: AttackedClouds) -> None:
    other = solids()
    changed = DenseSurfaces(other.points[::-1].copy(), other.normals, other.labels, other.held)
    with pytest.raises(DataError, match="made of other surfaces meshes"):
        clouds.check({"meshes": changed})
    with pytest.raises(DataError, match="need the surfaces meshes"):
        clouds.check({"furniture": other})


def test_files_that_hold_something_else_are_refused(clouds: AttackedClouds, tmp_path: Path) -> None:
    path = tmp_path / "wrong.npz"
    path.write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"wrong\.npz holds no attacked clouds"):
        AttackedClouds.load(path)
    with pytest.raises(DataError, match="holds no attacked clouds"):
        AttackedClouds.load(saved(clouds, path, rotation=None))
    with pytest.raises(DataError, match="do not belong together"):
        AttackedClouds.load(saved(clouds, path, index=clouds.index[:-1]))
