"""Digests of values: what tells one run of an attack from another."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attacks.base import Attack
from ifdefense.provenance import code_digest, modules_of


def digest(*values: object) -> str:
    """SHA-256 of values in hexadecimal, the same in every process.

    Tensors and arrays count by their contents; attacks and modules of `attacks` by their attributes and code;
    purifiers by their ``spec()`` and code; other objects by their class and attributes; functions by name.
    What counts as code, see `ifdefense.provenance.code_digest`.

    Raises:
        ValueError: if a value has no such identity: local functions, open files, ...
    """
    total = hashlib.sha256()
    for index, value in enumerate(values):
        for part in _parts(value, f"value {index}", {}):
            # With its length before it, no two sequences of parts give the same bytes.
            total.update(f"{len(part)}:".encode())
            total.update(part)
    return total.hexdigest()


def _parts(value: object, name: str, seen: dict[int, tuple[int, object]]) -> Iterable[bytes]:
    """Bytes that identify a value; ``seen`` numbers the objects so far and keeps them alive."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        yield f"{type(value).__name__} {value!r}".encode()
    elif isinstance(value, torch.dtype | torch.device | torch.Size | enum.Enum | Path):
        yield f"{type(value).__name__} {value}".encode()
    elif isinstance(value, Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray | np.generic):
        if value.dtype.hasobject:
            raise ValueError(f"{name} is an array of objects, which cannot be told from another")
        yield f"array {value.dtype} {value.shape}".encode()
        yield value.tobytes()
    elif isinstance(value, type | types.BuiltinFunctionType | types.FunctionType):
        called = f"{value.__module__}.{value.__qualname__}"
        if "<" in called:
            raise ValueError(f"{name} is {called}, which cannot be told from another by its values")
        yield f"named {called}".encode()
    elif id(value) in seen:
        yield f"again {seen[id(value)][0]}".encode()
    else:
        seen[id(value)] = len(seen), value
        yield f"{type(value).__module__}.{type(value).__qualname__}".encode()
        for key, child in _children(value, name):
            yield key.encode()
            yield from _parts(child, f"{name}.{key}", seen)
        yield b"end"


def _children(value: object, name: str) -> Iterable[tuple[str, Any]]:
    """Names and values of the parts of an object."""
    if isinstance(value, Attack) or type(value).__module__.startswith("attacks."):
        bases = {cls.__module__ for cls in type(value).__mro__ if issubclass(cls, Attack)}
        yield "code", code_digest({type(value).__module__} | bases)
    if isinstance(value, dict):
        for index, (key, child) in enumerate(value.items()):
            yield f"key {index}", key
            yield f"[{key!r}]", child
    elif isinstance(value, list | tuple):
        yield from ((str(index), child) for index, child in enumerate(value))
    elif isinstance(value, set | frozenset):
        yield "members", sorted(digest(member) for member in value)
    elif isinstance(value, nn.Module):
        if "_orig_mod" in value._modules:
            yield "compiled", value._modules["_orig_mod"]
            return
        if callable(spec := getattr(value, "spec", None)):
            try:
                described = spec()
            except TypeError as error:
                raise ValueError(f"{name} cannot be told from another by its values: {error}") from error
            yield "spec", described
            yield "code", code_digest(modules_of(described))
            return
        # Not the mode: attacks put every module into evaluation mode.
        usual = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}
        yield from sorted((key, child) for key, child in vars(value).items() if key not in usual)
        if value._forward_hooks or value._forward_pre_hooks:
            yield "hooks", [*value._forward_hooks.values(), *value._forward_pre_hooks.values()]
    elif dataclasses.is_dataclass(value):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    else:
        try:
            reduced = value.__reduce_ex__(2)  # what a pickle would hold
        except TypeError as error:
            raise ValueError(f"{name} cannot be told from another by its values: {error}") from error
        if isinstance(reduced, str):
            yield "named", reduced
        else:
            call, arguments, state, *items = [*reduced, None, None, None][:5]
            yield "call", call
            yield "arguments", arguments
            yield "state", state
            yield "items", [None if item is None else list(item) for item in items]
