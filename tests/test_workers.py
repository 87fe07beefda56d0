"""``ifdefense purify --workers`` gives what one process gives, also when workers or the command are ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from pool_tasks import answer, interrupt, linger, talk

from ifdefense import batch, cli, pool
from ifdefense.batch import Settings, Tally
from ifdefense.batch_plan import plan, together
from ifdefense.data.formats import read_cloud, write_cloud, write_clouds
from ifdefense.pool import Lost, Processes

Points = NDArray[np.float32]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def purify(*arguments: object) -> Result:
    given = ["purify", *map(str, arguments)]
    return CliRunner().invoke(cli.main, given)


@pytest.fixture
def here(tmp_path: Path, box_cloud: Points, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a folder of clouds, of which two cannot be purified."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans" / "deep").mkdir(parents=True)
    for index in range(9):
        write_cloud(f"scans/s{index}.ply", box_cloud[40 * index : 40 * index + 200 + index])
    write_clouds("scans/deep/m.npz", [box_cloud[:200], box_cloud[200:400]])
    write_cloud("scans/s2.npy", np.ones((100, 3), np.float32))
    Path("scans/s5.xyz").write_text("1 2\n")
    return tmp_path


def test_files_messages_exit_code_and_report_are_those_of_one_process(here: Path) -> None:
    common = ["scans", "--method", "srs", "--report-clouds", "5"]
    one = purify(*common, "-o", "one", "--report", "one.html")
    two = purify(*common, "-o", "two", "--report", "two.html", "--workers", "2")
    assert (one.exit_code, two.exit_code) == (1, 1)
    assert two.output == one.output
    assert "s2.npy" in two.output and "s5.xyz" in two.output and "10 of 12 files done" in two.output
    assert tree(here / "two") == tree(here / "one")
    pages = [Path(page).read_text() for page in ("one.html", "two.html")]
    shown, expected = (re.findall(r"m.npz, cloud|s\d\.ply", page) for page in reversed(pages))
    assert shown == expected and set(shown) == {f"s{index}.ply" for index in range(5)}
    again = purify(*common, "-o", "two", "--skip-existing")
    assert again.exit_code == 1 and "0 of 12 files done, 10 skipped" in again.output
    assert (
        "s0.ply exists already; --force replaces it" in purify(*common, "-o", "two", "--workers", "2").output
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_ends_the_run_with_one_error_and_a_rerun_does_the_rest(
    workers: int, box_cloud: Points, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scans").mkdir()
    for index in range(40):
        write_cloud(f"scans/{index:02d}.ply", box_cloud[index : index + 200])
    filler = small_disk / "filler"
    filler.write_bytes(bytes(200 * 1024))
    call = ["scans", "-o", small_disk / "out", "--method", "srs", "--batch-size", "2"]
    result = purify(*call, "--workers", workers)
    done = [path.name for path in (small_disk / "out").iterdir()]
    assert result.exit_code == 1 and 0 < len(done) < 40
    assert result.output.count("No space left on device") == result.output.count("\n") == 1
    assert f"No space left on device; {len(done)} of 40 files done." in result.output
    assert "the same command with --skip-existing does the rest" in result.output
    filler.unlink()
    result = purify(*call, "--skip-existing")
    assert result.exit_code == 0
    assert result.output == f"{40 - len(done)} of 40 files done, {len(done)} skipped\n"
    assert {path.name for path in (small_disk / "out").iterdir()} == {f"{i:02d}.ply" for i in range(40)}


def test_a_dead_worker_loses_its_task_alone() -> None:
    workers = Processes[object, object](answer, "answer", 2)
    with pool.ending(workers):
        found = dict(pool.answers(workers, deque(["a", "die", "raise", "b", "c"])))
    assert [found[task][0] for task in "abc"] == ["answer a", "answer b", "answer c"]  # type: ignore[index]
    assert os.getpid() not in {found[task][1] for task in "abc"}  # type: ignore[index]
    lost = found["die"]
    assert isinstance(lost, Lost) and lost.died and "ended by signal 9" in lost.reason
    assert found["raise"] == Lost("KeyError: 'no such thing'")


def test_a_worker_that_died_between_tasks_is_replaced() -> None:
    workers = Processes[object, object](answer, "answer", 1)
    with pool.ending(workers):
        _, process = dict(pool.answers(workers, deque("a")))["a"]  # type: ignore[misc]
        os.kill(process, signal.SIGKILL)
        time.sleep(0.2)
        found = dict(pool.answers(workers, deque("bc")))
    assert found["c"][0] == "answer c"  # type: ignore[index]


def test_what_tasks_print_is_no_answer_and_answers_that_cannot_be_sent_are_lost(
    capfd: pytest.CaptureFixture[str],
) -> None:
    large = "x" * 300_000  # more than a pipe holds
    workers = Processes[object, object](talk, "said", 1)
    with pool.ending(workers):
        found = dict(pool.answers(workers, deque([large, None, "after"])))
    assert found[large] == large and found["after"] == "after"
    lost = found[None]
    assert isinstance(lost, Lost) and not lost.died and "pickle" in lost.reason
    printed = capfd.readouterr()
    assert printed.out == "" and "said after" in printed.err


UNGUARDED = """
from collections import deque
from pool_tasks import answer
from ifdefense.pool import Processes, answers, ending

