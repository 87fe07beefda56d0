"""Specs: objects as JSON-serialisable dictionaries that can be rebuilt."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping, Sequence
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

    Examples:
        >>> describe(ifdefense.load("sor"))["options"]
        {'k': 2, 'alpha': 1.1}
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


def rebuild(spec: Mapping[str, Any], networks: Sequence[Any] = ()) -> Any:
    """Rebuilds an object from its spec.

    Args:
        spec: the description; see `imported` for the classes that it may name.
        networks: networks that are used in place of descriptions with a ``"number"``.

    Raises:
        ValueError: if the weights of a network were not loaded from a file, or differ from the spec, or the
            spec names something else than the class of a part of a purifier.

    Examples:
        >>> purifier = rebuild({"class": "ifdefense.purifiers.filters:LocalSmoothing", "options": {"k": 4}})
        >>> purifier.k
        4
    """
    if "number" in spec:
        return networks[spec["number"]]
    cls = imported(spec["class"])
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
    options = spec.get("options", {})
    return cls(**{name: _undescribed(value, networks) for name, value in options.items()})


def imported(path: str) -> Any:
    """The class named in a spec.

    Modules are imported from this package only; those of other classes must have been imported before. So
    specs run no code but constructors of modules and dataclasses.

    Raises:
        ValueError: if there is no such class, or it is neither a `torch.nn.Module` nor a dataclass.

    Examples:
        >>> imported("ifdefense.purifiers.filters:LocalSmoothing").__name__
        'LocalSmoothing'
    """
    module, _, name = path.partition(":")
    inside = module.partition(".")[0] == __name__.partition(".")[0]
    try:
        found: Any = importlib.import_module(module) if inside else sys.modules[module]
        for part in name.split("."):
            found = getattr(found, part)
    except (KeyError, ImportError, AttributeError):
        hint = "" if inside else f": import {module} first, if you trust it"
        raise ValueError(f"there is no class {path}{hint}") from None
    known = isinstance(found, type) and (issubclass(found, nn.Module) or dataclasses.is_dataclass(found))
    if not known or found.__module__ != module:
        raise ValueError(f"{path} is not the class of a part of a purifier")
    return found


def _undescribed(value: Any, networks: Sequence[Any]) -> Any:
    if isinstance(value, Mapping):
        if "class" in value:
            return rebuild(value, networks)
        return {key: _undescribed(part, networks) for key, part in value.items()}
    return [_undescribed(part, networks) for part in value] if isinstance(value, list) else value
