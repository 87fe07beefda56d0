"""Digests of code, tensors and plain data, as keys of caches and results."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import sys
from collections.abc import Collection, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor, nn

REGISTRIES = frozenset({"ifdefense.purifiers.registry"})
"""Modules excluded from digests: they only select others by name."""

_DIGITS = 16


def code_digest(modules: Iterable[str]) -> str:
    """Digest of modules and their imports, 16 hexadecimal digits.

    Imports, including lazy ones, are followed within the top-level packages of the modules and this package;
    for other packages see `versions`. The digest covers syntax trees without docstrings, so comments,
    docstrings and formatting do not change it.

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
        if name in found or name in REGISTRIES or path is None:
            continue
        found[name], imports = _parsed(path, path.stat().st_mtime_ns)
        imported = (_absolute(each, name, path) for each in imports)
        pending += [_module(*each) for each in imported if each[0].partition(".")[0] in packages]
    return digest(sorted(found.items()))


def digest(value: Any) -> str:
    """Digest of JSON-serialisable data, or of a tensor's shape, dtype and values."""
    if isinstance(value, Tensor):
        head = f"{value.dtype} {tuple(value.shape)}".encode()
        return hashlib.sha256(head + value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[
            :_DIGITS
        ]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def digest_of_weights(module: nn.Module) -> str:
    """SHA-256 of the names and values of a module's tensors, 16 hexadecimal digits."""
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
    """Versions of this package and of torch."""
    return {name: metadata.version(name) for name in ("ifdefense", "torch")}


def _source(module: str) -> Path | None:
    """Source file of a module, found without importing it."""
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
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), imports


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
