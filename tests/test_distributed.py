"""`PurifyBatch` on tables, without Ray; tests/test_ray.py runs it on a cluster."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quick
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

import ifdefense
from ifdefense import cli, distributed
from ifdefense.distributed import PurifyBatch
from ifdefense.purifiers.base import Purifier

CLOUDS = quick.CLOUDS.numpy()


def ragged(clouds: list[Any]) -> NDArray[np.object_]:
    column = np.empty(len(clouds), object)
    for index, cloud in enumerate(clouds):
        column[index] = cloud
    return column


@pytest.mark.parametrize("method", ["sor", "srs", "local-mesh"])
def test_rows_get_what_purify_gives_however_they_are_split(method: str) -> None:
    purifier = quick.quick(method)
    clouds = np.concatenate([CLOUDS, CLOUDS[:, ::-1]])
    expected = ifdefense.purify(clouds, purifier, 100, seed=3)
    ids = np.array(["a", "b", "c", "d"])
    stage = PurifyBatch(copy.deepcopy(purifier), 100, 3, batch_size=2)
    whole = stage({"id": ids, "points": clouds})
    parts = [stage({"points": clouds[[row]]})["points"][0] for row in (3, 0)]
    assert whole["points"].dtype == np.float32
    np.testing.assert_array_equal(whole["points"], expected)
    np.testing.assert_array_equal(parts, expected[[3, 0]])
    assert whole["id"] is ids
    assert whole["error"].tolist() == [""] * 4


def test_a_bad_cloud_comes_back_with_its_reason_and_stops_nobody() -> None:
    bad = CLOUDS[0].copy()
    bad[7, 1] = np.nan
    flat = np.ones((40, 3), np.float32)
    clouds = ragged([CLOUDS[0], bad, flat, None, CLOUDS[1][:90], [[0.0, 1.0]], "no cloud"])
    before = copy.deepcopy(clouds)
    result = PurifyBatch("sor")({"points": clouds, "id": np.arange(7)})
    assert [bool(error) for error in result["error"]] == [False, True, True, True, False, True, True]
    for row, reason in ((1, "NaN or infinity, the first is point 7"), (2, "zero extent"), (3, "missing")):
        assert reason in result["error"][row]
        np.testing.assert_array_equal(result["points"][row], before[row])
    np.testing.assert_array_equal(result["points"][0], ifdefense.purify(CLOUDS[0], "sor"))
    np.testing.assert_array_equal(result["points"][4], ifdefense.purify(CLOUDS[1][:90], "sor"))
    for given, kept in zip(clouds[:3], before[:3], strict=True):
        np.testing.assert_array_equal(given, kept)


def test_a_crash_of_the_method_is_an_error_of_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Purifier.outcomes

    def crash(self: Purifier, clouds: list[torch.Tensor], *arguments: Any) -> Any:
        if any(len(cloud) == 90 for cloud in clouds):
            raise MemoryError
        return real(self, clouds, *arguments)

    monkeypatch.setattr(Purifier, "outcomes", crash)
    result = PurifyBatch("sor")({"points": ragged([CLOUDS[0], CLOUDS[0][:90], CLOUDS[1]])})
    assert result["error"].tolist() == ["", "there is not enough memory", ""]
    assert [len(cloud) for cloud in result["points"]] == [160, 90, 160]


def test_attributes_follow_their_points() -> None:
    rows = np.broadcast_to(np.arange(160), (2, 160))
    normals = CLOUDS[..., ::-1].copy()
    stage = PurifyBatch("sor", attributes=["row", "normals"])
    result = stage({"points": CLOUDS, "row": rows, "normals": normals})
    assert result["row"].dtype == rows.dtype and result["normals"].shape == (2, 160, 3)
    for points, row, normal, cloud in zip(
        result["points"], result["row"], result["normals"], CLOUDS, strict=True
    ):
        np.testing.assert_array_equal(points, cloud[row])
        np.testing.assert_array_equal(normal, cloud[row, ::-1])
    short = stage({"points": CLOUDS, "row": ragged([rows[0], rows[1][:9]]), "normals": normals})
    assert short["error"].tolist() == ["", "the cloud has 160 points, but 9 values of 'row'"]


def test_further_columns_of_the_cloud_and_nested_lists_are_kept() -> None:
    cloud = np.concatenate([CLOUDS[0], np.arange(160, dtype=np.float32)[:, None]], 1)
    nested = ragged([ragged(list(cloud))])  # as from a Parquet file of lists
    (result,) = PurifyBatch("sor")({"points": nested})["points"]
    assert isinstance(result, list) and result[0].dtype == np.float32
    np.testing.assert_array_equal(result, ifdefense.purify(cloud, "sor"))


def test_an_empty_batch_has_all_columns() -> None:
    result = PurifyBatch("sor")({"points": CLOUDS[:0], "id": np.arange(0)})
    assert {name: len(values) for name, values in result.items()} == {"points": 0, "id": 0, "error": 0}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "magic"}, ValueError, "unknown method 'magic'"),
        ({"seed": None}, TypeError, "seed must be an integer"),
        ({"num_points": 0}, ValueError, "num_points must be at least 1"),
        ({"up": "w"}, ValueError, "'w'"),
        ({"attributes": "normals"}, TypeError, r"names of columns, such as \['normals'\]"),
        ({"device": "nowhere"}, ValueError, "device 'nowhere' cannot be used"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PurifyBatch(**arguments)


def test_wrong_batches() -> None:
    stage = PurifyBatch("sor")
    with pytest.raises(ValueError, match="there is no column 'points' among 'cloud', 'id'"):
        stage({"cloud": CLOUDS, "id": np.arange(2)})
    with pytest.raises(TypeError, match='batch_format="numpy"'):
        stage([CLOUDS])  # type: ignore[arg-type]


def test_without_ray_the_command_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    np.save(tmp_path / "a.npy", CLOUDS[0])
    call = ["purify", str(tmp_path / "a.npy"), "-o", str(tmp_path / "b.npy"), "--method", "sor"]
    result = CliRunner().invoke(cli.main, [*call, "--ray", "local"])
    assert result.exit_code == 2
    assert "pip install 'ifdefense[ray]'" in result.output and "Traceback" not in result.output
    for more, message in (
        (["--workers", "2"], "a cluster of Ray has its own"),
        (["-o", "-", "--format", "npy"], "--ray needs files"),
    ):
        result = CliRunner().invoke(cli.main, [*call, "--ray", "local", *more])
        assert result.exit_code == 2 and message in result.output
    assert not (tmp_path / "b.npy").exists()


def test_an_address_where_nobody_listens_is_refused() -> None:
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:1: there is no cluster of Ray"):
        distributed._check_answers("127.0.0.1:1")
