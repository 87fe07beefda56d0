"""Checkpoints: loading without arbitrary code execution, saving as float16 safetensors."""

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

from ifdefense.geometry.axes import axis_of

WRAPPERS = ("model", "model_state_dict", "state_dict", "net")
"""Keys under which public checkpoints store the state dict."""

RELEASED = re.compile(r"onet_\w+-[0-9a-f]{8}\.pt|shapenet_\w+\.pt")
"""Files that the authors of (Convolutional) Occupancy Networks released: trained on ShapeNet, which is y up
(https://github.com/autonomousvision/convolutional_occupancy_networks/issues/25)."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read or does not fit the network."""


def _numpy_scalars() -> list[Any]:
    """Globals of pickled NumPy scalars, under the names of NumPy 1 and 2; no arrays, no objects."""
    scalar = np.float64().__reduce__()[0]
    dtypes = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [np.dtype, *dtypes, *((scalar, name) for name in names)]


def load_pickle(path: Path) -> Any:
    """Loads a file of `torch.save` with tensors, plain Python values and NumPy scalars, onto the CPU.

    Raises:
        CheckpointError: if the file is damaged or its pickle refers to anything else, which is not executed.
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
                f"{path} is refused: it is no plain file of tensors, loading it would run {what}"
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


def load_state(path: str | Path) -> dict[str, Tensor]:
    """Loads a state dict from a ``.safetensors`` file or a file of `torch.save`, such as ``.pth``.

    Public checkpoints load unchanged: the state dict may be stored under one of `WRAPPERS`, beside optimiser
    state and numbers, and names may have the prefix ``module.``.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged, has no tensors, is a pickle that would execute code, or a
            tensor is not finite.
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
    """Metadata of a ``.safetensors`` file; empty for other formats.

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


def stated_axis(path: str | Path) -> str | None:
    """Up axis of the shapes that weights were trained on, as the entry ``"up"`` of their metadata states it.

    Public checkpoints state none, but those in `RELEASED` are known to be y up. ``None`` if it is not known.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged or states an unknown axis.
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
        CheckpointError: if tensors are missing, unexpected or of another shape; lists them.
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
    """Saves a module's state dict atomically, floats as float16.

    Tensors beyond the range of float16, such as running variances of deep residual paths, keep their dtype.
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
    """Path of the shipped weights ``name`` of a package.

    Raises:
        ValueError: if there are none of that name; lists the available ones.
    """
    folder = Path(str(resources.files(package))) / "weights"
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.safetensors"))) or "none"
        raise ValueError(f"no weights named {name!r} are shipped with {package}; there are: {known}")
    return path
