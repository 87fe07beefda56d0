"""Checkpoints: loading without arbitrary code execution, saving as float16 safetensors."""

from __future__ import annotations

import itertools
import logging
import os
import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ifdefense.geometry.axes import axis_of

_LOG = logging.getLogger(__name__)

DEPTH = 8
"""Maximum nesting depth of the tensors of a network, and maximum number of parts of their prefix."""

RELEASED = re.compile(r"onet_\w+-[0-9a-f]{8}\.pt|shapenet_\w+\.pt")
"""Files released by the authors of (Convolutional) Occupancy Networks, trained on ShapeNet, which is y up
(https://github.com/autonomousvision/convolutional_occupancy_networks/issues/25)."""


class CheckpointError(ValueError):
    """Raised if a checkpoint cannot be read or does not fit the network."""


def _numpy_scalars() -> list[Any]:
    """Globals of pickled NumPy scalars, under the names of NumPy 1 and 2; no arrays, no objects."""
    scalar = np.float64().__reduce__()[0]
    dtypes = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [np.dtype, *dtypes, *((scalar, name) for name in names)]


def load_pickle(path: Path) -> Any:
    """Loads a file of `torch.save` with tensors, plain Python values and NumPy scalars, onto the CPU.

    Raises:
        CheckpointError: if the file is damaged, or its pickle refers to anything else; nothing is executed.
    """
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip and pickle raise many kinds of errors on damaged files
        # Replaces torch's message, which advises unsafe loading.
        named = re.search(r"GLOBAL (\S+)|(?:function|but got) (<.*>)", str(error))
        if named:
            what = named[1] or named[2]
            raise CheckpointError(
                f"{path} is refused: it does not contain only tensors, and loading it would run {what}"
            ) from None
        raise CheckpointError(f"{path} {_kind(path)}") from None


