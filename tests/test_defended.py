"""Defended classifiers: kinds of input, draws, seeds, precision; and validation of API arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ifdefense
from ifdefense import Defended, Purifier, purify
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.purifiers.base import Outcome

Cloud = np.ndarray


class Linear(nn.Module):
    """Logits that depend on every coordinate, and know the precision of their weights."""

    def __init__(self, columns: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, columns * 4).reshape(columns, 4))

    def forward(self, points: Tensor) -> Tensor:
        assert points.ndim == 3 and points.dtype == self.weight.dtype
        return (points @ self.weight).square().mean(1)


class Jitter(Purifier):
    """Moves all points by one random step: differentiable and random."""

    name = "jitter"
    differentiable = True
    normalise = False

    def run(self, clouds: list[Tensor], counts: Any, seed: int) -> list[Outcome]:
        step = torch.randn(3, generator=torch.Generator().manual_seed(seed))
        return [
            Outcome(cloud[: count or len(cloud)] + step) for cloud, count in zip(clouds, counts, strict=True)
        ]


class Still(Jitter):
    """Moves nothing, counts calls."""

    deterministic = True
    calls = 0

    def run(self, clouds: list[Tensor], counts: Any, seed: int) -> list[Outcome]:
        self.calls += 1
        return [Outcome(cloud) for cloud in clouds]


def test_every_kind_of_clouds_is_classified_alike(sphere_cloud: Cloud, box_cloud: Cloud) -> None:
    model = Defended(Linear(), ifdefense.load("sor"), num_points=200, seed=3)
    batch = np.stack([sphere_cloud, box_cloud])
    expected = model(torch.from_numpy(batch))
    assert expected.shape == (2, 4)
    for kind in (batch, batch.astype(np.float64), list(batch), [torch.from_numpy(batch[0]), batch[1]]):
        torch.testing.assert_close(model(kind), expected)
    torch.testing.assert_close(model(list(map(np.ndarray.tolist, batch))), expected)
    torch.testing.assert_close(model(sphere_cloud), expected[0])
    torch.testing.assert_close(model(sphere_cloud.tolist()), expected[0])
    with pytest.raises(ValueError, match="cloud 1 has 1 points with NaN"):
        model([sphere_cloud, np.where(np.arange(1024)[:, None] == 5, np.nan, box_cloud)])


def test_clouds_of_different_sizes(sphere_cloud: Cloud, box_cloud: Cloud) -> None:
    model = Defended(Linear(), ifdefense.load("sor"), seed=3)
    both = model([sphere_cloud, box_cloud[:500]])
    torch.testing.assert_close(both[1], model(box_cloud[:500]))
    assert both.shape == (2, 4)


def test_only_coordinates_are_normalised(sphere_cloud: Cloud) -> None:
    full = np.concatenate([sphere_cloud * 9 + 4, sphere_cloud], 1)
    purifier = ifdefense.load("srs")
    clean = torch.from_numpy(purifier(full, 300, 5))[None]
    expected = Linear(6)(torch.cat([to_unit_sphere(clean[..., :3]), clean[..., 3:]], -1))
    defended = Defended(Linear(6), purifier, num_points=300, seed=5, normalise=True)
    torch.testing.assert_close(defended(full), expected[0])


def test_each_call_draws_anew_unless_there_is_a_seed(sphere_cloud: Cloud) -> None:
    points = torch.from_numpy(sphere_cloud)[None]
    fresh = Defended(Linear(), Jitter())
    torch.manual_seed(0)
    first = fresh(points)
    torch.manual_seed(0)  # an attacker who sets the global state does not know the draw
    assert not torch.equal(first, fresh(points))
    for seed in (3, np.int64(3)):
        fixed = Defended(Linear(), Jitter(), seed=seed)
        assert torch.equal(fixed(points), fixed(points))
        assert torch.equal(fixed(points), Linear()(Jitter()(points, None, 3)))


def test_logits_are_means_over_draws(sphere_cloud: Cloud) -> None:
    points = torch.from_numpy(sphere_cloud)[None].requires_grad_()
    model = Defended(Linear(), Jitter(), seed=2**63 - 2, draws=3)
    assert model.seeds() == [2**63 - 2, 2**63 - 1, 0]
    expected = sum(Linear()(Jitter()(points, None, seed)) for seed in model.seeds()) / 3
    torch.testing.assert_close(model(points), expected)
    ours, theirs = (torch.autograd.grad(logits[0, 1], points)[0] for logits in (model(points), expected))
    torch.testing.assert_close(ours, theirs)
    assert ours.abs().max() > 0
    assert len(set(Defended(Linear(), Jitter(), draws=5).seeds())) == 5


def test_its_two_steps_can_be_called_alone(sphere_cloud: Cloud, box_cloud: Cloud) -> None:
    model = Defended(Linear(), ifdefense.load("sor-smooth"), num_points=200, seed=3)
    batch = torch.from_numpy(np.stack([sphere_cloud, box_cloud]))
    for given in (batch, batch[0], [batch[0], batch[1][:500]]):
        purified = model.purified(given, 3)
        assert len(purified) == len(model.purifier(given, 200, 3))
        assert torch.equal(model.classified(purified), model(given))


def test_a_deterministic_purifier_is_called_once(sphere_cloud: Cloud) -> None:
    purifier = Still()
    Defended(Linear(), purifier, draws=8)(sphere_cloud)
    assert purifier.calls == 1


def test_a_callable_stands_in_for_a_purifier(sphere_cloud: Cloud) -> None:
    def halved(points: Tensor, num_points: int | None, seed: int) -> Tensor:
        return points[:, : num_points or 50] / 2

    model = Defended(Linear(), halved, normalise=False, num_points=30)
    points = torch.from_numpy(sphere_cloud)[None]
    torch.testing.assert_close(model(points), Linear()(points[:, :30] / 2))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("onet-fill", torch.float16), ("sor-smooth", torch.float64), ("sor-smooth", torch.bfloat16)],
)
def test_purifiers_of_any_precision(name: str, dtype: torch.dtype, box_cloud: Cloud) -> None:
    expected = ifdefense.load(name)(box_cloud, 64)
    cast = ifdefense.load(name).to(dtype)
    np.testing.assert_array_equal(cast(box_cloud, 64), expected)
    model = Defended(Linear(), ifdefense.load(name), num_points=64, seed=0).to(dtype)
    logits = model(torch.from_numpy(box_cloud).double())
    assert logits.dtype == dtype
    reference = Defended(Linear(), ifdefense.load(name), num_points=64, seed=0)(box_cloud)
    tolerance = torch.finfo(dtype).eps * 8 + 1e-5
    torch.testing.assert_close(logits.float(), reference, rtol=tolerance, atol=tolerance)


def test_half_double_and_back_leave_the_weights(box_cloud: Cloud) -> None:
    purifier = ifdefense.load("onet-fill")
    before = {name: value.clone() for name, value in purifier.state_dict().items()}
    purifier.half().double().float()
    assert all(torch.equal(value, before[name]) for name, value in purifier.state_dict().items())


# Arguments

ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "negative seed": ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    "large seed": ({"seed": 2**63}, ValueError, "seed must be at most 9223372036854775807"),
    "bool seed": ({"seed": True}, TypeError, "seed must be an integer, got True"),
    "NumPy bool seed": ({"seed": np.bool_(True)}, TypeError, "seed must be an integer"),
    "broken seed": ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
    "float seed": ({"seed": np.float64(3)}, TypeError, "seed must be an integer"),
    "seed of text": ({"seed": "3"}, TypeError, "seed must be an integer, got '3'"),
    "seed of a tensor": ({"seed": torch.tensor(3)}, TypeError, "seed must be an integer, got Tensor"),
    "broken count": ({"num_points": 2.5}, TypeError, "num_points must be an integer, got 2.5"),
    "bool count": ({"num_points": True}, TypeError, "num_points must be an integer, got True"),
    "zero count": ({"num_points": 0}, ValueError, "num_points must be at least 1, got 0"),
    "huge count": ({"num_points": 10**12}, ValueError, "num_points must be at most 100000000"),
    "batch of text": ({"batch_size": "4"}, TypeError, "batch_size must be an integer, got '4'"),
    "no batch": ({"batch_size": None}, TypeError, "batch_size must be an integer, got NoneType"),
    "negative batch": ({"batch_size": -2}, ValueError, "batch_size must be at least 1, got -2"),
    "device": ({"device": "nonsense"}, ValueError, "device 'nonsense' cannot be used"),
    "meta": ({"device": "meta"}, ValueError, "device 'meta' cannot be used"),
    "number of a device": ({"device": 0}, TypeError, "device must be a name such as 'cuda:0', got 0"),
    "method": ({"method": 3}, TypeError, "method must be a name, a path or a purifier, got int"),
    "list of methods": ({"method": ["sor"]}, TypeError, "method must be a name.*got list"),
    "empty method": ({"method": ""}, ValueError, "unknown method ''"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_make_no_sense(name: str, sphere_cloud: Cloud) -> None:
    given, error, message = ARGUMENTS[name]
    with pytest.raises(error, match=message):
        purify(sphere_cloud, **{"method": "sor", **given})


MAKE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "draws": (lambda: Defended(Linear(), Jitter(), draws=0), ValueError, "draws must be at least 1"),
    "seed": (lambda: Defended(Linear(), Jitter(), seed=-1), ValueError, "seed must be at least 0"),
    "count": (
        lambda: Defended(Linear(), Jitter(), num_points=1.0),
        TypeError,
        "num_points must be an integer",
    ),
    "purifier": (lambda: Defended(Linear(), "sor"), TypeError, "purifier must be callable, got str"),
    "classifier": (lambda: Defended(None, Jitter()), TypeError, "classifier must be callable, got NoneType"),
}


@pytest.mark.parametrize("name", MAKE)
def test_a_defence_that_makes_no_sense(name: str) -> None:
    make, error, message = MAKE[name]
    with pytest.raises(error, match=message):
        make()


def test_numbers_of_numpy_are_numbers(sphere_cloud: Cloud) -> None:
    ours = purify(sphere_cloud, "srs", np.int32(64), np.int64(3), batch_size=np.uint8(2))
    np.testing.assert_array_equal(ours, purify(sphere_cloud, "srs", 64, 3))
    unseeded = [purify(sphere_cloud, "srs", 64, None) for _ in range(2)]
    assert not np.array_equal(*unseeded)
    assert purify(sphere_cloud, "srs", 64, 2**63 - 1).shape == (64, 3)


def test_a_purifier_of_your_own(sphere_cloud: Cloud) -> None:
    np.testing.assert_array_equal(purify(sphere_cloud, Still()), purify(sphere_cloud, Still()))
    with pytest.raises(ValueError, match="move the purifier itself"):
        purify(sphere_cloud, Still(), device="cpu")
