"""Defends point-cloud classifiers by rebuilding the surface behind an attacked cloud.

>>> from ifdefense import purify
>>> clean = purify(points)  # (N, 3), (B, N, 3) or a list of clouds, NumPy or torch
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ifdefense.geometry.mesh import Mesh
    from ifdefense.purifiers.base import Purifier, Trace
    from ifdefense.purifiers.compose import Compose
    from ifdefense.purifiers.defended import Defended
    from ifdefense.purifiers.function import purify
    from ifdefense.purifiers.loading import load

    __version__: str

_HOMES = {
    "Compose": "ifdefense.purifiers.compose",
    "Defended": "ifdefense.purifiers.defended",
    "Mesh": "ifdefense.geometry.mesh",
    "Purifier": "ifdefense.purifiers.loading",  # which gives it its deprecated `from_pretrained`
    "Trace": "ifdefense.purifiers.base",
    "load": "ifdefense.purifiers.loading",
    "purify": "ifdefense.purifiers.function",
}
__all__ = ["Compose", "Defended", "Mesh", "Purifier", "Trace", "__version__", "load", "purify"]


def __getattr__(name: str) -> Any:
    """Imports the public names on first access; the version is that of the installed package."""
    if name == "__version__":
        from importlib.metadata import version

        return version("ifdefense")
    if name not in _HOMES:
        raise AttributeError(f"module 'ifdefense' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
