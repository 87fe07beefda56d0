"""Digests of other people's functions, objects and networks, as keys of results."""

from __future__ import annotations

import contextlib
import dis
import functools
import logging
import secrets
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ifdefense.provenance import code_digest, digest, digest_of_weights, modules_of

_LOG = logging.getLogger(__name__)

_OURS = {"ifdefense", "attacks", "classifiers", "benchmarks"}
_INSTALLED = {"site-packages", "dist-packages"}


def identity(value: Any) -> str:
    """Digest of a callable: its code and the code it uses, its constants, and its weights.

    Covers the files of its modules and of their imports in the same package or folder, the code of functions
    without a file, defaults, variables of enclosing functions, named global variables, attributes, and
    tensors. Installed packages are covered by name and version.

    A value that cannot be identified, such as an open file, gets another digest in every call, so that
    results are not reused; this is logged as a warning.
    """
    return digest(list(_parts(value, {}, getattr(value, "__name__", type(value).__name__))))


Seen = dict[int, Any]
"""Objects by id, which keeps them alive, so that ids are unique."""


def _parts(value: Any, seen: Seen, name: str) -> Iterator[str]:
    """Texts that identify a value; each function, class or object is described once."""
    if isinstance(value, functools.partial):
        yield from _parts((value.func, value.args, value.keywords), seen, name)
    elif isinstance(value, types.MethodType):
        yield from _parts((value.__func__, value.__self__), seen, name)
    elif isinstance(value, list | tuple):
        yield f"{type(value).__name__} {len(value)}"
        for index, part in enumerate(value):
            yield from _parts(part, seen, f"{name}[{index}]")
    elif isinstance(value, types.ModuleType):
        yield from _package(value.__name__)
    elif id(value) in seen:
        yield "again"
    elif isinstance(value, dict):
        seen[id(value)] = value
        for key, part in value.items():
            yield repr(key)
            yield from _parts(part, seen, f"{name}[{key!r}]")
    elif isinstance(value, types.FunctionType):
        seen[id(value)] = value
        yield f"{value.__module__}.{value.__qualname__}"
        yield from _function(value, seen)
    elif isinstance(value, type):
        seen[id(value)] = value
        yield from _class(value, seen)
    elif isinstance(value, nn.Module):
        seen[id(value)] = value
        yield from _network(value, seen, name)
    elif not _installed(type(value).__module__) and hasattr(value, "__dict__"):
        seen[id(value)] = value
        yield from _parts((type(value), vars(value)), seen, name)
    else:
        yield _constant(value, name)


def _function(value: types.FunctionType, seen: Seen) -> Iterator[str]:
    yield from _package(value.__module__)
    if _installed(value.__module__):
        return
    yield from _code(value.__code__, seen)
    yield from _parts((value.__defaults__, value.__kwdefaults__), seen, value.__name__)
    for variable, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # the variable has no value yet
            yield from _parts(cell.cell_contents, seen, variable)
    for used in _globals(value.__code__):
        if used in value.__globals__:
            yield used
            yield from _parts(value.__globals__[used], seen, used)


def _code(code: types.CodeType, seen: Seen) -> Iterator[str]:
    yield digest(code.co_code, list(code.co_names), list(code.co_varnames))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code(constant, seen)
        else:
            yield _constant(constant, code.co_name)


def _globals(code: types.CodeType) -> list[str]:
    """Names of global variables in code, including inner functions."""
    names = {
        step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return sorted(names.union(*map(_globals, inner)))


def _class(value: type, seen: Seen) -> Iterator[str]:
    """Methods and constants of a class and its bases."""
    for base in value.__mro__:
        yield f"{base.__module__}.{base.__qualname__}"
        yield from _package(base.__module__)
        if _installed(base.__module__):
            continue
        for key, part in sorted(vars(base).items()):
            inner = [getattr(part, place, None) for place in ("__func__", "fget", "fset", "func")]
            methods = [each for each in (part, *inner) if isinstance(each, types.FunctionType)]
            if methods or not (key.startswith("__") or key == "_abc_impl"):
                yield key
                yield from _parts(methods or part, seen, key)


def _network(value: nn.Module, seen: Seen, name: str) -> Iterator[str]:
    """Weights, code and attributes of a network and its parts, or the description of a purifier."""
    if callable(spec := getattr(value, "spec", None)):
        described = spec()
        yield repr(described)
        yield code_digest(modules_of(described))
        return
    yield digest_of_weights(value)
    usual = vars(nn.Module()).keys()
    for place, part in value.named_modules():
        yield place
        if type(part).__module__.partition(".")[0] == "torch":
            yield f"{type(part).__qualname__} {part.extra_repr()}"
            continue
        kept = {key: each for key, each in vars(part).items() if key not in usual}
        yield from _parts((type(part), kept), seen, f"{name}.{place}" if place else name)


def _package(module: str) -> Iterator[str]:
    """A module: the code of our own and of those of the user, the version of installed ones."""
    top = module.partition(".")[0]
    if top in _OURS or not _installed(module):
        yield code_digest([module])
    elif top not in sys.stdlib_module_names:
        yield f"{top} {getattr(sys.modules.get(top), '__version__', '')}"


def _installed(module: str) -> bool:
    """Whether a module is not the user's own: of Python, an installed package, or this project."""
    top = module.partition(".")[0]
    if top == "__main__":
        return False
    if top in _OURS or top in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and bool(_INSTALLED & set(Path(file).parts))


def _constant(value: Any, name: str) -> str:
    try:
        return digest(value)
    except (ValueError, TypeError, RecursionError):
        kind = type(value).__name__
        _LOG.warning("%s is a %s, which cannot be identified, so results are not reused", name, kind)
        return secrets.token_hex(8)
