"""Defences and classifiers of other people: how they are found, wrapped and checked."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attacks import EOT, PGD, DefenceAware
from benchmarks.clouds import load_clouds
from benchmarks.foreign import (
    ForeignDefence,
    ForeignError,
    Victim,
    defence_of,
    model_of,
    shipped_victims,
    victim_of,
)
from ifdefense import Purifier
from ifdefense.provenance import digest
from ifdefense.purifiers.filters import StatisticalOutlierRemoval

SOURCE = '''
"""A file of somebody else."""
import torch
from beside import SIGMA

class Rounded:
    deterministic = True
    def __call__(self, points):
        return (points / SIGMA).round() * SIGMA

class Needy:
    def __init__(self, size):
        self.size = size

def smaller(points):
    return points * 0.5

net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 16))
'''


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search path and modules as before."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", sys.modules)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("SIGMA = 0.1\n")
    (tmp_path / "mine.py").write_text(SOURCE)
    sys.modules.pop("beside", None)
    return tmp_path / "mine.py"


def clouds(count: int = 3) -> Tensor:
    return load_clouds(clouds=count).points


def halved(points: Any) -> Any:
    """Works on tensors and arrays."""
    return points * 0.5


def defence(what: Any, **options: Any) -> ForeignDefence:
    found = defence_of(what, **options)
    assert isinstance(found, ForeignDefence)
    return found


def test_no_defence_and_shipped_ones_are_found_by_name() -> None:
    assert defence_of(None) is None and defence_of("none") is None
    sor = defence_of("sor")
    assert isinstance(sor, StatisticalOutlierRemoval)
    assert defence_of(sor) is sor
    assert "pointnet-procedural" in shipped_victims()


def test_a_function_a_class_and_a_network_in_a_file_are_found(mine: Path) -> None:
    points = clouds()
    rounded = defence(f"{mine}:Rounded")
    assert rounded.name == "Rounded" and rounded.deterministic and rounded.notes == ()
    torch.testing.assert_close(rounded(points), (points / 0.1).round() * 0.1)
    assert torch.equal(defence(f"{mine}:smaller")(points), points * 0.5)
    net = victim_of(f"{mine}:net")
    assert net.title == "net" and net.classes == 16 and net.deterministic
    assert net.model(points).shape == (3, 16) and not net.model.training


def test_a_module_in_the_current_folder_is_found(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mine.parent)
    mine.rename(mine.with_name("their_module.py"))
    assert torch.equal(defence("their_module:smaller")(clouds()), clouds() * 0.5)
    assert torch.equal(defence(f"{__name__}:halved")(clouds()), clouds() * 0.5)
    sys.modules.pop("their_module")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "local-msh",
            r"unknown defence 'local-msh' \(did you mean 'local-mesh'\?\); there are none, local-mesh",
        ),
        ("FILE:Roundd", r"mine.py has no 'Roundd' \(did you mean 'Rounded'\?\)"),
        ("FILE", "name the defence in it, as .*mine.py:NAME"),
        ("FILE:Needy", "Needy: the class cannot be constructed without arguments: TypeError: .*'size'"),
        ("FILE:net.0.bias", "bias|callable"),
        ("nowhere/mine.py:Rounded", "nowhere/mine.py: there is no such file"),
        ("no_such_module:thing", "there is no module 'no_such_module'"),
        ("not a module:thing", "'not a module' is neither a module nor a Python file"),
        ("BROKEN:thing", "broken.py: its import fails: ZeroDivisionError: division by zero"),
        (5, "a defence must be callable, got a int"),
    ],
)
def test_what_cannot_be_found_is_one_clear_sentence(what: Any, message: str, mine: Path) -> None:
    (mine.parent / "broken.py").write_text("1 / 0\n")
    if isinstance(what, str):
        what = what.replace("FILE", str(mine)).replace("BROKEN", str(mine.parent / "broken.py"))
    with pytest.raises(ForeignError, match=message) as caught:
        defence_of(what)
    assert "\n" not in str(caught.value)


def test_unknown_victims_get_the_nearest_match() -> None:
    with pytest.raises(ForeignError, match=r"unknown victim 'pointnet-procedral' \(did you mean 'pointnet-p"):
        victim_of("pointnet-procedral")
    with pytest.raises(ForeignError, match=r"unknown model 'nothing'; there are .*, or module:attribute"):
        model_of("nothing")


def test_shipped_victims_and_files_of_weights_are_loaded(tmp_path: Path) -> None:
    from classifiers import load
    from ifdefense.checkpoints import save_safetensors

    shipped = victim_of("pointnet-procedural")
    save_safetensors(load("pointnet-procedural"), tmp_path / "other.safetensors")
    other = victim_of(f"pointnet:{tmp_path / 'other.safetensors'}@y")
    assert (shipped.title, other.title) == ("pointnet-procedural", "pointnet-other")
    assert shipped.classes == other.classes == 16 and shipped.weights == other.weights
    points = clouds()
    turned = torch.stack([points[..., 0], points[..., 2], -points[..., 1]], -1)  # y up
    with torch.no_grad():
        torch.testing.assert_close(other.model(points), shipped.model(turned), atol=1e-3, rtol=1e-3)
    of_two = dataclasses.replace(load_clouds(clouds=2), name="x", classes=("a", "b"))
    with pytest.raises(ForeignError, match="pointnet-procedural distinguishes 16 classes, x has 2"):
        shipped.check(of_two)


def test_arrays_are_found_by_trying_once() -> None:
    def sorted_by_height(points: Any) -> Any:
        assert isinstance(points, np.ndarray)
        return [cloud[np.argsort(cloud[:, 2])].astype(np.float64) for cloud in points]

    found = defence(sorted_by_height)
    assert found.array == "numpy" and defence(halved).array == "torch"
    points = clouds().double()
    result = found(points)
    assert result.dtype == torch.float64
    assert torch.equal(result[..., 2], points[..., 2].sort(1).values)
    sorted_by_height.array = "torch"  # type: ignore[attr-defined]
    with pytest.raises(ForeignError, match=r"fails on clouds .*with a torch array, AssertionError"):
        defence_of(sorted_by_height)
    sorted_by_height.array = "jax"  # type: ignore[attr-defined]
    with pytest.raises(ForeignError, match="array must be 'torch' or 'numpy', got 'jax'"):
        defence_of(sorted_by_height)


BAD = {
    "tuple": (lambda points: (points, 1), "returned a tuple; it must return clouds"),
    "number": (lambda points: 3.0, "returned a float; it must return clouds"),
    "one cloud": (lambda points: points[0], "returned 1024 clouds for 2"),
    "two columns": (lambda points: points[..., :2], r"returned \(1024, 2\) for cloud 0"),
    "no points": (lambda points: points[:, :0], r"returned \(0, 3\) for cloud 0"),
    "nan": (
        lambda points: torch.where(points > 0.5, torch.nan, points),
        "NaN or infinite coordinates for cloud",
    ),
    "in place": (lambda points: points.mul_(2), "changes its input: it must work on a copy"),
    "device": (
        lambda points: points.to("meta"),
        "on meta for clouds on cpu: it must compute on the device of",
    ),
    "raises": (lambda points: points.view(7), "fails on clouds .*RuntimeError"),
}


@pytest.mark.parametrize("fault", BAD)
def test_an_unusable_result_is_one_clear_sentence(fault: str) -> None:
    function, message = BAD[fault]
    with pytest.raises(ForeignError, match=message) as caught:
        defence_of(function)
    assert "\n" not in str(caught.value)


def test_a_fault_on_other_clouds_is_named_too() -> None:
    def fragile(points: Tensor) -> Tensor:
        return points if points.shape[1] == 1024 else points / 0

    found = defence(fragile)
    with pytest.raises(ForeignError, match="fragile returned NaN or infinite coordinates for cloud 0"):
        found(clouds()[:, :100])


def test_what_a_defence_needs_is_read_from_its_attributes() -> None:
    class Plain:
        def __call__(self, points: Tensor) -> Tensor:
            return points * 1

    class Special(Plain):
        name, normalise, differentiable, optimises, num_points = "special", False, True, True, 100

    plain, special = defence(Plain()), defence(Special)
    assert (plain.name, plain.normalise, plain.differentiable, plain.optimises) == (
        "Plain",
        True,
        False,
        False,
    )
    assert special.name == "special" and not special.normalise
    assert special.differentiable and special.optimises
    assert plain(clouds(), 500).shape == (3, 1024, 3)  # as returned
    assert special(clouds()).shape == (3, 100, 3)
    assert defence(Special, num_points=50)(clouds()).shape == (3, 50, 3)


def test_clouds_of_different_size_are_brought_to_one() -> None:
    found = defence(lambda points: [cloud[: 1000 + 100 * index] for index, cloud in enumerate(points)])
    assert found.deterministic
    points = clouds(2)
    result = found(points)
    assert result.shape == (2, 1024, 3) and torch.equal(result, found(points, seed=7))
    rows = (result[0][:, None] == points[0][:1000]).all(2)
    assert rows.any(0).all() and rows.any(1).all()  # all of its points, some of them twice
    assert found(points, 512).shape == (2, 512, 3)


def noisy(points: Tensor) -> Tensor:
    """Random numbers of all three global generators."""
    shift = np.random.normal()  # noqa: NPY002
    shift += random.gauss(0, 1)
    return points + 0.01 * torch.randn_like(points) + 0.01 * shift


def legacy_state() -> Any:
    """State of NumPy's global generator."""
    return np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002


