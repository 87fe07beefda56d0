"""Two hundred seeded mutations of API arguments: correct results or helpful errors."""

from __future__ import annotations

import collections
import dataclasses
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ifdefense
from ifdefense import Defended, purify

CALLS = 200
PACKAGE = Path(__file__).parent.parent / "ifdefense"

Array = np.ndarray
Random = np.random.Generator


@dataclasses.dataclass
class Mutation:
    """What to do to an argument, and whether the result is still one that makes sense."""

    name: str
    change: Callable[[Any, Random], Any]
    valid: bool


def put(value: float, rows: int = 1) -> Callable[[Array, Random], Array]:
    """Writes a number over coordinates."""

    def change(cloud: Array, random: Random) -> Array:
        cloud = cloud.copy()
        cloud[random.integers(len(cloud), size=rows), random.integers(3)] = value
        return cloud

    return change


def spread(low: float, high: float) -> Callable[[Array, Random], Array]:
    """Scales by a power of ten, in float64."""
    return lambda cloud, random: cloud.astype(np.float64) * 10.0 ** random.uniform(low, high)


def columns(cloud: Array, random: Random) -> Array:
    extra = random.normal(size=(len(cloud), random.integers(1, 5))).astype(cloud.dtype)
    extra[random.random(extra.shape) < 0.1] = np.nan
    return np.concatenate([cloud, extra], axis=1)


def read_only(cloud: Array, random: Random) -> Array:
    cloud = cloud.copy()
    cloud.flags.writeable = False
    return cloud


CLOUDS = [
    Mutation("as it is", lambda c, r: c, True),
    Mutation("float type", lambda c, r: c.astype(r.choice(["f2", "f4", "f8", ">f4", ">f8", "g"])), True),
    Mutation("integer type", lambda c, r: (c * 1000).astype(r.choice(["i2", "i4", "i8", ">i8"])), True),
    Mutation("unsigned type", lambda c, r: ((c + 5) * 20).astype(r.choice(["u1", "u2", "u4", "u8"])), True),
    Mutation("no real type", lambda c, r: c.astype(r.choice(["?", "c8", "O", "S9", "U9", "M8[s]"])), False),
    Mutation("large integers", lambda c, r: (c * 1000).astype("i8") + 2 ** r.integers(54, 62), False),
    Mutation("scaled", spread(-100, 100), True),
    Mutation("far too large or small", lambda c, r: spread(180, 250)(c, r) ** r.choice([-1, 1]), False),
    Mutation("shifted", lambda c, r: c.astype("f8") + 10.0 ** r.uniform(0, 9), True),
    Mutation("attributes", columns, True),
    Mutation("not a number", put(float("nan")), False),
    Mutation("infinite", put(float("-inf")), False),
    Mutation("blind point", put(1e6), True),
    Mutation("few points", lambda c, r: c[: r.integers(0, 16)], False),
    Mutation("just enough", lambda c, r: c[: r.integers(16, 20)], True),
    Mutation("repeated", lambda c, r: np.repeat(c, r.integers(2, 5), axis=0), True),
    Mutation("repeated few", lambda c, r: np.repeat(c[:9], 40, axis=0), False),
    Mutation("one place", lambda c, r: np.broadcast_to(c[0], c.shape), False),
    Mutation("plane", lambda c, r: c * np.float32([1, 1, 0]), True),
    Mutation("two columns", lambda c, r: c[:, : r.integers(0, 3)], False),
    Mutation("transposed", lambda c, r: c.T, False),
    Mutation("backwards", lambda c, r: c[::-1, ::-1], True),
    Mutation("other memory order", lambda c, r: np.asfortranarray(c), True),
    Mutation("read only", read_only, True),
    Mutation("masked", lambda c, r: np.ma.array(c, mask=c > c.max() / 2), False),
    Mutation("nothing masked", lambda c, r: np.ma.array(c), True),
    Mutation("axes", lambda c, r: c[(None,) * r.integers(2, 4)], False),
    Mutation("one axis", lambda c, r: c.ravel(), False),
]

