"""Writing results in one step, and never over something that was there unless asked to."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def check_free(path: Path, force: bool = False) -> None:
    """Makes sure that a result may be written.

    Raises:
        FileExistsError: if there is a file at ``path`` and ``force`` is not set, or a folder in any case.
    """
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists already; --force replaces it")


@contextlib.contextmanager
def atomic(path: Path, force: bool = False) -> Iterator[Path]:
    """Gives a path to write to, and puts what was written at ``path`` when the block ends without an error.

    The partial file has the same name and lies in a folder of its own beside it, made with its parents. Nobody
    sees half a file: not when the block raises, and not when the machine stops.

    Args:
        path: where the result is to lie.
        force: whether it may replace a file.

    Raises:
        FileExistsError: as :func:`check_free`, before the block and again after it.
    """
    check_free(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
        partial = Path(folder) / path.name
        yield partial
        check_free(path, force)
        os.replace(partial, path)