def test_random_numbers_depend_on_the_seed_and_leave_the_generators_alone() -> None:
    states = torch.get_rng_state(), legacy_state(), random.getstate()
    found, points = defence(noisy), clouds()
    assert not found.deterministic and found.notes == ()
    assert torch.equal(found(points, seed=3), found(points, seed=3))
    assert not torch.equal(found(points, seed=3), found(points, seed=4))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(legacy_state(), states[1])
    assert random.getstate() == states[2]


def test_a_defence_may_take_the_seed() -> None:
    def seeded(points: Tensor, seed: int) -> Tensor:
        return points + seed

    seeded.takes_seed = True  # type: ignore[attr-defined]
    found = defence(seeded)
    assert not found.deterministic
    assert torch.equal(found(clouds(), seed=2), clouds() + 2)


def test_measured_randomness_counts_and_is_noted(caplog: pytest.LogCaptureFixture) -> None:
    class Declared:
        deterministic = True

        def __call__(self, points: Tensor) -> Tensor:
            return points + int.from_bytes(os.urandom(2)) / 1e6

    with caplog.at_level(logging.WARNING):
        found = defence(Declared)
    assert not found.deterministic
    assert "declared deterministic, but its results differ" in caplog.text
    assert len(found.notes) == 2 and "random numbers of its own" in found.notes[1]


