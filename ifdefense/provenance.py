"""Digests of values and code, as keys of caches, results and training runs."""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import hashlib
import importlib.util
import sys
import types
from collections.abc import Collection, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_DIGITS = 16


class ByCode:
    """Base of classes whose objects have a `digest` of their code as well as their attributes."""


def digest(*values: object) -> str:
    """SHA-256 of values, 16 hexadecimal digits, reproducible across processes.

    Covers shape, dtype and contents of tensors and arrays; ``spec()`` and code of purifiers; class and
    attributes of other objects, and their code if they are `ByCode`; names of functions; items of lists,
    tuples and dictionaries, in order.

    Raises:
        ValueError: if a value cannot be identified, such as a local function or an open file.

    Examples:
        >>> digest(1.0, "sor"), digest(points) == digest(points.clone())
        ('...', True)
    """
    total = hashlib.sha256()
    for index, value in enumerate(values):
        for part in _parts(value, f"value {index}", {}):
            # Parts are prefixed by their length, so that different sequences give different bytes.
            total.update(f"{len(part)}:".encode())
            total.update(part)
    return total.hexdigest()[:_DIGITS]


def code_digest(modules: Iterable[str]) -> str:
    """Digest of modules and their imports, 16 hexadecimal digits.

    Imports, including lazy ones, are followed within the top-level packages of the modules and this package,
    and from files in no package to those in their folder. For other packages see `versions`. The digest
    covers syntax trees without docstrings, so comments, docstrings and formatting do not change it.

    Args:
        modules: names of modules, such as ``"attacks.gradient.pgd"``. Modules without Python source, such as
            ``builtins``, are ignored.
    """
    pending = list(modules)
    packages = {name.partition(".")[0] for name in [*pending, __name__]}
    found: dict[str, str] = {}
    while pending:
        name = pending.pop()
        path = _source(name)
        if name in found or path is None:
            continue
        found[name], imports = _parsed(path, path.stat().st_mtime_ns)
        imported = (_absolute(each, name, path) for each in imports)
        pending += [
            _module(*each)
            for each in imported
            if (top := each[0].partition(".")[0]) in packages or _is_beside(path, top)
        ]
    return digest(sorted(found.items()))


def digest_of_weights(module: nn.Module) -> str:
    """SHA-256 of the names and values of a module's tensors, 16 hexadecimal digits.

    Examples:
        >>> len(digest_of_weights(classifier))
        16
    """
    total = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        total.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return total.hexdigest()[:_DIGITS]


def modules_of(spec: Any) -> set[str]:
    """Modules of the classes named in a spec, see `ifdefense.purifiers.specs.describe`."""
    if isinstance(spec, dict):
        own = {spec["class"].partition(":")[0]} if isinstance(spec.get("class"), str) else set()
        return own.union(*(modules_of(value) for value in spec.values()))
    return set().union(*map(modules_of, spec)) if isinstance(spec, list) else set()


def versions() -> dict[str, str]:
    """Versions of this package and of torch.

    Examples:
        >>> sorted(versions())
        ['ifdefense', 'torch']
    """
    return {name: metadata.version(name) for name in ("ifdefense", "torch")}


def _is_beside(path: Path, top: str) -> bool:
    """Whether a module is in the same folder as a file that is in no package."""
    folder = path.parent
    return not (folder / "__init__.py").exists() and (
        (folder / f"{top}.py").is_file() or (folder / top / "__init__.py").is_file()
    )


def _source(module: str) -> Path | None:
    """Source file of a module, without importing it."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is not None:
        return Path(file) if file.endswith(".py") else None
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # __main__ of an interactive session
        return None
    folders = (spec.submodule_search_locations if spec is not None else None) or ()
    for place in (Path(folder, *rest) for folder in folders):
        for path in (place / "__init__.py", place.with_name(f"{place.name}.py")):
            if path.is_file():
                return path
    return None


@functools.lru_cache(maxsize=1024)
def _parsed(path: Path, changed: int) -> tuple[str, Collection[tuple[int, str, str | None]]]:
    """Digest of a file's syntax tree, and its imports as ``(level, module, name)``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = set(_imports(tree))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [part for part in body if not _is_text(part)]  # type: ignore[attr-defined]
    return digest(ast.dump(tree)), imports


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _imports(tree: ast.AST) -> Iterator[tuple[int, str, str | None]]:
    """All imports except those under ``TYPE_CHECKING``."""
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING":
            pending += node.orelse
        else:
            pending += ast.iter_child_nodes(node)


def _absolute(imported: tuple[int, str, str | None], importer: str, path: Path) -> tuple[str, str | None]:
    """Resolves a relative import: full name of the module, and the imported name."""
    level, module, name = imported
    if level:
        drop = level - (path.name == "__init__.py")
        parent = importer.split(".")
        module = ".".join([*parent[: len(parent) - drop], *([module] if module else [])])
    return module, name


def _module(module: str, name: str | None) -> str:
    """Module of an import: the submodule if ``name`` is one."""
    inner = f"{module}.{name}"
    return inner if name is not None and _source(inner) is not None else module


def _parts(value: object, name: str, seen: dict[int, tuple[int, object]]) -> Iterator[bytes | memoryview]:
    """Bytes that identify a value; ``seen`` numbers previous objects and keeps them alive."""
    if value is None or isinstance(value, bool | int | float | complex | str):
        yield f"{type(value).__name__} {value!r}".encode()
    elif isinstance(value, bytes):
        yield type(value).__name__.encode()
        yield value
    elif isinstance(value, torch.dtype | torch.device | torch.Size | enum.Enum | Path):
        yield f"{type(value).__name__} {value}".encode()
    elif isinstance(value, Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    elif isinstance(value, np.ndarray | np.generic):
        if value.dtype.hasobject:
            raise ValueError(f"{name} is an array of objects, which cannot be identified")
        yield f"array {value.dtype} {value.shape}".encode()
        yield np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
    elif isinstance(value, type | types.BuiltinFunctionType | types.FunctionType):
        called = f"{value.__module__}.{value.__qualname__}"
        if "<" in called:
            raise ValueError(f"{name} is {called}, which cannot be identified by its values")
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


def _children(value: object, name: str) -> Iterator[tuple[str, Any]]:
    """Names and values of the parts of an object."""
    if isinstance(value, ByCode):
        bases = {cls.__module__ for cls in type(value).__mro__ if issubclass(cls, ByCode)}
        yield "code", code_digest(bases - {__name__})
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
                raise ValueError(f"{name} cannot be identified by its values: {error}") from error
            yield "spec", described
            yield "code", code_digest(modules_of(described))
            return
        # The mode is ignored, as attacks put every module into evaluation mode.
        usual = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}
        yield from sorted(
            (key, child)
            for key, child in vars(value).items()
            # PyG's layers cache their sources in inspectors, only in the first layer of each class.
            if key not in usual and type(child).__module__ != "torch_geometric.inspector"
        )
        if value._forward_hooks or value._forward_pre_hooks:
            yield "hooks", [*value._forward_hooks.values(), *value._forward_pre_hooks.values()]
    elif dataclasses.is_dataclass(value):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    else:
        try:
            reduced = value.__reduce_ex__(2)  # contents of a pickle
        except TypeError as error:
            raise ValueError(f"{name} cannot be identified by its values: {error}") from error
        if isinstance(reduced, str):
            yield "named", reduced
        else:
            call, arguments, state, *items = [*reduced, None, None, None][:5]
            yield "call", call
            yield "arguments", arguments
            yield "state", state
            yield "items", [None if item is None else list(item) for item in items]
