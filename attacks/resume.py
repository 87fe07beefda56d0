"""Attacks on many clouds, batch by batch, that resume after an interruption."""

from __future__ import annotations

import logging
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from attacks.base import Attack, AttackResult
from attacks.oracle import Model
from ifdefense.arguments import MAX_SEED, integer
from ifdefense.provenance import digest

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
    """Attacks clouds batch by batch and caches finished batches in a folder.

    Every batch starts from the same seed, so the result does not depend on the batch size. The cache key of a
    batch is a `digest` of the attack, its code, the model, the seed and the batch; other files are ignored,
    damaged batches are computed again with a warning. The code of a bare classifier is not part of the key.

    Args:
        attack: the attack.
        model: ``(B, N, 3)`` points to ``(B, C)`` logits; with a folder, an `nn.Module`.
        points: ``(S, N, 3)`` clean clouds.
        labels: ``(S,)`` true classes.
        targets: ``(S,)`` classes to aim at, or ``None``.
        batch_size: clouds per batch.
        folder: cache, created if missing.
        seed: seed of every batch.
        progress: whether to show a progress bar.

    Raises:
        ValueError: as the attack does (names the example of the whole set), or if there is a folder and the
            model or a setting has no digest, such as a local function.

    Examples:
        >>> attack = attacks.PGD("linf", iterations=2)
        >>> result = attacks.attack_in_batches(attack, classifier, points, labels, batch_size=1, folder="pgd")
        >>> result.points.shape
        torch.Size([2, 64, 3])
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    seed = integer("seed", seed, 0, MAX_SEED)
    labels, targets = attack.validated(points, labels, targets)
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
            path = folder / f"{start:06d}-{key}.npz"
            kept = _read(path, key, points.device)
            if kept is not None:
                results.append(kept)
                continue
        result = attack(model, *batch, generator=torch.Generator().manual_seed(seed))
        if path is not None and key is not None:
            _write(path, key, result)
        results.append(result)
    with torch.inference_mode(False):
        return _joined(results)


def _run_digest(attack: Attack, model: Model, seed: int) -> str:
    """Digest of the common inputs of all batches of a run."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"batches are only cached for a torch.nn.Module: a {type(model).__name__} cannot be told from "
            "another; wrap it, or give no folder"
        )
    return digest(attack, model, seed)


def _write(path: Path, key: str, result: AttackResult) -> None:
    """Writes a finished batch atomically."""
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
    """A cached batch, or ``None`` if there is none to use."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["digest"]) != key:
                _LOG.warning("%s: belongs to another run, computed again", path)
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
        _LOG.warning("%s: cannot be read (%s), computed again", path, error)
        return None


def _joined(results: list[AttackResult]) -> AttackResult:
    """Concatenates results."""
    sizes = {name: torch.cat([result.distances[name] for result in results]) for name in results[0].distances}
    whole = {name: torch.cat([getattr(result, name) for result in results]) for name in _FIELDS}
    return AttackResult(distances=sizes, **whole)
