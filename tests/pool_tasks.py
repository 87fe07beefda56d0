"""Tasks of the tests of pools, in a module that workers import quickly."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from ifdefense.pool import Pool, ending


def answer(work: str, task: object) -> tuple[str, int]:
    """Ends its process, raises, or names its process."""
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "raise":
        raise KeyError("no such thing")
    return f"{work} {task}", os.getpid()


def linger(work: str, task: str) -> None:
    """Works for a minute on a temporary file."""
    path = Path(task)
    path.touch()
    try:
        for _ in range(600):
            time.sleep(0.1)
    finally:
        path.unlink()


def interrupt(pool: Pool[Any, Any], path: Path) -> None:
    """Interrupts a pool in the middle of `linger`."""
    with ending(pool):
        pool.submit(str(path))
        for _ in range(600):
            if path.exists():
                raise KeyboardInterrupt
            time.sleep(0.1)


def talk(work: str, task: Any) -> Any:
    """Prints its task and returns it; an answer that cannot be sent to ``None``."""
    os.write(1, f"{work} {task}\n".encode())
    return (lambda: None) if task is None else task


class Held:
    """A method that waits while 20 results are there, or 60 once there is a file ``go on`` beside them."""

    def __init__(self, purifier: Any, folder: Path) -> None:
        self.purifier, self.folder = purifier, folder

    def trace(self, *given: Any, **options: Any) -> Any:
        while len(list(self.folder.glob("[0-9]*.ply"))) >= (60 if (self.folder / "go on").exists() else 20):
            time.sleep(0.02)
        return self.purifier.trace(*given, **options)
