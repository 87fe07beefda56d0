"""Specs: objects as JSON-serialisable dictionaries that can be rebuilt."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from ifdefense.geometry.axes import UP, trained_axis
from ifdefense.provenance import digest_of_weights


def describe(value: Any) -> Any:
    """Spec of a value: numbers, strings, lists and dictionaries only.

    Frozen dataclasses and objects with a method ``spec()`` are described by class and options, networks by
    class, source, digest of the weights and calibration.

    Raises:
        TypeError: if the value cannot be described.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, type):
        return f"{value.__module__}:{value.__qualname__}"
    if isinstance(value, (list, tuple, nn.ModuleList)):
        return [describe(part) for part in value]
    if isinstance(value, dict):
        return {str(key): describe(part) for key, part in value.items()}
    if hasattr(value, "spec"):
        return value.spec()
    if dataclasses.is_dataclass(value):
        options = {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": describe(type(value)), "options": options}
    if isinstance(value, nn.Module):
        calibration, up = getattr(value, "calibration", None), trained_axis(value)
        return {
            "class": describe(type(value)),
            "source": getattr(value, "source", None),
            "weights": digest_of_weights(value),
            "calibration": describe(calibration),
            "settings": getattr(value, "settings", dict)(),
            # Omitted if it has no effect, so that specs are equal to those of versions without axes.
            **({} if up in (None, UP) else {"up_axis": up}),
        }
    raise TypeError(f"a {type(value).__name__} cannot be described: give it a method spec()")


def rebuild(spec: Mapping[str, Any]) -> Any:
    """Rebuilds an object from its spec.

    Imports the classes named in the spec, so use trusted specs only.

    Raises:
        ValueError: if the weights of a network were not loaded from a file, or differ from the spec.
    """
    cls = _imported(spec["class"])
    if "weights" in spec:
        from ifdefense.implicit.base import load_network

        if spec["source"] is None:
            raise ValueError(f"the weights of {cls.__name__} were not loaded from a file")
        network: Any = getattr(cls, "load", load_network)(spec["source"])
        if digest_of_weights(network) != spec["weights"]:
            raise ValueError(f"the weights in {spec['source']} differ from those in the spec")
        for name, value in spec["settings"].items():
            setattr(network, name, value)
        network.up_axis = spec.get("up_axis", getattr(network, "up_axis", None))
        return network
    return cls(**{name: _undescribed(value) for name, value in spec.get("options", {}).items()})


def _undescribed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return rebuild(value) if "class" in value else {k: _undescribed(part) for k, part in value.items()}
    return [_undescribed(part) for part in value] if isinstance(value, list) else value


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
