"""The benchmark's grid: what is computed, what is reused, and what is said of it."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from grid_parts import Length, clouds, failing, halved, noisy, small
from torch import Tensor

import benchmarks
from benchmarks import evaluate, executors, shards, statistics
from benchmarks.attacked_clouds import AttackedFile, write_attacked
from benchmarks.cells import BLOCK, Cell, grid, knowledges
from benchmarks.executors import serial
from benchmarks.foreign import defence_of, victim_of
from benchmarks.run import run
from benchmarks.shards import Store, StoreError, Task, run_shard
from benchmarks.suite import SUITE, SUITES, Suite
from ifdefense import load, provenance
from ifdefense.provenance import digest

PARTS = Path(__file__).with_name("grid_parts.py")


@functools.cache
def victim() -> Length:
    return Length().eval()


def measure(store: Path | None = None, count: int = BLOCK, **options: Any) -> benchmarks.Result:
    given: dict[str, Any] = {"defence": halved, "victim": victim(), "data": clouds(60), "suite": small()}
    return evaluate(**given | {"store": store, "clouds": count} | options)


class Counting:
    """The serial executor, remembering what it computes."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    def __call__(
        self, tasks: list[Task], store: Store, *, report: Callable[[Task], None]
    ) -> list[executors.Failure]:
        self.tasks += tasks
        return serial(tasks, store, report=report)


def test_public_names_stay_functions_after_their_module_is_imported() -> None:
    import benchmarks.evaluation

    assert callable(benchmarks.evaluate) and isinstance(benchmarks.Result, type)


def test_figures_are_means_and_minima_of_the_cells(tmp_path: Path) -> None:
    result = measure(tmp_path, 10, suite=small(("apgd-linf", "square-linf")))
    assert not result.failures and result.name == "halved"
    assert {cell["defence"] for cell in result.cells} == {"none", "sor", "sor-smooth", "halved"}
    own = {
        (cell["source"], cell["knowledge"]): statistics.unpacked(cell["right"])
        for cell in result.cells
        if cell["defence"] == "halved"
    }
    assert {knowledge for _, knowledge in own} == {
        "none",
        "static",
        "straight-through",
        "transfer:sor",
        "transfer:sor-smooth",
        "surrogate:sor-smooth",
    }
    worst = torch.stack(list(own.values())).all(0)
    assert result.worst == pytest.approx(100 * worst.double().mean())
    adaptive = [right for (_, knowledge), right in own.items() if knowledge not in ("none", "static")]
    assert result.adaptive == pytest.approx(100 * torch.stack(adaptive).all(0).double().mean())
    assert result.worst <= min(result.adaptive, result.static, result.clean)
    # 7 attacks: of each static, straight-through, and from sor and sor-smooth; and by the surrogate.
    assert f"worst of {len(own) - 1} attacks per cloud" in result.text() and "not an average" in result.text()
    undefended = next(cell for cell in result.cells if cell["knowledge"] == "static")
    assert undefended["success"] == pytest.approx(100 - undefended["accuracy"])
    assert undefended["budget"] == {"changes": "shift", "norm": "linf", "epsilon": 0.05, "count": 0}


class Reordered(Length):
    """The victim with its classes in another order."""

    def forward(self, points: Tensor) -> Tensor:
        return super().forward(points).flip(1)


CORRUPTED = dataclasses.replace(small(()), corruptions=("corruption:gaussian@1",))


def test_a_victim_at_chance_is_flagged_even_without_attacks() -> None:
    result = measure(count=4, victim=[Reordered().eval(), victim()], suite=CORRUPTED)
    raised = [flag for flag in result.data["flags"] if flag["name"] == "victim-at-chance"]
    assert {(flag["victim"], flag["defence"]) for flag in raised} == {
        ("Reordered", name) for name in ("none", "sor", "sor-smooth", "halved")
    }
    assert "victim-at-chance" in result.flags
    assert "Reordered classifies 0.0% of 4 clean clouds" in result.text()


