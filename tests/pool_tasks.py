"""Tasks of the tests of pools, in a module that workers import quickly."""

from __future__ import annotations

import os
import signal


def answer(work: str, task: object) -> tuple[str, int]:
    """Ends its process, raises, or names its process."""
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "raise":
        raise KeyError("no such thing")
    return f"{work} {task}", os.getpid()