CONTAINERS = [
    Mutation("array", lambda c, r: c, True),
    Mutation("batch", lambda c, r: np.stack([c, c[::-1]]), True),
    Mutation("tensor", lambda c, r: torch.from_numpy(c), True),
    Mutation("half", lambda c, r: torch.from_numpy(c).to(r.choice([torch.float16, torch.bfloat16])), True),
    Mutation("with gradients", lambda c, r: torch.from_numpy(c).requires_grad_(), True),
    Mutation("expanded", lambda c, r: torch.from_numpy(c).expand(3, -1, -1), True),
    Mutation("list", lambda c, r: [c, torch.from_numpy(c[:50])], True),
    Mutation("tuple", lambda c, r: (c, c[:60]), True),
    Mutation("numbers", lambda c, r: c.tolist(), True),
    Mutation("lists of numbers", lambda c, r: [c.tolist(), c[:60].tolist()], True),
    Mutation("integers of torch", lambda c, r: (torch.from_numpy(c) * 99).to(torch.int64), True),
    Mutation("bad member", lambda c, r: [c, [None, "x", 3, c[0], c.T, {}, c > 0][r.integers(7)]], False),
    Mutation(
        "nothing", lambda c, r: [None, [], (), "cloud.ply", b"", 3, {}, c[:0], [[]]][r.integers(9)], False
    ),
    Mutation("generator", lambda c, r: (part for part in [c]), False),
    Mutation("sparse", lambda c, r: torch.from_numpy(c).to_sparse(), False),
    Mutation("without values", lambda c, r: torch.empty(99, 3, device="meta"), False),
    Mutation("complex tensor", lambda c, r: torch.from_numpy(c).to(torch.complex64), False),
    Mutation("cut row", lambda c, r: [*c.tolist(), [1.0, 2.0]], False),
]

BAD_INTEGERS = [-1, True, 1.5, 2.0, "3", np.float32(3), np.bool_(1), [1], torch.tensor(3), 10**30, object()]


def one_of(*values: Any) -> Callable[[Any, Random], Any]:
    return lambda value, random: values[random.integers(len(values))]


ARGUMENTS: dict[str, list[Mutation]] = {
    "seed": [
        Mutation("seed", one_of(0, np.int64(3), np.uint8(7), 2**63 - 1, 2**40), True),
        Mutation("bad seed", one_of(*BAD_INTEGERS, 2**63), False),
    ],
    "num_points": [
        Mutation("count", one_of(None, 1, np.int32(17), 64, 3000), True),
        Mutation("bad count", one_of(*BAD_INTEGERS, 0, 10**9), False),
    ],
    "batch_size": [
        Mutation("batch size", one_of(1, np.int16(2), 10**6), True),
        Mutation("bad batch size", one_of(*BAD_INTEGERS, 0, None), False),
    ],
    "method": [
        Mutation("method", one_of("sor", "srs", "sor-smooth"), True),
        Mutation("bad method", one_of("", "SOR", 3, None, ["sor"], b"sor", "/nowhere"), False),
    ],
    "device": [
        Mutation("device", one_of(None, "cpu", torch.device("cpu")), True),
        Mutation("bad device", one_of("gpu", "cuda:99", 0, [], "meta", ""), False),
    ],
}


class Spans(nn.Module):
    def forward(self, points: Tensor) -> Tensor:
        return points.double().amax(1) - points.double().amin(1)


@dataclasses.dataclass
class Case:
    """One call."""

    points: Any
    arguments: dict[str, Any]
    names: list[str]
    valid: bool
    entry: str

    def call(self) -> Any:
        rest = dict(self.arguments)
        if self.entry == "purify":
            return purify(self.points, **rest)
        rest.pop("device", None)
        purifier = ifdefense.load(rest.pop("method", "sor"))
        if self.entry == "purifier":
            return purifier(self.points, **rest)
        if self.entry == "trace":
            return purifier.trace(self.points, **rest)
        rest.pop("batch_size", None)
        return Defended(Spans(), purifier, **rest)(self.points)