def test_weak_attacks_are_left_out_of_the_static_mean(tmp_path: Path) -> None:
    """A tiny budget changes no class, a large one all."""
    result = measure(tmp_path, 8, suite=small(("apgd-linf", "random-drop")), data=clouds(8, 560))
    static = {
        cell["source"]: cell
        for cell in result.cells
        if cell["knowledge"] == "static" and cell["defence"] == "halved"
    }
    success = {
        c["source"]: c["success"] for c in result.cells if c["defence"] == "none" and c["success"] is not None
    }
    assert success["random-drop"] < 80 <= success["apgd-linf"]
    assert result.static == pytest.approx(static["apgd-linf"]["accuracy"])


def test_more_clouds_redo_no_shard_and_a_finished_grid_computes_nothing(tmp_path: Path) -> None:
    first, second, third = Counting(), Counting(), Counting()
    few = measure(tmp_path, 20, executor=first)
    many = measure(tmp_path, 40, executor=second)
    assert {task.block for task in first.tasks} == {0}
    assert {task.block for task in second.tasks} == {1}
    for one, other in zip(few.cells, many.cells, strict=True):
        assert other["clouds"] == 40
        assert [draw[:20] for draw in other["right"]] == one["right"]
    start = time.process_time()
    again = measure(tmp_path, 40, executor=third)
    assert third.tasks == [] and time.process_time() - start < 5
    assert [cell["right"] for cell in again.cells] == [cell["right"] for cell in many.cells]


def test_a_finished_grid_reads_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(tmp_path, 8)
    times: Counter[Path] = Counter()
    original = Store.read

    def read(self: Store, path: Path, *names: str) -> shards.Arrays | None:
        times[path] += 1
        return original(self, path, *names)

    monkeypatch.setattr(Store, "read", read)
    result = measure(tmp_path, 8)
    (example, *_) = result.data["examples"]
    assert example["purified"] and example["predicted"]
    assert len(times) == sum(1 for _ in tmp_path.rglob("*.npz"))
    shown = [path for path, count in times.items() if count > 1]  # clouds of the examples
    assert {path.parts[0] for path in shown} == {"scored", "attacked"} and max(times.values()) == 2
    assert len(shown) == 2


def test_equal_runs_are_equal_and_another_seed_is_another_key(tmp_path: Path) -> None:
    one = measure(tmp_path / "a", 4, defence=noisy)
    other = measure(tmp_path / "b", 4, defence=noisy)
    assert [c["right"] for c in one.cells] == [c["right"] for c in other.cells]
    counting = Counting()
    measure(tmp_path / "a", 4, defence=noisy, seed=1, executor=counting)
    assert len(counting.tasks) > 10


def test_random_defences_are_attacked_over_draws_and_scored_over_others(tmp_path: Path) -> None:
    result = measure(tmp_path, defence=noisy)
    own = [cell for cell in result.cells if cell["defence"] == "noisy"]
    assert {cell["draws"] for cell in own} == {5}
    assert "eot" in {cell["knowledge"] for cell in own}
    assert "straight-through" not in {cell["knowledge"] for cell in own}
    seen = knowledges(load("local-random"), 8)
    assert list(seen) == ["eot", "exact"] and seen["eot"].eot.samples == 8
    assert not set(seen["eot"].eot.seeds(0)) & set(range(shards.FRESH, shards.FRESH + 5))


def test_a_surrogate_is_stronger_than_its_start_and_is_told_apart_from_it(tmp_path: Path) -> None:
    result = measure(tmp_path)
    own = {cell["knowledge"]: cell for cell in result.cells if cell["defence"] == "halved"}
    assert own["surrogate:sor-smooth"]["accuracy"] <= own["transfer:sor-smooth"]["accuracy"]
    # At most the gradients of the plain attack, besides those of the start.
    assert own["surrogate:sor-smooth"]["passes"] == own["straight-through"]["passes"]
    assert not any(
        "surrogate" in c["knowledge"] for c in result.cells if c["defence"] in ("none", "sor-smooth")
    )


def test_the_start_of_a_surrogate_is_in_its_key_and_read_from_the_store(tmp_path: Path) -> None:
    given = {"knowledge": "surrogate:sor-smooth", "known": "sor-smooth"}
    task, store = one_task(kind="attacked", **given), Store(tmp_path)
    assert task.key != one_task(kind="attacked", knowledge="straight-through").key
    assert task.key != one_task(kind="attacked", **given | {"known": "sor"}).key
    assert one_task(**given).attacked.key == task.key
    start = task.through_known
    run_shard(start, store)
    written = (tmp_path / start.path).stat().st_mtime_ns
    run_shard(task, store)
    assert (tmp_path / start.path).stat().st_mtime_ns == written
    shift = torch.from_numpy(store.read(task.path)["points"]) - task.clouds.points
    assert 0.04 < shift.abs().max() <= 0.0501


