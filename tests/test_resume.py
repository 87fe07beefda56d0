from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from attack_checks import clouds, victim
from torch import Tensor, nn

import ifdefense
from attacks import EOT, PGD, DefenceAware, Perturb, SaliencyDrop
from attacks.black_box.transfer import Transfer
from attacks.resume import attack_in_batches
from ifdefense.provenance import digest

ATTACK = PGD("linf", delta=0.3, iterations=3)


class Counting(nn.Module):
    """A victim that counts the clouds it is asked about, and fails when told to."""

    asked = 0
    fails_after: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.net = victim()

    def forward(self, points: Tensor) -> Tensor:
        Counting.asked += len(points)
        if Counting.fails_after is not None and Counting.asked > Counting.fails_after:
            raise KeyboardInterrupt
        return self.net(points)


@pytest.fixture
def model() -> Counting:
    Counting.asked, Counting.fails_after = 0, None
    return Counting()


@pytest.fixture
def points() -> Tensor:
    return clouds()


@pytest.fixture
def labels(points: Tensor) -> Tensor:
    return victim()(points).argmax(1)


def equal(one: object, other: object) -> bool:
    same = [
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("points", "success", "queries", "iterations")
    ]
    sizes, others = one.distances, other.distances
    return (
        all(same) and sizes.keys() == others.keys() and all(torch.equal(sizes[k], others[k]) for k in sizes)
    )


@pytest.mark.parametrize("size", [1, 4, 6, 100])
def test_batches_give_what_one_call_gives(size: int, model: Counting, points: Tensor, labels: Tensor) -> None:
    whole = ATTACK(model, points, labels, generator=torch.Generator().manual_seed(3))
    parts = attack_in_batches(ATTACK, model, points, labels, batch_size=size, seed=3)
    torch.testing.assert_close(parts.points, whole.points)
    assert torch.equal(parts.success, whole.success)
    assert parts.distances.keys() == whole.distances.keys()
    other = attack_in_batches(ATTACK, model, points, labels, batch_size=size, seed=4)
    assert not torch.equal(other.points, parts.points)


@pytest.mark.parametrize(
    ("attack", "targeted"),
    [(ATTACK, True), (ATTACK, False), (SaliencyDrop(7), False), (Perturb(searches=1, iterations=3), True)],
)
def test_kept_batches_are_read_and_not_made_again(
    attack: PGD, targeted: bool, model: Counting, points: Tensor, labels: Tensor, tmp_path: Path
) -> None:
    call = functools.partial(
        attack_in_batches,
        attack,
        model,
        points,
        labels,
        (labels + 1) % 4 if targeted else None,
        batch_size=4,
    )
    folder = tmp_path / "new" / "folder"
    first = call(folder=folder)
    assert equal(first, call())
    assert sorted(path.name[:7] for path in folder.iterdir()) == ["000000-", "000004-"]
    Counting.asked = 0
    assert equal(call(folder=folder), first)
    assert Counting.asked == 0


def test_an_interrupted_attack_goes_on_from_its_last_finished_batch(
    model: Counting, points: Tensor, labels: Tensor, tmp_path: Path
) -> None:
    call = functools.partial(attack_in_batches, ATTACK, model, points, labels, batch_size=2)
    expected = call()
    Counting.asked, Counting.fails_after = 0, 10  # a batch asks 2 x 4 times
    with pytest.raises(KeyboardInterrupt):
        call(folder=tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]
    Counting.asked, Counting.fails_after = 0, None
    assert equal(call(folder=tmp_path), expected)
    assert Counting.asked == 16