def test_gradients_pass_where_declared() -> None:
    def scaled(points: Tensor) -> Tensor:
        return points * 0.5

    scaled.differentiable = True  # type: ignore[attr-defined]
    points = clouds().requires_grad_()
    defence(scaled)(points).sum().backward()
    assert points.grad is not None and torch.equal(points.grad, torch.full_like(points, 0.5))
    assert defence(scaled).differentiable and not defence(halved).differentiable
    assert not defence(scaled)(points.detach()).requires_grad


def test_a_defence_may_optimise_where_the_caller_computes_no_gradients() -> None:
    def optimised(points: Tensor) -> Tensor:
        moved = points.clone().requires_grad_()
        loss = moved.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        assert moved.grad is not None
        return moved - 0.25 * moved.grad

    found, points = defence(optimised), clouds()
    with torch.no_grad():
        torch.testing.assert_close(found(points), points * 0.5)
    with torch.inference_mode():
        torch.testing.assert_close(found(points), points * 0.5)
    assert not found(points).requires_grad


def test_a_network_keeps_its_mode_and_weights_as_they_are() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.scale = nn.Dropout(0.5), nn.Parameter(torch.ones(3))

        def forward(self, points: Tensor) -> Tensor:
            return self.drop(points) * self.scale

    network = Dropping().train()
    found = defence(network)
    assert found.deterministic  # in evaluation mode
    assert network.training and network.drop.training and network.scale.requires_grad
    assert not found(clouds()).requires_grad
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(3072, 16)).train()
    victim = victim_of(model)
    assert victim.deterministic and model.training


