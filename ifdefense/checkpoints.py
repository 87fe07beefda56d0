"""Weights: read without ever running code that a file brings along, written as half-precision safetensors."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WRAPPERS = ("model", "model_state_dict", "state_dict", "net")
"""Entries under which public checkpoints keep their tensors."""


class CheckpointError(ValueError):
    """A file of weights cannot be read, or does not fit the network."""


def _numpy_scalars() -> list[Any]:
    """What a pickled NumPy number is made of, under the names of NumPy 1 and 2; no arrays, no objects."""
    scalar = np.float64().__reduce__()[0]
    dtypes = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [np.dtype, *dtypes, *((scalar, name) for name in names)]


def load_pickle(path: Path) -> Any:
    """What `torch.save` wrote: tensors, plain Python values and NumPy numbers, on the CPU.

    Raises:
        CheckpointError: if the file is damaged, or is a pickle that names anything else, which is not run.
    """
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged files the readers of zip and pickle fail in many ways
        # torch's own message advises to load the file unsafely.
        named = re.search(r"GLOBAL (\S+)|(?:function|but got) (<.*>)", str(error))
        if named:
            what = named[1] or named[2]
            raise CheckpointError(
                f"{path} is refused: it is no plain file of tensors, loading it would run {what}"
            ) from None
        raise CheckpointError(f"{path} {_kind(path)}") from None


def _kind(path: Path) -> str:
    """What a file is that is no checkpoint, as the end of a sentence."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the weights: fetch them with `git lfs pull`"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page, not the weights"
    return "is truncated or no checkpoint"


def load_state(path: str | Path) -> dict[str, Tensor]:
    """Reads the tensors of a ``.safetensors`` file, or of one that `torch.save` wrote, such as ``.pth``.

    Public checkpoints load as their authors' code writes them: the tensors bare or under one of `WRAPPERS`,
    the optimiser, numbers and NumPy's scalars beside them, names with or without the prefix ``module.``.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged, holds no tensors, is a pickle that wants to run code, or a
            tensor holds NaN or infinity.
    """
    path = _existing(path)
    state = _load_safetensors(path) if path.suffix == ".safetensors" else load_pickle(path)
    for wrapper in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if (
        not isinstance(state, Mapping)
        or not state
        or not all(isinstance(value, Tensor) for value in state.values())
    ):
        raise CheckpointError(
            f"{path} holds no dict of tensors, neither bare nor under one of {', '.join(WRAPPERS)}"
        )
    for name, value in state.items():
        bad = int((~value.isfinite()).sum())
        if bad:
            raise CheckpointError(f"{path}: {bad} of the {value.numel()} values of {name} are not finite")
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    return path


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

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
    """The text entries that were written beside the tensors of a ``.safetensors`` file.

    Returns:
        The entries; none for a file without any or of another format.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged.
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


def load_into(module: nn.Module, state: Mapping[str, Tensor], source: str | Path = "the checkpoint") -> None:
    """Copies tensors into a module, in the module's dtype: all of them or none.

    Raises:
        CheckpointError: naming the tensors that are missing, unexpected or of another shape.
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
            f"{source} does not fit {type(module).__name__}: {len(faults)} tensors differ: {shown}"
        )
    module.load_state_dict(dict(state))


def _fits_half(value: Tensor) -> bool:
    return value.is_floating_point() and bool(value.abs().max() <= torch.finfo(torch.float16).max)


def save_safetensors(module: nn.Module, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a module's tensors atomically, floats as float16.

    A tensor with values beyond the range of float16, such as the running variance of a deep residual path,
    keeps its precision.
    """
    from safetensors.torch import save

    path = Path(path)
    state = {
        name: (value.half() if _fits_half(value) else value).detach().cpu().contiguous()
        for name, value in module.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as partial:
        partial.write(save(state, metadata=dict(metadata or {})))
    os.chmod(partial.name, 0o644)
    os.replace(partial.name, path)


def shipped(package: str, name: str) -> Path:
    """Path of ``name.safetensors`` among the weights that a package ships.

    Raises:
        ValueError: if there is none; lists those there are.
    """
    folder = Path(str(resources.files(package))) / "weights"
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.safetensors"))) or "none"
        raise ValueError(f"no weights named {name!r} are shipped with {package}; there are: {known}")
    return path
