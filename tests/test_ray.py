"""Purification and the benchmark on a real cluster of Ray: two nodes of two CPUs on this machine.

Run with ``pytest -m ray tests/test_ray.py``.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from pool_tasks import answer, interrupt, linger

import ifdefense
from ifdefense import cli, distributed
from ifdefense.data.formats import read_cloud, write_cloud
from ifdefense.distributed import PurifyBatch, RayTasks
from ifdefense.pool import Lost, ending

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ifdefense[ray]'")
pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")
cluster_utils = pytest.importorskip("ray.cluster_utils")

pytestmark = pytest.mark.ray
Points = NDArray[np.float32]
FOLDER = Path(__file__).parent
VICTIM = "pointnet-procedural"
START = 60
LIMIT = 120


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Address of the cluster, to which this process is connected."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_enable_worker_prestart", "0")
        # Workers find the functions and classes of the tests.
        paths = [str(FOLDER), str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        code = "import ray; ray.init('local', num_cpus=1, include_dashboard=False)"
        try:  # where sockets are forbidden, it waits without end
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=START)
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"Ray does not start here: {type(error).__name__}")
        node: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 100 << 20}
        cluster = cluster_utils.Cluster(
            initialize_head=True, head_node_args={**node, "include_dashboard": False}
        )
        try:
            cluster.add_node(**node)
            ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            context.target_max_block_size = 20_000  # several blocks, of a few clouds each
            yield cluster.address
        finally:
            ray.shutdown()
            cluster.shutdown()


def wait_for(found: Callable[[], bool], seconds: float = LIMIT) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def ended(*arguments: object, **options: Any) -> tuple[int, str]:
    """Exit code and output of a command that must end."""
    run = subprocess.run(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
        check=False,
        **options,
    )
    return run.returncode, run.stdout


def begun(*arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class Noted(PurifyBatch):
    """Notes the number of its process in a folder when it is called, and takes its time."""

    def __init__(self, notes: str, **options: Any) -> None:
        super().__init__(**options)
        self.note = Path(notes, str(os.getpid()))

    def __call__(self, batch: Any) -> Any:
        self.note.touch()
        time.sleep(0.2)
        return super().__call__(batch)


class Impatient(PurifyBatch):
    """Gives up earlier."""

    patience = 5.0


def write_table(folder: Path, clouds: list[Points], per_file: int) -> None:
    folder.mkdir()
    for start in range(0, len(clouds), per_file):
        part = clouds[start : start + per_file]
        ids = [f"{start + index:03d}" for index in range(len(part))]
        table = pa.table({"id": ids, "points": [list(cloud) for cloud in part]})
        pq.write_table(table, folder / f"{start:03d}.parquet")


@pytest.fixture
def clouds(box_cloud: Points) -> list[Points]:
    return [box_cloud[index : index + 100 + index % 3] for index in range(96)]


def test_an_actor_is_killed_and_every_cloud_comes_once_with_the_same_bits(
    address: str, tmp_path: Path, clouds: list[Points]
) -> None:
    given = [cloud.copy() for cloud in clouds]
    given[37][5, 1] = np.nan
    write_table(tmp_path / "in", given, 24)
    notes = tmp_path / "notes"
    notes.mkdir()
    options = {"notes": str(notes), "method": "srs", "seed": 4, "num_points": 64}
    table = ray.data.read_parquet(str(tmp_path / "in"), override_num_blocks=4).map_batches(
        Noted,
        fn_constructor_kwargs=options,
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=1,
        batch_size=8,
    )
    killed: list[int] = []
    for batch in table.iter_batches(batch_size=8):
        if not killed:
            killed = [int(path.name) for path in notes.iterdir()][:1]
            os.kill(killed[0], signal.SIGKILL)
            rows: dict[str, tuple[Any, str]] = {}
        for name, points, error in zip(batch["id"], batch["points"], batch["error"], strict=True):
            assert name not in rows
            rows[name] = points, error
    assert killed and len(rows) == 96
    assert len(list(notes.iterdir())) >= 2  # others did the rest
    assert "NaN" in rows["037"][1]
    np.testing.assert_array_equal(np.stack(list(rows["037"][0])), given[37])
    good = [index for index in range(96) if index != 37]
    expected = ifdefense.purify([clouds[index] for index in good], "srs", 64, seed=4)
    for index, points in zip(good, expected, strict=True):
        found, error = rows[f"{index:03d}"]
        assert error == ""
        np.testing.assert_array_equal(np.stack(list(found)), points)


def test_actors_that_take_every_cpu_are_refused(address: str, tmp_path: Path, clouds: list[Points]) -> None:
    write_table(tmp_path / "in", clouds[:8], 4)
    table = ray.data.read_parquet(str(tmp_path / "in")).map_batches(
        Impatient,
        fn_constructor_kwargs={"method": "sor"},
        compute=ray.data.ActorPoolStrategy(size=4),
        num_cpus=1,
    )
    with pytest.raises(Exception, match="must leave at least one of the 4 CPUs"):
        table.materialize()


PIPELINE = """
import sys
import ray
from ray.data.checkpoint import CheckpointConfig
from test_ray import Noted