def one_task(kind: str = "scored", source: str = "apgd-linf", **options: Any) -> Task:
    labelled = clouds(8)
    cell = Cell("Length", source, options.pop("name", "halved"), options.pop("knowledge", "static"))
    given: dict[str, Any] = {"victim": victim(), "defence": halved, "effort": "quick"} | options
    return Task(kind=kind, cell=cell, block=0, clouds=labelled, **given)  # type: ignore[arg-type]


def test_attackers_average_over_draws_where_these_change_the_logits() -> None:
    def task(
        defence: str, victim: str = "pointnet-procedural", source: str = "apgd-linf", most: int = 8
    ) -> Task:
        cell = Cell(victim, source, defence, "eot")
        return Task("attacked", cell, 0, clouds(2), victim, defence, effort="quick", samples=most)

    # SOR draws which points it repeats: a maximum over points ignores that, a graph of neighbours does not.
    assert shards._samples(task("sor")) == shards._samples(task("sor-ae")) == 1
    assert task("sor").key == task("sor", most=1).key
    assert shards._samples(task("sor", "dgcnn-small-procedural")) == shards._samples(task("srs")) == 8
    assert shards._samples(task("sor", source="add-200")) == 8  # of more points, a random part is kept
    assert task("srs").key != task("srs", most=1).key


