"""Reads weights without ever running code that a file brings along; writes half-precision safetensors."""

from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn

WRAPPERS = ("model", "model_state_dict", "state_dict")
"""Entries under which public checkpoints keep their tensors."""


class CheckpointError(ValueError):
    """A file of weights cannot be read, or does not fit the network."""


def load_state(path: str | Path) -> dict[str, Tensor]:
    """Reads the tensors of a ``.safetensors`` file, or of a ``.pth``/``.pt`` file with ``weights_only=True``.

    A dict of tensors may stand bare or under one of :data:`WRAPPERS`; the prefix ``module.`` is taken off.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is truncated, holds no tensors, or is a pickle that wants to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is no complete safetensors file: {error}") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is refused: it is no plain file of tensors ({reason})") from None
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or no checkpoint: {error}") from None
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
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def load_metadata(path: str | Path) -> dict[str, str]:
    """The text entries that were written beside the tensors of a ``.safetensors`` file.

    Returns:
        The entries; none for a file without any or of another format.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is truncated.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix != ".safetensors":
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no complete safetensors file: {error}") from None


def load_into(module: nn.Module, state: Mapping[str, Tensor], source: str | Path = "the checkpoint") -> None:
    """Copies tensors into a module, all of them or none.

    Half-precision tensors are taken into the module's own dtype.

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
    """Writes a module's tensors in one step, wider floats as float16: a reader never sees half a file.

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
    """Path of ``name.safetensors`` among the weights that travel with a package.

    Raises:
        ValueError: listing the names there are.
    """
    folder = Path(str(resources.files(package))) / "weights"
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.safetensors"))) or "none"
        raise ValueError(f"no weights named {name!r} are shipped with {package}; there are: {known}")
    return path