address, folder = sys.argv[1:]
ray.init(address, log_to_driver=False, logging_level="ERROR")
context = ray.data.DataContext.get_current()
context.target_max_block_size = 20_000
context.checkpoint_config = CheckpointConfig(
    "id", f"{folder}/checkpoint", delete_checkpoint_on_success=False
)
table = ray.data.read_parquet(f"{folder}/in").map_batches(
    Noted,
    fn_constructor_kwargs={"notes": f"{folder}/notes", "method": "sor"},
    compute=ray.data.ActorPoolStrategy(size=2),
    num_cpus=1,
    batch_size=8,
)
table.write_parquet(f"{folder}/out")
"""


def rows_of(folder: Path) -> list[str]:
    return [name for path in folder.glob("*.parquet") for name in pq.read_table(path)["id"].to_pylist()]


def test_a_killed_driver_is_restarted_and_every_cloud_is_written_once(
    address: str, tmp_path: Path, clouds: list[Points]
) -> None:
    write_table(tmp_path / "in", clouds, 8)
    (tmp_path / "notes").mkdir()
    command = ["-c", PIPELINE, address, str(tmp_path)]
    driver = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: len(list((tmp_path / "checkpoint").glob("**/*.parquet"))) >= 2)
    finally:
        driver.kill()
        driver.wait()
    before = rows_of(tmp_path / "out")
    assert 8 <= len(before) < 96
    code, text = ended(*command)
    assert code == 0, text
    found = rows_of(tmp_path / "out")
    assert sorted(set(found)) == [f"{index:03d}" for index in range(96)]
    assert len(found) - 96 <= 16  # at most one shard per worker twice


@pytest.fixture
def scans(tmp_path: Path, clouds: list[Points], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("scans").mkdir()
    for index, cloud in enumerate(clouds[:20]):
        write_cloud(f"scans/{index:02d}.ply", cloud)
    Path("scans/bad.xyz").write_text("1 2\n")
    return tmp_path


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_command_gives_on_a_cluster_what_it_gives_in_one_process(address: str, scans: Path) -> None:
    call = ["purify", "scans", "--method", "srs", "--report-clouds", "3"]
    one = CliRunner().invoke(cli.main, [*call, "-o", "one", "--report", "one.html"])
    two = CliRunner().invoke(cli.main, [*call, "-o", "two", "--report", "two.html", "--ray", address])
    assert (one.exit_code, two.exit_code) == (1, 1)
    assert two.output == one.output and "20 of 21 files done" in two.output
    assert tree(scans / "two") == tree(scans / "one")
    assert "02.ply" in Path("two.html").read_text() and "03.ply" not in Path("two.html").read_text()
    assert ray.is_initialized()  # it was before


def test_a_command_that_is_killed_on_a_cluster_resumes(address: str, scans: Path) -> None:
    call = ["-m", "ifdefense", "purify", "scans", "-o", "out", "--method", "local-mesh", "--ray", address]
    driver = begun(*call)
    try:
        wait_for(lambda: len(list(Path("out").glob("[0-9]*.ply"))) >= 2)
    finally:
        driver.kill()
        driver.wait()
    result = CliRunner().invoke(cli.main, [*call[2:], "--skip-existing"])
    assert result.exit_code == 1 and "bad.xyz" in result.output, result.output
    found = sorted(Path("out").glob("[0-9]*.ply"))
    assert len(found) == 20
    assert all(len(read_cloud(path)) == 100 + index % 3 for index, path in enumerate(found))


def test_a_dead_worker_loses_its_task_alone(address: str) -> None:
    told: list[str] = []
    tasks = RayTasks[object, tuple[str, int]](answer, "answer", address, told.append)
    found: dict[object, tuple[str, int] | Lost] = {}
    with ending(tasks):
        for task in ("a", "die", "raise", "b"):
            tasks.submit(task)
        while tasks.busy():
            found.update(tasks.wait())
    assert [found[task][0] for task in "ab"] == ["answer a", "answer b"]  # type: ignore[index]
    assert isinstance(found["die"], Lost) and found["die"].died
    assert found["raise"] == Lost("KeyError: 'no such thing'")
    assert told == []


def test_an_interrupt_stops_tasks_which_remove_their_temporary_files(address: str, tmp_path: Path) -> None:
    path, start = tmp_path / "temporary", time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupt(RayTasks(linger, None, address, print), path)
    assert not path.exists()
    assert time.monotonic() - start < 50


def test_a_full_disk_on_a_worker_is_an_error_of_each_file(address: str, scans: Path) -> None:
    from ifdefense import batch
    from ifdefense.batch_plan import plan

    work = batch.Work(ifdefense.load("sor"), batch.Settings(), folder=scans)
    told: list[str] = []
    tally = batch.Tally(0, told.append, lambda _: None)
    tasks = RayTasks[Any, Any](purify_on_full_disk, work, address, told.append)
    batch.purify_in_pool(work.settings, plan(["scans"], "out").jobs, tally, tasks)
    assert tally.failed == 21
    assert "error: scans/00.ply: out/00.ply: it could not be written: File too large" in told
    assert list(Path("out").iterdir()) == []


def purify_on_full_disk(work: Any, shard: Any) -> Any:
    """As `purify_shard`, where no file may be longer than 100 bytes."""
    import resource

    from ifdefense.batch import purify_shard

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        return purify_shard(work, shard)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("listens", [False, True])
def test_a_cluster_that_does_not_answer_is_refused(
    listens: bool, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also an address at which something else accepts connections."""
    monkeypatch.setattr(distributed, "ANSWER", 4.0)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()
        place = f"127.0.0.1:{server.getsockname()[1]}"
        start = time.monotonic()
        result = CliRunner().invoke(
            cli.main, ["purify", "scans", "-o", "out", "--method", "sor", "--ray", place]
        )
    assert time.monotonic() - start < 30
    assert result.exit_code == 2
    assert ("no cluster of Ray answers" if listens else "there is no cluster of Ray") in result.output
    assert not Path("out").exists()


DEFENCE = """
import os, signal
from pathlib import Path

def fragile(points):
    "Ends its process the first time."
    if not Path("ended").exists():
        Path("ended").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return points

def broken(points):
    raise ArithmeticError("no such cloud")
"""


def test_shards_of_the_grid_survive_their_workers_and_failing_ones_are_reported(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import executors
    from benchmarks.cells import Cell
    from benchmarks.clouds import load_clouds
    from benchmarks.shards import Store, Task

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", address)
    Path("mine.py").write_text(DEFENCE)
    clouds = load_clouds("procedural", clouds=4)
    tasks = [
        Task(
            "scored",
            Cell("pointnet-procedural", "clean", name, "none"),
            0,
            clouds,
            "pointnet-procedural",
            f"mine.py:{name}",
        )
        for name in ("fragile", "broken")
    ]
    reported: list[Task] = []
    failures = executors.ray(tasks, Store(Path("store")), report=reported.append)
    assert sorted(task.cell.defence for task in reported) == ["broken", "fragile"]
    assert [failure.task for failure in failures] == [tasks[1]]
    assert "ArithmeticError: no such cloud" in failures[0].error
    assert len(list(Path("store").rglob("*.npz"))) == 1