def test_a_damaged_shard_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, task = Store(tmp_path), one_task()
    run_shard(task, store)
    assert task.attacked is not None
    for path, change in ((task.path, b""), (task.attacked.path, None)):
        whole = (tmp_path / path).read_bytes()
        middle = len(whole) // 2
        broken = whole[:middle] if change is None else change
        (tmp_path / path).write_bytes(broken)
        assert store.read(path) is None and "cannot be read" in caplog.text
        (tmp_path / task.path).unlink()
        run_shard(task, store)
        assert (tmp_path / path).read_bytes() != broken
        assert store.read(path) is not None
    # A flipped bit inside of the numbers, too.
    whole = bytearray((tmp_path / task.attacked.path).read_bytes())
    whole[len(whole) // 3] ^= 1
    (tmp_path / task.attacked.path).write_bytes(bytes(whole))
    assert store.read(task.attacked.path) is None


def test_everything_that_makes_a_shard_is_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Length().eval()
    with torch.no_grad():
        other.scale += 1
    keys = [
        one_task().key,
        one_task(seed=1).key,
        one_task(source="apgd-l2").key,
        one_task(knowledge="straight-through").key,
        one_task(victim=other).key,
        one_task(defence=noisy).key,
        one_task(effort="affordable").key,
        one_task(kind="attacked", knowledge="straight-through").key,
        one_task(source="clean", knowledge="none").key,
        one_task(source="corruption:jitter@2", knowledge="none").key,
        one_task(source="corruption:jitter@3", knowledge="none").key,
    ]
    assert len(set(keys)) == len(keys)
    assert one_task().key == keys[0]
    monkeypatch.setattr(shards, "versions", lambda: {"torch": "another"})
    shards.forget()
    assert one_task().key != keys[0]
    shards.forget()


def test_a_changed_attack_is_another_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    before = one_task().key
    changed = SUITE["apgd-linf"].attack("quick").with_epsilon(0.06)
    monkeypatch.setattr(type(SUITE["apgd-linf"]), "attack", lambda *_: changed)
    shards.forget()
    assert one_task().key != before
    shards.forget()


@pytest.mark.parametrize(("file", "new"), [("probing.py", True), ("pgd.py", True), ("suite.py", False)])
def test_evidence_is_made_anew_after_changes_of_the_code_that_makes_it(
    file: str, new: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = provenance._parsed

    def edited(path: Path, changed: int) -> tuple[str, Any]:
        code, imports = original(path, changed)
        return code + "edited" * (path.name == file), imports

    def key() -> str:
        shards.forget()
        cell = Cell("pointnet-procedural", "probe", "sor")
        return Task("probe", cell, 0, clouds(2), cell.victim, cell.defence).key

    before = key()
    monkeypatch.setattr(provenance, "_parsed", edited)
    assert (key() != before) == new
    shards.forget()


def test_a_full_disk_ends_the_run_with_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    original = shards.write_bytes

    def until_full(path: Path, data: bytes, **options: Any) -> None:
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, data, **options)
        written.append(path)

    monkeypatch.setattr(shards, "write_bytes", until_full)
    with pytest.raises(StoreError, match="No space left"):
        measure(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(written)
    monkeypatch.setattr(shards, "write_bytes", original)
    assert not measure(tmp_path).failures


def test_what_fails_is_reported_and_the_rest_is_measured(tmp_path: Path) -> None:
    result = measure(tmp_path, defence=failing)
    assert result.failures and all("out of luck" in str(failure) for failure in result.failures)
    assert {cell["defence"] for cell in result.cells} == {"none", "sor", "sor-smooth"}
    with pytest.raises(ValueError, match=r"failing has no figures: .*out of luck"):
        result.worst  # noqa: B018


def test_a_model_contains_its_defence(tmp_path: Path) -> None:
    result = measure(tmp_path, model=victim(), victim=None, defence=None)
    assert result.name == "Length" and {cell["defence"] for cell in result.cells} == {"none"}
    assert result.worst == result.adaptive <= result.clean


class Shaken(Length):
    """Draws noise from the global generator."""

    def forward(self, points: Tensor) -> Tensor:
        return super().forward(points + 0.01 * torch.randn_like(points))


def test_a_random_model_is_attacked_and_scored_over_draws(tmp_path: Path) -> None:
    result = measure(tmp_path, 4, model=Shaken().eval(), victim=None, defence=None)
    assert {cell["knowledge"] for cell in result.cells} == {"none", "eot"}
    assert {cell["draws"] for cell in result.cells} == {5}
    assert result.worst <= result.static == result.adaptive <= result.clean


def test_attacked_clouds_of_a_file_are_scored_without_an_attack(tmp_path: Path) -> None:
    flat = clouds(24)
    spoilt = dataclasses.replace(flat, points=flat.points * torch.tensor([1.7, 1.7, 1.0]))
    write_attacked(tmp_path / "theirs.npz", AttackedFile(spoilt, None, {"attack": "theirs"}))
    counting = Counting()
    given: dict[str, Any] = {"data": None, "attacked": tmp_path / "theirs.npz", "executor": counting}
    result = measure(tmp_path, None, **given)  # type: ignore[arg-type]
    assert {task.kind for task in counting.tasks} == {"scored"}
    assert {cell["family"] for cell in result.cells} == {"file"} and len(result.cells) == 4
    right = victim()(halved(spoilt.points)).argmax(1) == spoilt.labels
    (figures,) = [one for one in result.figures if one["defence"] == "halved"]
    assert figures["static"]["accuracy"] == pytest.approx(100 * float(right.double().mean()), abs=1e-3)
    assert figures["worst"] is None and "theirs.npz" in result.cells[0]["title"]
    assert "halved" in result.text() and "per cloud" not in result.text()
    assert result.static == figures["static"]["accuracy"] and np.isnan(result.worst)
    with pytest.raises(ValueError, match="give it without other data"):
        measure(tmp_path, None, attacked=tmp_path / "theirs.npz")  # type: ignore[arg-type]


def test_corruptions_are_averaged_without_a_worst(tmp_path: Path) -> None:
    sources = ("corruption:uniform@1", "corruption:uniform@5", "corruption:background@3")
    suite = Suite("corrupted", (), (), (), 8, 8, 1, 5, "quick", sources)
    result = measure(tmp_path, 8, suite=suite)
    own = [c["accuracy"] for c in result.cells if c["defence"] == "halved" and c["family"] == "corruption"]
    (figures,) = [one for one in result.figures if one["defence"] == "halved"]
    assert len(own) == 3 and figures["static"]["accuracy"] == pytest.approx(np.mean(own), abs=0.01)
    assert figures["family"] == "corruption" and figures["worst"] is None


def test_a_budget_in_minutes_picks_the_clouds_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = measure(tmp_path, None, minutes=0.001)  # type: ignore[arg-type]
    assert {cell["clouds"] for cell in result.cells} == {20} and "minutes: 20 clouds" in caplog.text
    many = measure(tmp_path, None, minutes=1000, data=clouds(24))  # type: ignore[arg-type]
    assert many.cells[0]["clouds"] == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "quik"}, "did you mean 'quick'"),
        ({"executor": "process"}, "did you mean 'processes'"),
        ({"model": Length()}, "a model contains its defence"),
        ({"minutes": 1}, "clouds or minutes, not both"),
        ({"count": 0}, "at least 1"),
        ({"count": 61}, "61 clouds are asked for, there are 60"),
        ({"victim": "pointnet-modelnet40"}, "40 classes, ellipsoids has 16"),
        ({"victim": None}, "no shipped classifier was trained on ellipsoids"),
    ],
)
def test_invalid_calls(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(**options)


def test_suites_hold_attacks_of_both_families_and_their_numbers() -> None:
    quick = SUITES["quick"]
    assert len(quick.attacks) == len(quick.adaptive) == 6
    assert {SUITE[name].family for name in quick.attacks} == {"recent", "if-defense"}
    standard = SUITES["standard"]
    assert set(standard.attacks) == set(SUITE)
    assert standard.count("fgm", "static", False) == standard.count("clean", "none", True) == 400
    assert standard.count("perturb", "static", False) == 200
    assert standard.count("perturb", "static", True) == 100
    assert standard.count("apgd-linf", "exact", False) == 100
    assert SUITES["full"].count("perturb", "static", True) == 2468


def test_processes_give_the_same_and_try_a_dead_worker_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DEADLY", str(tmp_path / "died"))
    task = one_task(defence=f"{PARTS}:deadly", victim=f"{PARTS}:Length")
    good = one_task(victim=f"{PARTS}:Length", defence=f"{PARTS}:halved")
    bad = one_task(victim=f"{PARTS}:Length", defence=f"{PARTS}:failing")
    done: list[Task] = []
    store = Store(tmp_path)
    # Keys are computed here, where the deadly one is only tried.
    (failure,) = executors.processes([task, good, bad], store, report=done.append, workers=2)
    assert failure.task is bad and "out of luck" in failure.error
    assert sorted(map(id, done)) == sorted(map(id, [task, good, bad]))
    assert "its process ended with exit code 9; tried again" in caplog.text
    assert store.read(task.path) is not None
    serial([good], Store(tmp_path / "serial"), report=done.append)
    one, other = store.read(good.path), Store(tmp_path / "serial").read(good.path)
    assert one is not None and other is not None
    assert np.array_equal(one["predicted"], other["predicted"])
    with pytest.raises(ValueError, match=r"such as file\.py:NAME"):
        executors.processes([one_task(defence=lambda points: points)], store, report=done.append)


COMMAND = [
    *("--defence", f"{PARTS}:halved", "--victim", f"{PARTS}:Length"),
    *("--clouds", "4"),
]


@pytest.fixture
def few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.evaluation, "load_clouds", lambda *_, **__: clouds(60))
    monkeypatch.setitem(SUITES, "quick", small())