def make(index: int) -> Case:
    random = np.random.default_rng(index)
    cloud = random.normal(size=(random.integers(70, 200), 3)).astype(np.float32).clip(-4, 4)
    table = CLOUDS if index % 2 else CONTAINERS
    mutation = table[index // 2 % len(table)]
    entry = ["purify", "purifier", "purify", "defended", "trace"][index % 5]
    arguments: dict[str, Any] = {"method": "sor"}
    names, valid = [mutation.name], mutation.valid
    for name in random.choice(list(ARGUMENTS), size=random.integers(0, 3), replace=False):
        if (entry != "purify" and name in ("device", "method")) or (
            entry == "defended" and name == "batch_size"
        ):
            continue
        change = ARGUMENTS[name][int(random.random() < 0.35)]
        arguments[name] = change.change(None, random)
        names.append(change.name)
        valid &= change.valid
    return Case(mutation.change(cloud, random), arguments, names, valid, entry)


def check(case: Case, result: Any) -> None:
    """Kind, type, number and values of what came back."""
    given, count, method = case.points, case.arguments.get("num_points"), case.arguments["method"]
    single = not isinstance(given, (list, tuple)) or np.ndim(given[0]) == 1
    if isinstance(given, (Array, Tensor)):
        single = given.ndim == 2
    before = [given] if single else list(given)
    if case.entry == "defended":
        assert result.shape == ((3,) if single else (len(before), 3))
        assert torch.isfinite(result).all()
        return
    if case.entry == "trace":
        assert len(result) == len(before)
        result = [trace.purified for trace in result]
    else:
        kind = list if isinstance(given, (list, tuple)) else Tensor if isinstance(given, Tensor) else Array
        assert isinstance(result, kind)
        result = [result] if single else list(result)
    for old, new in zip(before, result, strict=True):
        if case.entry != "trace" and isinstance(old, (Array, Tensor)) and "int" not in str(old.dtype):
            assert new.dtype == old.dtype
        old, new = (
            np.asarray(values.detach().double() if isinstance(values, Tensor) else values, np.float64)
            for values in (old, new)
        )
        assert new.shape == (count or len(old), 3 if case.entry == "trace" else old.shape[1])
        assert np.isfinite(new[:, :3]).all()
        if method in ("sor", "srs"):  # the rows of the input, attributes included
            width = new.shape[1]
            assert {row.tobytes() for row in new + 0.0} <= {row.tobytes() for row in old[:, :width] + 0.0}


def attempt(case: Case) -> tuple[Any, Exception | None]:
    """A result, or the error of one of the two kinds that may come."""
    try:
        return case.call(), None
    except (ValueError, TypeError) as error:
        return None, error


def test_every_call_ends_in_a_result_or_in_one_of_our_errors(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes: collections.Counter[str] = collections.Counter()
    begun, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(CALLS):
        case = make(index)
        label = f"call {index}: {case.entry}, {', '.join(case.names)}, {case.arguments}"
        start = time.perf_counter()
        result, error = attempt(case)
        assert time.perf_counter() - start < 10, label
        assert (error is None) == case.valid, f"{label}: {error or 'swallowed'}"
        if error is None:
            try:
                check(case, result)
            except AssertionError as difference:
                pytest.fail(f"{label}: {difference}")
        else:
            raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
            assert raised_in.is_relative_to(PACKAGE), f"{label}: not one of our errors: {error}"
            assert len(str(error)) > 10, label
        outcomes["results" if error is None else "errors"] += 1
    seconds = time.perf_counter() - begun
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    counts = f"{outcomes['results']} correct results, {outcomes['errors']} errors"
    with capsys.disabled():
        sys.stdout.write(f"\n{CALLS} calls of the API: {counts}, {seconds:.1f} s, {grown:.0f} MB\n")
    assert grown < 1024
    assert outcomes.total() == CALLS and min(outcomes.values()) > CALLS // 4
