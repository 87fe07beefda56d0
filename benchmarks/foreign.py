"""Finds defences and victims (stand-in for the skeleton)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

import classifiers
import ifdefense
from ifdefense.provenance import digest_of_weights


@dataclasses.dataclass(frozen=True, eq=False)
class Victim:
    """A classifier."""

    title: str
    model: nn.Module
    weights: str


def defence_of(what: Any, *, num_points: int | None = None) -> Any:
    """The purifier of a name; ``None`` for no defence."""
    if what is None or what == "none":
        return None
    return ifdefense.load(what) if isinstance(what, str) else what


def victim_of(what: Any) -> Victim:
    """A shipped classifier by its name, ``NETWORK:FILE``, or a module."""
    if isinstance(what, nn.Module):
        return Victim(type(what).__name__, what, digest_of_weights(what))
    network, colon, path = what.partition(":")
    model = classifiers.load(network, path) if colon else classifiers.load(what)
    title = f"{network}-{Path(path).stem}" if colon else what
    return Victim(title, classifiers.upright(classifiers.fold(model)), digest_of_weights(model))


def model_of(what: Any) -> Victim:
    """A classifier that contains its defence."""
    return victim_of(what)
