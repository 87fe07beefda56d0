"""Results as JSON, with the machine they were measured on."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ifdefense.data.formats import replacing

FOLDER = Path("benchmarks/results")
"""Where results go, from the root of a checkout."""


def machine() -> dict[str, Any]:
    """What a time depends on beside the code."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "ifdefense": metadata.version("ifdefense"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not a Linux
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes a result in one step, over an older one of the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, force=True) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def text_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns for a terminal, the first one to the left and the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(row: list[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *cells]).rstrip()

    rule = "  ".join("─" * width for width in widths)
    return "\n".join([line(header), rule, *map(line, rows)])
