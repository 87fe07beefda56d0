"""Input kinds are preserved, and errors name the cloud."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import ifdefense
from ifdefense import clouds, purify
from ifdefense.clouds import Unpacked, unpack

CLOUD = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, ">f4"])
def test_arrays_of_any_real_type_become_float_tensors(dtype: object) -> None:
    values = (CLOUD * 100).astype(dtype)  # type: ignore[call-overload]
    (cloud,) = unpack(values).clouds
    assert cloud.is_floating_point()
    np.testing.assert_array_equal(cloud.double().numpy(), values.astype(np.float64))


def test_each_kind_comes_back_as_it_was() -> None:
    batch = np.stack([CLOUD, CLOUD + 1])
    tensor = torch.from_numpy(batch)
    assert isinstance(unpack(CLOUD).pack(unpack(CLOUD).clouds), np.ndarray)
    for kind in (CLOUD, batch, torch.from_numpy(CLOUD), tensor):
        unpacked = unpack(kind)
        back = unpacked.pack(unpacked.clouds)
        assert type(back) is type(kind) and back.shape == kind.shape and back.dtype == kind.dtype
    mixed = unpack([CLOUD, CLOUD[:20]])
    assert [cloud.shape for cloud in mixed.pack(mixed.clouds)] == [(40, 3), (20, 3)]


def test_unpacked_clouds_are_taken_as_they_are() -> None:
    unpacked = unpack([CLOUD, CLOUD[:20].astype(np.float64)])
    assert unpack(unpacked) is unpacked
    both = Unpacked.of([unpack(CLOUD), unpacked])
    first, (second, third) = both.pack(both.clouds)
    for one, expected in ((first, CLOUD), (second, CLOUD), (third, CLOUD[:20].astype(np.float64))):
        assert isinstance(one, np.ndarray) and one.dtype == expected.dtype
        np.testing.assert_array_equal(one, expected)


def test_every_cloud_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    check = clouds.cloud_of
    monkeypatch.setattr(clouds, "cloud_of", lambda values, name: checked.append(name) or check(values, name))
    for method in ("sor", ifdefense.load("sor")):
        purify([CLOUD, CLOUD + 1], method)
        assert checked == ["cloud 0", "cloud 1"]
        checked.clear()


def test_the_caller_s_array_is_not_shared_when_it_is_read_backwards() -> None:
    reverse = CLOUD[::-1]
    (cloud,) = unpack(reverse).clouds
    np.testing.assert_array_equal(cloud.numpy(), reverse)


def test_nested_lists_come_back_as_such() -> None:
    for kind in (CLOUD.tolist(), tuple(map(tuple, CLOUD.tolist())), [CLOUD.tolist(), CLOUD.tolist()[:20]]):
        unpacked = unpack(kind)
        back = unpacked.pack(unpacked.clouds)
        assert isinstance(back, list) and back == [list(row) if len(row) == 3 else row for row in kind]
    (cloud,) = unpack([CLOUD.tolist()]).clouds
    assert cloud.shape == (40, 3) and cloud.dtype == torch.float64


@pytest.mark.parametrize("dtype", [">f4", np.longdouble, np.float16])
def test_floating_point_types_of_numpy_come_back(dtype: object) -> None:
    values = CLOUD.astype(dtype)  # type: ignore[call-overload]
    unpacked = unpack(values)
    back = unpacked.pack(unpacked.clouds)
    assert back.dtype == values.dtype
    np.testing.assert_array_equal(back, values)


def test_integers_are_exact() -> None:
    millimetres = np.int64(CLOUD * 1000) + 4_500_000_000
    for values in (millimetres, millimetres.astype(np.uint64), torch.from_numpy(millimetres)):
        unpacked = unpack(values)
        back = unpacked.pack(unpacked.clouds)
        assert str(back.dtype).endswith("float64")
        np.testing.assert_array_equal(np.asarray(back).astype(np.int64), millimetres)


def test_nothing_masked_and_read_only_arrays_are_fine(recwarn: pytest.WarningsRecorder) -> None:
    fixed = CLOUD.copy()
    fixed.flags.writeable = False
    for values in (np.ma.array(CLOUD), fixed, np.asmatrix(CLOUD)):
        np.testing.assert_array_equal(unpack(values).clouds[0].numpy(), CLOUD)
    assert not [warning for warning in recwarn if "writ" in str(warning.message)]


# Attributes


def with_columns(cloud: np.ndarray) -> np.ndarray:
    """A cloud whose further columns are its row and minus its first coordinate."""
    row = np.arange(len(cloud), dtype=cloud.dtype)[:, None]
    return np.concatenate([cloud, row, -cloud[:, :1]], axis=1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_points_that_are_kept_keep_their_attributes(dtype: type, sphere_cloud: np.ndarray) -> None:
    # At 4.5e9 float64 resolves a millionth; what is kept comes back bit by bit.
    shift = 4.5e9 if dtype is np.float64 else 0.0
    full = with_columns(sphere_cloud.astype(dtype) + dtype(shift))
    row_of = {tuple(row[:3]): row for row in full}
    for clean in (
        purify(full, "sor", 300),
        purify(torch.from_numpy(full)[None], "srs", 300)[0].numpy(),
        purify([full, full[:100]], "srs", 300)[0],
    ):
        assert clean.shape == (300, 5) and clean.dtype == dtype
        for row in clean:
            np.testing.assert_array_equal(row, row_of[tuple(row[:3])])


def test_new_points_take_the_attributes_of_the_nearest(sphere_cloud: np.ndarray) -> None:
    full = with_columns(sphere_cloud.astype(np.float64) * 7 + 1e6)
    clean = purify(full, "sor-smooth")
    assert not {tuple(row) for row in clean[:, :3]} & {tuple(row) for row in full[:, :3]}
    distance = np.linalg.norm(clean[:, None, :3] - full[None, :, :3], axis=2)
    chosen = clean[:, 3].astype(int)
    np.testing.assert_array_equal(distance[np.arange(len(clean)), chosen], distance.min(1))
    np.testing.assert_array_equal(clean[:, 4], full[chosen, 4])


def test_attributes_do_not_change_the_points_and_may_be_anything(sphere_cloud: np.ndarray) -> None:
    full = np.concatenate([sphere_cloud, np.full((1024, 1), np.nan, np.float32)], axis=1)
    clean = purify(full, "sor-smooth", seed=3)
    np.testing.assert_array_equal(clean[:, :3], purify(sphere_cloud, "sor-smooth", seed=3))
    assert np.isnan(clean[:, 3]).all()


def test_copies_of_a_point_keep_their_own_attributes_exactly(sphere_cloud: np.ndarray) -> None:
    full = torch.from_numpy(with_columns(np.concatenate([sphere_cloud, sphere_cloud])))
    (outcome,) = ifdefense.load("srs").outcomes([full[:, :3]], 200)
    clean = ifdefense.load("srs")(full, 200)
    assert outcome.index is not None and torch.equal(clean, full[outcome.index])


def test_gradients_pass_to_the_attributes(sphere_cloud: np.ndarray) -> None:
    full = torch.from_numpy(with_columns(sphere_cloud)).requires_grad_()
    clean = ifdefense.load("sor")(full, 100)
    clean[:, 4].sum().backward()
    assert full.grad is not None and full.grad[:, 4].sum() == 100 and full.grad[:, :4].abs().sum() == 0


BAD = {
    "shape": (CLOUD[:, :2], ValueError, r"expected a cloud \(N, 3\).*\(40, 2\)"),
    "four axes": (CLOUD[None, None], ValueError, r"\(1, 1, 40, 3\)"),
    "empty list": ([], ValueError, "there are no clouds"),
    "empty batch": (np.zeros((0, 40, 3)), ValueError, "there are no clouds"),
    "no points": (np.zeros((0, 3)), ValueError, "the cloud has 0 distinct points"),
    "NaN": (
        [CLOUD, np.where(CLOUD[7] == CLOUD, np.nan, CLOUD)],
        ValueError,
        "cloud 1 has 1 points with NaN.*point 7",
    ),
    "infinity": (np.stack([CLOUD, CLOUD + np.inf]), ValueError, "cloud 1 has 40 points with NaN or infinity"),
    "few points": (CLOUD[:15], ValueError, "the cloud has 15 distinct points, at least 16"),
    "duplicates": (np.repeat(CLOUD[:9], 50, axis=0), ValueError, "9 distinct points"),
    "zero extent": (np.ones((2, 64, 3)), ValueError, "cloud 0 has zero extent"),
    "complex": (CLOUD.astype(np.complex64), TypeError, "the cloud has dtype complex64"),
    "bool": (torch.ones(20, 3, dtype=torch.bool), TypeError, "dtype torch.bool"),
    "text": ("chair.ply", TypeError, "got str; ifdefense.data.read_cloud reads a file"),
    "one point": ([[1.0, 2.0, 3.0]], ValueError, "the cloud has 1 distinct points"),
    "list of points": ([CLOUD[0], CLOUD[1]], ValueError, r"cloud 0 must have shape \(N, 3\)"),
    "list of names": (["chair.ply"], TypeError, "cloud 0 is a str"),
    "uneven rows": ([[1.0, 2.0, 3.0], [1.0, 2.0]], ValueError, "the cloud has rows of different lengths"),
    "text in rows": ([["1", "2", "3"]] * 20, TypeError, "the cloud has dtype <U1"),
    "member shape": ([CLOUD, CLOUD[:, :2]], ValueError, r"cloud 1 must have shape \(N, 3\)"),
    "transposed": (CLOUD.T, ValueError, r"3 distinct points.*the layout is \(N, 3\), a row per point"),
    "no axes": (np.zeros(()), ValueError, r"an array of shape \(\)"),
    "object array": (CLOUD.astype(object), TypeError, "dtype object.*sizes as a list"),
    "masked": (
        np.ma.array(CLOUD, mask=CLOUD > 2),
        ValueError,
        "the cloud has [1-9][0-9]* masked values",
    ),
    "large integers": (np.int64(CLOUD * 100) + 2**60, ValueError, r"integers beyond 2\^53"),
    "large unsigned": (np.uint64(abs(CLOUD) * 100) + np.uint64(2**63), ValueError, r"integers beyond 2\^53"),
    "huge extent": (CLOUD.astype(np.float64) * 1e200, ValueError, "too large or too small"),
    "tiny extent": (CLOUD.astype(np.float64) * 1e-200, ValueError, "too large or too small"),
    "end of float16": (np.float16(CLOUD * 15000), ValueError, "to compute with in float16"),
    "sparse": (torch.from_numpy(CLOUD).to_sparse(), TypeError, "not a dense tensor"),
    "no values": (torch.empty(40, 3, device="meta"), TypeError, "not a dense tensor that holds values"),
    "path": (Path("chair.ply"), TypeError, "Path; ifdefense.data.read_cloud reads a file"),
    "dictionary": ({"points": CLOUD}, TypeError, "expected NumPy arrays or tensors, got dict"),
    "generator": ((cloud for cloud in [CLOUD]), TypeError, "got generator"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    points, error, message = BAD[name]
    with pytest.raises(error, match=message):
        unpack(points)  # type: ignore[arg-type]