def test_nothing_stale_is_used(model: Counting, points: Tensor, labels: Tensor, tmp_path: Path) -> None:
    """Every change of what the result depends on leads to new files."""
    other = Counting()
    other.net.head[2].bias.data[0] += 1e-9
    buffered = Counting()
    buffered.net.head[0].running_mean[0] += 1e-9
    configured = Counting()
    configured.net.head[0].eps = 1e-4
    moved = points.clone()
    moved[5, 0, 0] += 1e-12
    targets = (labels + 1) % 4
    calls = [
        (ATTACK, model, points, labels, None, 0),
        (PGD("linf", delta=0.3, iterations=4), model, points, labels, None, 0),
        (PGD("l2", delta=0.3, iterations=3), model, points, labels, None, 0),
        (ATTACK, other, points, labels, None, 0),
        (ATTACK, buffered, points, labels, None, 0),
        (ATTACK, configured, points, labels, None, 0),
        (ATTACK, victim(), points, labels, None, 0),
        (ATTACK, model, moved, labels, None, 0),
        (ATTACK, model, points.float().double(), labels, None, 0),
        (ATTACK, model, points, (labels + 1) % 4, None, 0),
        (ATTACK, model, points, labels, targets, 0),
        (ATTACK, model, points, labels, None, 1),
        (Transfer(ATTACK, model), model, points, labels, None, 0),
        (Transfer(ATTACK, other), model, points, labels, None, 0),
    ]
    for number, (*given, goal, seed) in enumerate(calls, 1):
        attack_in_batches(*given, goal, batch_size=6, folder=tmp_path, seed=seed)
        assert len(list(tmp_path.iterdir())) == number
    for *given, goal, seed in calls:
        attack_in_batches(*given, goal, batch_size=6, folder=tmp_path, seed=seed)
    assert len(list(tmp_path.iterdir())) == len(calls)
    attack_in_batches(ATTACK, model.train(), points, labels, batch_size=6, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(calls)  # the mode makes no difference to an attack


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "text"])
def test_damaged_files_are_made_again_with_a_warning(
    damage: str,
    model: Counting,
    points: Tensor,
    labels: Tensor,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    call = functools.partial(attack_in_batches, ATTACK, model, points, labels, batch_size=6, folder=tmp_path)
    first = call()
    (path,) = tmp_path.iterdir()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "foreign":
        with np.load(path) as file:
            arrays = dict(file)
        np.savez(path, **{**arrays, "digest": np.array("0" * 64), "points": arrays["points"] + 1})
    else:
        path.write_bytes(b"" if damage == "empty" else b"not an archive")
    with caplog.at_level(logging.WARNING):
        assert equal(call(), first)
    assert "computed again" in caplog.text and path.name in caplog.text
    caplog.clear()
    assert equal(call(), first)
    assert not caplog.text


def test_errors_name_the_example_of_the_whole_set(model: Counting, points: Tensor, labels: Tensor) -> None:
    points[5, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="example 5 has NaN"):
        attack_in_batches(ATTACK, model, points, labels, batch_size=2)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        attack_in_batches(ATTACK, model, clouds(), labels, batch_size=0)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        attack_in_batches(ATTACK, model, clouds(), labels, batch_size=2, seed=-1)


def test_a_model_that_is_only_a_function_is_not_kept(points: Tensor, labels: Tensor, tmp_path: Path) -> None:
    net = victim()

    def model(given: Tensor) -> Tensor:
        return net(given)

    attack_in_batches(ATTACK, model, points, labels, batch_size=3)
    with pytest.raises(ValueError, match=r"only cached for a torch\.nn\.Module: a function cannot be told"):
        attack_in_batches(ATTACK, model, points, labels, batch_size=3, folder=tmp_path)
    with pytest.raises(ValueError, match=r"surrogate is .*<locals>.*, which cannot be identified"):
        attack_in_batches(Transfer(ATTACK, model), net, points, labels, batch_size=3, folder=tmp_path)


def test_progress_is_shown_on_request(
    model: Counting, points: Tensor, labels: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    attack_in_batches(ATTACK, model, points, labels, batch_size=3)
    assert capsys.readouterr() == ("", "")
    attack_in_batches(ATTACK, model, points, labels, batch_size=3, progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "2/2" in shown.err


Rewrite = Callable[[str, str, str], None]


@pytest.fixture
def rewrite(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Rewrite:
    """Lets a module's source be another, in which a text is replaced."""

    def replace(module: str, old: str, new: str) -> None:
        loaded = sys.modules[module]
        text = Path(str(loaded.__file__)).read_text()
        assert old in text
        changed = tmp_path_factory.mktemp("source") / "changed.py"
        changed.write_text(text.replace(old, new))
        monkeypatch.setattr(loaded, "__file__", str(changed))

    return replace


@pytest.mark.parametrize(
    ("attack", "module", "old", "new"),
    [
        (ATTACK, "attacks.gradient.pgd", "taken[active] += 1", "taken[active] += 2"),
        (ATTACK, "attacks.functional.losses", "return loss if targeted else -loss", "return loss"),
        (ATTACK, "attacks.functional.projections", "clamp_max(1)", "clamp_max(2)"),
        (ATTACK, "attacks.base", "TOLERANCE = 1e-4", "TOLERANCE = 1e-3"),
        (ATTACK, "ifdefense.geometry.points", "total = a.new_zeros(())", "total = a.new_ones(())"),
        (Perturb(searches=1, iterations=1), "attacks.functional.distances", "amax(1)", "amin(1)"),
        (Perturb(searches=1, iterations=1), "attacks.optimised.carlini_wagner", "/ 2)", "/ 3)"),
        (Perturb(searches=1, iterations=1), "attacks.best_so_far", "rank > had", "rank >= had"),
        (Transfer(ATTACK, victim()), "attacks.gradient.pgd", "taken[active] += 1", "taken[active] += 2"),
    ],
)
def test_a_change_of_code_that_an_attack_imports_makes_its_batches_again(
    attack: PGD, module: str, old: str, new: str, points: Tensor, labels: Tensor, tmp_path: Path,
    rewrite: Rewrite,
) -> None:  # fmt: skip
    def files() -> int:
        attack_in_batches(attack, victim(), points, labels, batch_size=6, folder=tmp_path)
        return len(list(tmp_path.iterdir()))

    assert files() == 1
    rewrite(module, old, new)
    assert files() == 2


def test_docstrings_comments_and_code_of_other_attacks_make_no_difference(rewrite: Rewrite) -> None:
    before = digest(ATTACK)
    rewrite("attacks.functional.losses", '"""Cross-entropy of', '"""Crossed entropy of')
    rewrite(
        "attacks.base",
        "        labels = self._classes",
        "        # A comment.\n        labels = self._classes",
    )
    rewrite("attacks.oracle", '"""Indices of examples in a batch."""', "")
    rewrite("attacks.optimised.carlini_wagner", "/ 2)", "/ 3)")
    rewrite("attacks", "__all__ = [", "__all__: list[str] = [")
    assert digest(ATTACK) == before
    assert digest(Perturb()) != before


def test_the_code_of_a_defence_counts(rewrite: Rewrite) -> None:
    model = DefenceAware(victim(), ifdefense.load("sor"))
    before = digest(model)
    assert before == digest(DefenceAware(victim(), ifdefense.load("sor")))
    assert before != digest(DefenceAware(victim(), ifdefense.load("srs")))
    assert before != digest(DefenceAware(victim(), ifdefense.load("sor"), eot=EOT(3)))
    rewrite("attacks.defence_aware.model", "# adds exactly 0", "# adds 0")
    assert digest(model) == before
    rewrite("ifdefense.stages.outliers", "return ", "pass; return ")
    assert digest(model) != before