def _kind(path: Path) -> str:
    """Describes a file that is not a checkpoint, for error messages."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the weights: fetch them with `git lfs pull`"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page, not the weights"
    return "is truncated or no checkpoint"


def load_state(
    path: str | Path,
    names: Collection[str] = (),
    rename: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
) -> dict[str, Tensor]:
    """Loads the tensors of one network from a ``.safetensors`` file or a file of `torch.save`, as ``.pth``.

    Supports checkpoints of training scripts and wrappers: the tensors may be nested under any key, next to
    optimiser state and numbers, and their names may share any prefix, such as ``module.``, ``model.`` or
    ``_orig_mod.``. Key and prefix are chosen such that all ``names`` are found; other tensors, such as the
    weights of a loss, are dropped and logged. If no place has all names, the one with most of them is
    returned, and `load_into` reports the differences.

    Args:
        path: the file.
        names: names of tensors that the network has regardless of its sizes. Without them, the outermost
            dictionary that holds only tensors is returned, without the prefix ``module.``.
        rename: converts public names of tensors to ours; applied after the prefix is removed.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged, has no tensors, is a pickle that would execute code, contains
            the names several times with different values, or a tensor is not finite.

    Examples:
        >>> torch.save({"epoch": 3, "model": {"module.weight": torch.ones(2)}}, "training.pth")
        >>> load_state("training.pth", ["weight"])
        {'weight': tensor([1., 1.])}
    """
    path = _existing(path)
    content = load_tensors(path) if path.suffix == ".safetensors" else load_pickle(path)
    dictionaries = _dictionaries(content, pure=not names)
    if not dictionaries:
        raise CheckpointError(f"{path} holds no dict of tensors, neither bare nor under any key")
    if names:
        state = _place(dictionaries, names, rename, path)
    else:
        state = {
            name.removeprefix("module."): value for name, value in next(iter(dictionaries.values())).items()
        }
    for name, value in state.items():
        bad = int((~value.isfinite()).sum())
        if bad:
            raise CheckpointError(f"{path}: {bad} of the {value.numel()} values of {name} are not finite")
    return state


def _dictionaries(content: Any, pure: bool) -> dict[str, dict[str, Tensor]]:
    """Named tensors of every dictionary in a file, by their path of keys; outermost first.

    Args:
        content: contents of the file.
        pure: whether to skip dictionaries with other values than tensors.
    """
    found, seen = {}, set()
    level = [("", content)]
    for _ in range(DEPTH):
        inner = []
        for key, value in level:
            if not isinstance(value, Mapping) or id(value) in seen:
                continue
            seen.add(id(value))
            tensors = {str(name): each for name, each in value.items() if isinstance(each, Tensor)}
            if tensors and not (pure and len(tensors) < len(value)):
                # torch.compile inserts its prefix at every compiled module.
                found[key] = {
                    re.sub(r"(^|\.)(?:_orig_mod\.)+", r"\1", name): tensors[name] for name in tensors
                }
            inner += [(f"{key}.{name}" if key else str(name), each) for name, each in value.items()]
        level = inner
    return found


def _place(
    dictionaries: Mapping[str, Mapping[str, Tensor]],
    names: Collection[str],
    rename: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    path: Path,
) -> dict[str, Tensor]:
    """Tensors of the dictionary with all names, or with most of them; see `load_state`."""
    wanted, places = set(names), {}
    for key, tensors in dictionaries.items():
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            for end in (0, *(dot.end() for dot in itertools.islice(re.finditer(r"\.", name), DEPTH))):
                parts.setdefault(name[:end], {})[name[end:]] = value
        for prefix in sorted(parts, key=len):
            places[key, prefix] = dict(rename(parts[prefix]))
    key, prefix = max(places, key=lambda place: (len(wanted & places[place].keys()), len(places[place])))
    state = places[key, prefix]
    if wanted <= state.keys():
        others = [place for place in places if wanted <= places[place].keys()]
        if any(not _equal(places[place], state) for place in others):
            labels = (".".join(filter(None, place)).rstrip(".") for place in others)
            shown = " and ".join(f"under {label!r}" if label else "at the top" for label in labels)
            raise CheckpointError(
                f"{path} holds several networks that fit, {shown}: save the intended one in a file of its own"
            )
        beside = [name for name in dictionaries[key] if not name.startswith(prefix)]
        if beside:
            _LOG.info("%s: tensors that do not belong to the network are ignored: %s", path, _first(beside))
    return state


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether both have the same names with the same values."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def _first(names: Collection[str]) -> str:
    """The first names, for messages."""
    return ", ".join(list(names)[:3]) + (f", … ({len(names)})" if len(names) > 3 else "")


def unlike(found: Collection[str], expected: Collection[str]) -> str:
    """Lists the names of tensors found and expected, for error messages."""
    return f"its tensors are {_first(found)}; expected are {_first(expected)}"


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    return path


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a ``.safetensors`` file.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged.

    Examples:
        >>> save_safetensors(classifier, "small.safetensors")
        >>> sorted(load_tensors("small.safetensors"))
        ['layer.bias', 'layer.weight']
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = _existing(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    try:
        kind = _kind(path)
    except OSError:
        kind = "cannot be read"
    return CheckpointError(f"{path} {kind}: {error}")


def load_metadata(path: str | Path) -> dict[str, str]:
    """Metadata of a ``.safetensors`` file; empty for other formats.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged.

    Examples:
        >>> save_safetensors(classifier, "small.safetensors", {"up": "z"})
        >>> load_metadata("small.safetensors")
        {'up': 'z'}
    """
    path = _existing(path)
    if path.suffix != ".safetensors":
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None


def stated_axis(path: str | Path) -> str | None:
    """Up axis of the training shapes, from the entry ``"up"`` of the metadata.

    Public checkpoints lack this entry, but those in `RELEASED` are y up. ``None`` if unknown.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged or the axis is unknown.

    Examples:
        >>> save_safetensors(classifier, "small.safetensors", {"up": "y"})
        >>> stated_axis("small.safetensors")
        'y'
    """
    up = load_metadata(path).get("up")
    if up is None:
        return "y" if RELEASED.fullmatch(Path(path).name) else None
    try:
        return axis_of(up)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def load_into(module: nn.Module, state: Mapping[str, Tensor], source: str | Path = "the checkpoint") -> None:
    """Loads a state dict into a module, in the module's dtype; on errors the module is unchanged.

    Raises:
        CheckpointError: if tensors are missing, unexpected or of another shape; the message lists them, and
            the first names found and expected.

    Examples:
        >>> load_into(classifier, classifier.state_dict())
    """
    own = module.state_dict()
    faults = [f"{name} is missing" for name in own.keys() - state.keys()]
    faults += [f"{name} is unexpected" for name in state.keys() - own.keys()]
    for name in own.keys() & state.keys():
        if own[name].shape != state[name].shape:
            faults.append(f"{name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}")
    if faults:
        shown = "; ".join(sorted(faults)[:8]) + ("; …" if len(faults) > 8 else "")
        raise CheckpointError(
            f"{source} does not fit {type(module).__name__}: {len(faults)} tensors differ: {shown}; "
            + unlike(state, own)
        )
    module.load_state_dict(dict(state))


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Loads a file into a module; errors as `load_state` and `load_into`.

    Examples:
        >>> save_safetensors(classifier, "small.safetensors")
        >>> load_weights(classifier, "small.safetensors")
    """
    load_into(module, load_state(path, module.state_dict()), path)


def _fits_half(value: Tensor) -> bool:
    return value.is_floating_point() and bool(value.abs().max() <= torch.finfo(torch.float16).max)


def save_safetensors(module: nn.Module, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Saves a module's state dict atomically, floats as float16.

    Tensors with values beyond the range of float16, such as running variances of deep residual paths, keep
    their dtype.

    Examples:
        >>> save_safetensors(classifier, "small.safetensors", {"up": "z"})
        >>> load_metadata("small.safetensors")
        {'up': 'z'}
    """
    from safetensors.torch import save

    path = Path(path)
    state = {
        name: (value.half() if _fits_half(value) else value).contiguous()
        for name, value in ((name, value.detach().cpu()) for name, value in module.state_dict().items())
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as partial:
        partial.write(save(state, metadata=dict(metadata or {})))
    os.chmod(partial.name, 0o644)
    os.replace(partial.name, path)


def shipped(package: str, name: str) -> Path:
    """Path of the shipped weights ``name`` of a package.

    Raises:
        ValueError: if the name is unknown; the message lists the available ones.

    Examples:
        >>> shipped("ifdefense", "onet").name
        'onet.safetensors'
    """
    folder = Path(str(resources.files(package))) / "weights"
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.safetensors"))) or "none"
        raise ValueError(f"no weights named {name!r} are shipped with {package}; there are: {known}")
    return path
