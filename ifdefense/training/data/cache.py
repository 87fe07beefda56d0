"""Sets that are built once and kept in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar


class Savable(Protocol):
    """A set that can be written into a folder."""

    def save(self, folder: Path) -> None:
        """Writes the set."""
        ...


S = TypeVar("S", bound=Savable)


def cached_set(
    folder: Path, build: Callable[[], S], load: Callable[[Path], S], settings: Mapping[str, Any]
) -> S:
    """Loads a set from ``folder``; builds and saves it first if it is not there with these settings."""
    stamp = folder / "settings.json"
    text = json.dumps(settings, sort_keys=True)
    if not stamp.is_file() or stamp.read_text() != text:
        data = build()
        stamp.unlink(missing_ok=True)
        data.save(folder)
        stamp.write_text(text)  # last, so that an interrupted save is not taken for a set
    return load(folder)
