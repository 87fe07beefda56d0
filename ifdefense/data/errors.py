"""What readers raise, and the import of packages that not every user needs."""

from __future__ import annotations

import importlib
from typing import Any


class DataError(ValueError):
    """A file or folder that cannot be used; the message names it and says why."""


def optional(module: str, package: str | None = None) -> Any:
    """Imports an optional package.

    Raises:
        ImportError: if it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this needs {module}, which is not installed: pip install {package or module}"
        ) from error