def invoke(folder: Path, *arguments: str) -> Any:
    fixed = ["--store", str(folder / "store"), "--out", str(folder / "out.json")]
    return CliRunner().invoke(run, [*COMMAND, *fixed, *arguments])


def test_the_command_writes_a_result_and_says_what_it_is(few_points: None, tmp_path: Path) -> None:
    outcome = invoke(tmp_path)
    assert outcome.exit_code == 0, outcome.output
    assert "worst of 5 attacks per cloud" in outcome.output and "written to" in outcome.output
    assert '"format": 1' in (tmp_path / "out.json").read_text()


def test_ways_and_draws_per_gradient_are_chosen(few_points: None, tmp_path: Path) -> None:
    noisy = "--defence", f"{PARTS}:noisy", "--adaptive", "--attack", "apgd-linf"
    outcome = invoke(tmp_path, *noisy, "--way", "eot", "--samples", "3")
    assert outcome.exit_code == 0, outcome.output
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["samples"] == 3
    assert {cell["knowledge"] for cell in result["cells"]} == {"none", "eot"}
    few = len(list((tmp_path / "store" / "attacked").rglob("*.npz")))
    invoke(tmp_path, *noisy, "--way", "eot", "--samples", "2")  # another attack
    assert len(list((tmp_path / "store" / "attacked").rglob("*.npz"))) > few


