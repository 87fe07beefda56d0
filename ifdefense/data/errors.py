"""Errors of the readers, and imports of optional packages."""

from __future__ import annotations

import importlib
from typing import Any


class DataError(ValueError):
    """An unusable file or folder; the message names it and the reason."""


def optional(module: str, package: str | None = None) -> Any:
    """Imports an optional package.

    Raises:
        ImportError: if it is not installed; the message names the package to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this needs {module}, which is not installed: pip install {package or module}"
        ) from error
