"""Measurements of attacks and defences, and the demo."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.evaluation import Result as Result
    from benchmarks.evaluation import evaluate as evaluate

__all__ = ["Result", "evaluate"]


def __getattr__(name: str) -> Any:
    """Imports what is public when it is used, so that commands start quickly."""
    if name in __all__:
        return getattr(importlib.import_module("benchmarks.evaluation"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