def test_exit_codes_of_the_command(few_points: None, tmp_path: Path) -> None:
    outcome = invoke(tmp_path, "--defence", f"{PARTS}:failing")
    assert outcome.exit_code == 1 and "out of luck" in outcome.output
    assert (tmp_path / "out.json").is_file()
    outcome = invoke(tmp_path, "--defence", "local-mash")
    assert outcome.exit_code == 2 and "did you mean 'local-mesh'" in outcome.output


RUNNER = """
import sys
sys.path.insert(0, {tests!r})
import grid_parts
from pathlib import Path
from benchmarks import evaluate
evaluate(
    defence={tests!r} + "/grid_parts.py:halved",
    victim={tests!r} + "/grid_parts.py:Length",
    data=grid_parts.clouds(24),
    suite=grid_parts.small(("apgd-linf", "square-linf")),
    clouds=24,
    store={store!r},
)
print("done")
"""


def test_a_folder_as_out_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(run, ["--store", str(tmp_path / "store"), "--out", str(tmp_path)])
    assert outcome.exit_code == 2 and "is a directory" in outcome.output
    assert not (tmp_path / "store").exists()


def test_a_killed_run_resumes_and_two_runs_share_a_store(tmp_path: Path) -> None:
    code = RUNNER.format(tests=str(PARTS.parent), store=str(tmp_path / "store"))
    process = subprocess.Popen([sys.executable, "-c", code])
    while sum(1 for _ in tmp_path.rglob("*.npz")) < 5:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: digest(path.read_bytes()) for path in tmp_path.rglob("*.npz") if path.name[0] != "."}
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate()[0] for process in both] == [b"done\n"] * 2
    after = {path: digest(path.read_bytes()) for path in tmp_path.rglob("*.npz") if path.name[0] != "."}
    assert before.items() <= after.items() and len(after) > len(before)
    counting = Counting()
    suite: Suite = small(("apgd-linf", "square-linf"))
    names: dict[str, Any] = {"defence": f"{PARTS}:halved", "victim": f"{PARTS}:Length"}
    result = measure(tmp_path / "store", 24, executor=counting, suite=suite, data=clouds(24), **names)
    assert counting.tasks == [] and not result.failures


def test_a_suite_can_be_cut_down() -> None:
    quick = SUITES["quick"]
    some = quick.only(("add-200", "apgd-linf"), "adaptive")
    assert some.attacks == () and some.adaptive == ("apgd-linf", "add-200") and some.exact == ("apgd-linf",)
    assert quick.only(knowledge="static") == dataclasses.replace(quick, adaptive=(), exact=())
    assert quick.only() == quick
    assert quick.only(ways=("transfer", "exact")) == dataclasses.replace(quick, ways=("exact", "transfer"))
    with pytest.raises(ValueError, match="no ways to choose"):
        quick.only(knowledge="static", ways=("exact",))
    with pytest.raises(ValueError, match="the suite quick has no attack 'pgdd'; it has apgd-linf"):
        quick.only(("pgdd",))


def test_a_run_takes_some_ways_through_the_defences() -> None:
    suite = SUITES["quick"].only(("apgd-linf", "drop-200"), "adaptive", ("exact", "surrogate"))
    victim = victim_of(f"{PARTS}:Length")
    defences = {name: defence_of(name) for name in ("none", "sor", "sor-smooth")}
    assert {
        (cell.source, cell.defence, cell.knowledge) for cell in grid(suite, {victim.title: victim}, defences)
    } == {
        ("clean", "none", "none"),
        ("clean", "sor", "none"),
        ("clean", "sor-smooth", "none"),
        ("apgd-linf", "sor", "exact"),
        ("apgd-linf", "sor", "surrogate:sor-smooth"),
        ("apgd-linf", "sor-smooth", "exact"),
    }


def test_certificates_are_added_on_demand() -> None:
    assert measure(count=4).data["certified"] == []
    (curve,) = measure(count=4, certificates=True).data["certified"]
    assert curve["clouds"] == 4 and curve["defence"] == "voting"
    assert curve["certified"][0] >= curve["certified"][-1]