def test_an_attack_goes_through_a_foreign_defence_and_victim() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 16)).eval()
    points = clouds(1)

    def aware() -> DefenceAware:
        return DefenceAware(victim_of(net).model, defence(noisy), eot=EOT(samples=1), num_points=1024)

    assert digest(aware()) == digest(aware())
    result = PGD(iterations=10)(aware(), points, net(points).argmax(1))
    assert result.success.all()


def test_unnamed_classes_without_clouds_are_no_mistake() -> None:
    """Labels alone do not tell how many classes there are."""
    few = dataclasses.replace(
        load_clouds(clouds=4), classes=("0", "1", "2"), labels=torch.tensor([0, 2, 1, 0])
    )
    victim_of(lambda points: points.sum(1) @ torch.ones(3, 5)).check(few)
    with pytest.raises(ForeignError, match=r"distinguishes 5 classes, .* has 3"):
        victim_of(lambda points: points.sum(1) @ torch.ones(3, 5)).check(
            dataclasses.replace(few, classes=("ball", "box", "can"))
        )
    with pytest.raises(ForeignError, match=r"distinguishes 2 classes, .* has 3"):
        victim_of(lambda points: points.sum(1) @ torch.ones(3, 2)).check(few)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda points: points,
            r"the model must return logits of shape \(2, C\), it returned \(2, 1024, 3\)",
        ),
        (lambda points: ("a", 1), "it returned a tuple of str, int"),
        (lambda points: torch.full((2, 16), torch.nan), "returned NaN or infinite logits"),
        (lambda points: points.mul_(2).sum(2), "changes its input"),
        (lambda points: torch.zeros(2, 16, device="meta"), "returned logits on meta for clouds on cpu"),
        (
            nn.Conv1d(3, 16, 1),
            r"Conv1d fails on clouds \(2, 1024, 3\): RuntimeError: .* If it takes \(B, 3, N\), wrap it",
        ),
        (f"{__name__}:OFFSET", "OFFSET: a victim must be callable, got a float"),
        (7, "int: a victim must be callable, got a int"),
    ],
)
def test_an_unusable_classifier_is_one_clear_sentence(model: Any, message: str) -> None:
    with pytest.raises(ForeignError, match=message) as caught:
        victim_of(model)
    assert "\n" not in str(caught.value)


def test_a_model_with_random_numbers_of_its_own_is_seeded() -> None:
    linear = nn.Linear(3, 16)

    def randomised(points: Tensor) -> Tensor:
        return linear(points + torch.randn_like(points)).amax(1)

    found = model_of(randomised)
    assert isinstance(found, Victim) and not found.deterministic and found.classes == 16
    points = clouds()
    model = found.model
    assert torch.equal(model(points), model(points))
    assert not torch.equal(model(points), model.with_seed(1)(points))
    # With gradients, means over draws that are new in every call and start again with every attack.
    given = points.clone().requires_grad_()
    first, second = model(given), model(given)
    assert first.requires_grad and not torch.equal(first, second)
    model.restart()
    assert torch.equal(model(given), first)


