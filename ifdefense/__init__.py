"""Defends point-cloud classifiers by rebuilding the surface behind an attacked cloud.

>>> from ifdefense import purify
>>> clean = purify(points)  # (N, 3), (B, N, 3) or a list of clouds, NumPy or torch
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ifdefense.geometry.mesh import Mesh
    from ifdefense.purifiers.purifier import Defended, Purifier, SurfaceOptions, Trace, purify

__version__ = "0.1.0"
__all__ = ["Defended", "Mesh", "Purifier", "SurfaceOptions", "Trace", "__version__", "purify"]

_HOMES = {"Mesh": "ifdefense.geometry.mesh"}


def __getattr__(name: str) -> Any:
    """Imports the stages when they are first asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'ifdefense' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "ifdefense.purifiers.purifier")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
