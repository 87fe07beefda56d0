"""What callers hand in comes back as the same kind, and bad clouds are named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ifdefense.clouds import unpack

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


def test_the_caller_s_array_is_not_shared_when_it_is_read_backwards() -> None:
    reverse = CLOUD[::-1]
    (cloud,) = unpack(reverse).clouds
    np.testing.assert_array_equal(cloud.numpy(), reverse)


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
    "text": ("chair.ply", TypeError, "expected NumPy arrays or tensors, got str"),
    "one point": ([[1.0, 2.0, 3.0]], ValueError, "the cloud has 1 distinct points"),
    "list of points": ([CLOUD[0], CLOUD[1]], ValueError, r"cloud 0 must have shape \(N, 3\)"),
    "list of names": (["chair.ply"], TypeError, "cloud 0 is a str"),
    "uneven rows": ([[1.0, 2.0, 3.0], [1.0, 2.0]], ValueError, "the cloud has rows of different lengths"),
    "text in rows": ([["1", "2", "3"]] * 20, TypeError, "the cloud has dtype <U1"),
    "member shape": ([CLOUD, CLOUD[:, :2]], ValueError, r"cloud 1 must have shape \(N, 3\)"),
    "transposed": (CLOUD.T, ValueError, r"3 distinct points.*the layout is \(N, 3\), a row per point"),
    "no axes": (np.zeros(()), ValueError, r"an array of shape \(\)"),
    "object array": (CLOUD.astype(object), TypeError, "dtype object.*given as a list"),
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
    "dictionary": ({"points": CLOUD}, TypeError, "expected NumPy arrays or tensors, got dict"),
    "generator": ((cloud for cloud in [CLOUD]), TypeError, "got generator"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    points, error, message = BAD[name]
    with pytest.raises(error, match=message):
        unpack(points)  # type: ignore[arg-type]
