"""Attacks on many clouds, batch by batch, that go on where they were interrupted."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import logging
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from attacks.base import Attack, AttackResult, Model

_LOG = logging.getLogger(__name__)
_FIELDS = ("points", "success", "queries", "iterations")
_DISTANCE = "distance "


def attack_in_batches(
    attack: Attack,
    model: Model,
    points: Tensor,
    labels: Tensor,
    targets: Tensor | None = None,
    *,
    batch_size: int,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
) -> AttackResult:
    """Attacks clouds batch by batch; with a folder, finished batches are kept there and not made again.

    Every batch starts from the same seed, so the result does not depend on the batch size. A file's name and
    contents carry a digest of the attack's class, source file and settings, of the model's class, settings
    and tensors, of the seed, and of the batch itself. Files of another run are left alone and never read; one
    that cannot be read is made again, with a warning. The model's *code* does not count: empty the folder
    when it changes.

    Args:
        attack: the attack.
        model: ``(B, N, 3)`` points to ``(B, C)`` logits; with a folder, an `nn.Module`.
        points: ``(S, N, 3)`` clean clouds.
        labels: ``(S,)`` true classes.
        targets: ``(S,)`` classes to aim at, or ``None``.
        batch_size: clouds at a time.
        folder: where finished batches are kept; made where it is missing.
        seed: of every batch.
        progress: whether a bar is shown.

    Returns:
        The result for all clouds, on the device of the points.

    Raises:
        ValueError: if the input is not as described (says which example), or if there is a folder and the
            model or a setting of the attack cannot be told from another by its values, such as a function.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    labels, targets = attack._validated(points, labels, targets)
    stem = "" if folder is None else _run_digest(attack, model, seed)
    if folder is not None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
    results = []
    for start in tqdm(range(0, len(points), batch_size), "attack", unit="batch", disable=not progress):
        rows = slice(start, start + batch_size)
        batch = points[rows], labels[rows], None if targets is None else targets[rows]
        path = key = None
        if folder is not None:
            key = digest(stem, *batch)
            path = folder / f"{start:06d}-{key[:16]}.npz"
            kept = _read(path, key, points.device)
            if kept is not None:
                results.append(kept)
                continue
        result = attack(model, *batch, generator=torch.Generator().manual_seed(seed))
        if path is not None and key is not None:
            _write(path, key, result)
        results.append(result)
    return _joined(results)


def digest(*values: object) -> str:
    """SHA-256 of values, in hexadecimal digits, the same in every process.

    Tensors, arrays and modules count by what they hold, other objects by their class and attributes.

    Raises:
        ValueError: if a value cannot be told from another so: functions inside functions, open files, ...
    """
    total = hashlib.sha256()
    for index, value in enumerate(values):
        for part in _parts(value, f"value {index}", {}):
            # With its length before it, no two sequences of parts give the same bytes.
            total.update(f"{len(part)}:".encode())
            total.update(part)
    return total.hexdigest()


def _run_digest(attack: Attack, model: Model, seed: int) -> str:
    """What all batches of a run have in common."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"batches are only kept for a model that is a torch.nn.Module: one {type(model).__name__} cannot "
            "be told from another; wrap it, or give no folder"
        )
    return digest(attack, model, seed)


def _parts(value: object, name: str, seen: dict[int, tuple[int, object]]) -> Iterable[bytes]:
    """Bytes that tell a value from others; ``seen`` numbers the objects passed, and keeps them alive."""
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
    """Names and values of what an object holds."""
    if isinstance(value, Attack):
        yield "source", [_source(cls) for cls in type(value).__mro__ if issubclass(cls, Attack)]
    if isinstance(value, dict):
        for index, (key, child) in enumerate(value.items()):
            yield f"key {index}", key
            yield f"[{key!r}]", child
    elif isinstance(value, list | tuple):
        yield from ((str(index), child) for index, child in enumerate(value))
    elif isinstance(value, set | frozenset):
        yield "members", sorted(digest(member) for member in value)
    elif isinstance(value, nn.Module):
        # The mode does not count: attacks put every module into evaluation mode.
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


def _source(cls: type) -> bytes:
    """The file that a class is written in."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return b"" if file is None else Path(file).read_bytes()


def _write(path: Path, key: str, result: AttackResult) -> None:
    """Writes a finished batch in one step."""
    arrays = {name: getattr(result, name).cpu().numpy() for name in _FIELDS}
    arrays |= {_DISTANCE + name: value.cpu().numpy() for name, value in result.distances.items()}
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, digest=np.array(key), **arrays)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path, key: str, device: torch.device) -> AttackResult | None:
    """A finished batch, or ``None`` where there is none that can be used."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["digest"]) != key:
                _LOG.warning("%s: it belongs to another run and is made again", path)
                return None
            arrays = {
                name: torch.from_numpy(file[name]).to(device) for name in file.files if name != "digest"
            }
        sizes = {
            name.removeprefix(_DISTANCE): value
            for name, value in arrays.items()
            if name.startswith(_DISTANCE)
        }
        return AttackResult(distances=sizes, **{name: arrays[name] for name in _FIELDS})
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        _LOG.warning("%s: it cannot be read (%s) and is made again", path, error)
        return None


def _joined(results: list[AttackResult]) -> AttackResult:
    """One result of several."""
    sizes = {name: torch.cat([result.distances[name] for result in results]) for name in results[0].distances}
    whole = {name: torch.cat([getattr(result, name) for result in results]) for name in _FIELDS}
    return AttackResult(distances=sizes, **whole)