print("the script runs")
with ending(Processes(answer, "answer", 2)) as pool:
    print(sorted(text for _, (text, _) in answers(pool, deque("abc"))))
"""


def test_workers_do_not_run_the_callers_script_again(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.stdout == "the script runs\n['answer a', 'answer b', 'answer c']\n", done.stderr


def test_an_interrupt_stops_workers_which_remove_their_temporary_files(tmp_path: Path) -> None:
    path, start = tmp_path / "temporary", time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupt(Processes(linger, None, 1), path)
    assert not path.exists()
    assert time.monotonic() - start < 50


class Scripted:
    """A pool that answers as told, without processes."""

    size = 1

    def __init__(self, run: Callable[[batch.Shard], list[batch.FileResult] | Lost]) -> None:
        self.run = run
        self.tasks: list[batch.Shard] = []
        self.seen: list[list[str]] = []
        self.closed: list[bool] = []

    def free(self) -> bool:
        return not self.tasks

    def busy(self) -> bool:
        return bool(self.tasks)

    def submit(self, task: batch.Shard) -> None:
        self.tasks.append(task)

    def wait(self) -> list[tuple[batch.Shard, list[batch.FileResult] | Lost]]:
        shard = self.tasks.pop()
        self.seen.append([job.source.name for job in shard.jobs])
        return [(shard, self.run(shard))]

    def close(self, now: bool = False) -> None:
        self.closed.append(now)


def test_files_of_a_dead_worker_are_purified_again_and_a_deadly_one_fails(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when memory runs out: the worker has written a file before it dies of the next one."""
    monkeypatch.setattr(batch, "SHARES", 2)
    jobs = plan(["scans/s0.ply", "scans/s1.ply", "scans/s3.ply", "scans/s4.ply"], "out/").jobs
    Path("out").mkdir()
    Path("out/s4.ply").write_text("precious")
    work = batch.Work(cli.load("sor", "cpu"), Settings())  # type: ignore[arg-type]

    def run(shard: batch.Shard) -> list[batch.FileResult] | Lost:
        done = batch.purify_shard(work, batch.Shard([shard.jobs[0]], 0, shard.tries))
        if any(job.source.name == "s1.ply" for job in shard.jobs):
            return Lost("its process was ended by signal 9", died=True)
        return [*done, *batch.purify_shard(work, batch.Shard(shard.jobs[1:], 0, shard.tries))]

    told: list[str] = []
    advanced: list[int] = []
    tally, scripted = Tally(0, told.append, advanced.append), Scripted(run)
    batch.purify_in_pool(work.settings, jobs, tally, scripted)
    assert scripted.seen == [["s0.ply", "s1.ply"], ["s0.ply"], ["s1.ply"], ["s1.ply"], ["s3.ply", "s4.ply"]]
    assert scripted.closed == [False]
    assert told[0] == "error: scans/s1.ply: its process was ended by signal 9"
    assert len(told) == 2 and "out/s4.ply exists already" in told[1]
    assert (tally.done, tally.failed, advanced) == (2, 2, [1, 0, 1, 0])
    assert Path("out/s4.ply").read_text() == "precious"


def test_a_pool_is_stopped_and_finished_files_are_counted_when_the_command_is_interrupted(here: Path) -> None:
    jobs = plan(["scans/s0.ply", "scans/s1.ply"], "out/").jobs

    def run(shard: batch.Shard) -> list[batch.FileResult]:
        if shard.jobs[0].number == 1:
            raise KeyboardInterrupt
        return [batch.FileResult(0, clouds=1)]

    tally, scripted = Tally(0, print, print), Scripted(run)
    with pytest.raises(KeyboardInterrupt):
        batch.purify_in_pool(Settings(), jobs, tally, scripted)
    assert (scripted.closed, tally.done) == ([True], 1)


