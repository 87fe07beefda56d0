"""Results as JSON, with date and machine."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ifdefense.data.formats.files import write_bytes
from ifdefense.provenance import versions

FOLDER = Path("benchmarks/results")
"""Folder of the results, relative to the root of a checkout."""


def today() -> str:
    """The date, as ISO 8601."""
    return datetime.now(UTC).date().isoformat()


def machine() -> dict[str, Any]:
    """Properties of the machine that affect times."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write(path: Path, command: str, **result: Any) -> None:
    """Replaces a result, atomically, and adds command, date and machine."""
    write_json(
        path,
        {"command": f"ifdefense-bench {command}", "date": today(), **result, "machine": machine()},
    )


def write_json(path: Path, content: Any) -> None:
    """Replaces a JSON file, atomically.

    Raises:
        DataError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode("utf-8"), force=True)