class Scaled:
    factor = 0.5

    def __init__(self, shift: float = 0.0) -> None:
        self.shift = shift

    def __call__(self, points: Tensor) -> Tensor:
        return points * self.factor + self.shift


OFFSET = 0.0


def offset(points: Tensor) -> Tensor:
    return points + OFFSET


def test_a_changed_defence_has_another_digest(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closure(shift: float) -> Any:
        return lambda points: points + shift

    def key(what: Any) -> str:
        return digest(defence(what))

    assert key(closure(0.1)) == key(closure(0.1)) != key(closure(0.2))
    assert key(Scaled(0.1)) == key(Scaled(0.1)) != key(Scaled(0.2))
    before = key(Scaled(0.1)), key(offset)
    monkeypatch.setattr(Scaled, "factor", 0.25)
    monkeypatch.setattr(sys.modules[__name__], "OFFSET", 0.5)
    assert key(Scaled(0.1)) != before[0] and key(offset) != before[1]
    # A global variable with the name of an attribute is another thing.
    before = key(Scaled(0.1)), ""
    monkeypatch.setattr(sys.modules[__name__], "factor", 7, raising=False)
    assert key(Scaled(0.1)) == before[0]
    network = nn.Conv1d(1024, 1024, 1)
    found = defence(network)
    weights = digest(found)
    with torch.no_grad():
        network.bias.add_(1)
    assert key(network) != weights and digest(found) != weights


@pytest.mark.parametrize("change", ["the function", "the file beside it", "only a comment"])
def test_a_changed_file_is_read_again(change: str, mine: Path) -> None:
    before = defence(f"{mine}:Rounded")
    points, key = clouds(), digest(before)
    assert key == digest(defence(f"{mine}:Rounded"))
    if change == "the function":
        mine.write_text(SOURCE.replace("* SIGMA", "* SIGMA * 2"))
    elif change == "the file beside it":
        (mine.parent / "beside.py").write_text("SIGMA = 0.25\n")
        del sys.modules["beside"]
        os.utime(mine, (1, 1))
    else:
        mine.write_text(SOURCE + "# a comment\n")
    after = defence(f"{mine}:Rounded")
    assert torch.equal(after(points), before(points)) == (change == "only a comment")
    assert (digest(after) == key) == (change == "only a comment")


def test_files_of_the_same_name_are_kept_apart(mine: Path) -> None:
    other = mine.parent / "other" / "mine.py"
    other.parent.mkdir()
    other.write_text(textwrap.dedent("def smaller(points):\n    return points * 0.125\n"))
    first, second = defence(f"{mine}:smaller"), defence(f"{other}:smaller")
    assert torch.equal(first(clouds()), clouds() * 0.5) and torch.equal(second(clouds()), clouds() * 0.125)
    assert digest(first) != digest(second)


def test_what_cannot_be_identified_is_never_used_again(caplog: pytest.LogCaptureFixture) -> None:
    lines = (line for line in "ab")

    def opaque(points: Tensor) -> Tensor:
        assert lines
        return points * 1

    with caplog.at_level(logging.WARNING):
        found = defence(opaque)
        assert digest(found) == digest(found) != digest(defence(opaque))
    assert "lines is a generator, which cannot be identified" in caplog.text


def test_purifiers_of_somebody_else_are_used_as_they_are() -> None:
    class Mine(StatisticalOutlierRemoval):
        name = "mine"

    found = defence_of(Mine)
    assert isinstance(found, Purifier) and found.name == "mine"


def test_calls_do_not_change_the_digest_of_a_defence() -> None:
    class Counting:
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, points: Tensor) -> Tensor:
            self.calls += 1
            return points * 1

    found = defence(Counting())
    before = digest(found)
    found(clouds())
    assert digest(found) == before == digest(defence(Counting()))