def test_messages_come_in_the_order_of_the_files() -> None:
    told: list[str] = []
    tally = Tally(1, told.append, lambda _: None)
    for number in (2, 0, 3):
        tally.add(batch.FileResult(number, [str(number)], traces=[(str(number), None)]))  # type: ignore[list-item]
    assert told == ["0"]
    tally.close()
    assert told == ["0", "2", "3"]
    assert tally.reported == [("0", None)]


def test_files_whose_meshes_could_meet_go_to_one_worker(here: Path) -> None:
    names = ["m-0001.xyz", "m.npz", "n-0001.xyz", "n.ply", "m-0001-0002.ply", "m-2.ply"]
    for name in names:
        write_cloud(name, read_cloud("scans/s0.ply"))
    groups = [[job.source.name for job in group] for group in together(plan(names, "out").jobs)]
    assert groups == [["m-0001.xyz", "m.npz"], ["n-0001.xyz"], ["n.ply"], ["m-0001-0002.ply"], ["m-2.ply"]]


def test_a_mesh_of_an_interrupted_run_is_replaced(here: Path) -> None:
    Path("out").mkdir()
    Path("out/s0.mesh.ply").write_text("half a result")
    call = ["scans/s0.ply", "-o", "out/", "--mesh", "--method", "onet-mesh"]
    assert "s0.mesh.ply exists already" in purify(*call).output
    result = purify(*call, "--skip-existing")
    assert result.exit_code == 0, result.output
    assert Path("out/s0.mesh.ply").read_bytes().startswith(b"ply")


@pytest.fixture
def many(here: Path, box_cloud: Points) -> Path:
    """Clouds for many shards."""
    Path("many").mkdir()
    row = np.concatenate([box_cloud + np.float32([2 * place, 0, 0]) for place in range(6)])
    for index in range(160):
        write_cloud(f"many/{index:03d}.ply", row[index : index + 5000])
    return here


def workers(process: int) -> set[int]:
    """Processes of the workers."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return {int(child) for child in children if b"serve()" in Path(f"/proc/{child}/cmdline").read_bytes()}


def wait_for(found: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Commands that are ended with the test."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


HELD = """
import signal
from pathlib import Path
from pool_tasks import Held
from ifdefense import cli

# Ignored, and inherited so, if the tests run in the background of a shell.
signal.signal(signal.SIGINT, signal.default_int_handler)
load = cli.load
cli.load = lambda *given: Held(load(*given), Path("out"))
cli.main()
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the workers are found in /proc")
@pytest.mark.parametrize("end", ["Ctrl-C", "SIGKILL"])
def test_after_a_worker_and_the_command_were_ended_every_file_is_there(
    end: str, many: Path, started: list[subprocess.Popen[str]]
) -> None:
    call = ["purify", "many", "-o", "out", "--method", "sor-smooth"]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, "-c", HELD, *call, "--workers", "2"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    started.append(process)
    out = many / "out"

    def finished(count: int) -> bool:
        return out.is_dir() and len(list(out.glob("[0-9]*.ply"))) >= count

    wait_for(lambda: finished(20))
    os.kill(next(iter(workers(process.pid))), signal.SIGKILL)
    (out / "go on").touch()
    wait_for(lambda: finished(40))
    left = workers(process.pid)
    if end == "Ctrl-C":  # to all processes, as a terminal does
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.kill()
    text, _ = process.communicate(timeout=60)
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in left))
    if end == "Ctrl-C":
        assert process.returncode == 1, text
        assert "Aborted!" in text and "Traceback" not in text
    (out / "go on").unlink()
    done = [path.name for path in out.iterdir() if not path.name.startswith(".")]
    assert 40 <= len(done) < 160
    assert len(list(out.iterdir())) <= len(done) + 1  # the killed worker may have left a hidden file
    for name in done:
        assert read_cloud(out / name).shape == (5000, 3)
    result = purify(*call[1:], "--skip-existing")
    assert result.exit_code == 0, result.output
    assert f"{160 - len(done)} of 160 files done, {len(done)} skipped" in result.output
    assert len(list(out.glob("[0-9]*.ply"))) == 160
