"""Purifiers by name: `ifdefense.load`."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from ifdefense.arguments import device_of
from ifdefense.guard import loading
from ifdefense.purifiers.base import Purifier
from ifdefense.purifiers.registry import DEFAULT, METHODS, known
from ifdefense.purifiers.saving import load_saved


@loading
def load(name_or_path: str | Path = DEFAULT, *, device: str | torch.device | None = None) -> Purifier:
    """Loads a method by name, from a file of weights, or from a folder; frozen, in evaluation mode.

    Args:
        name_or_path: one of `ifdefense.purifiers.registry.METHODS`; a folder of `ifdefense.Purifier.save`; a
            file of weights by ``ifdefense train``; or a public Occupancy Networks checkpoint.
        device: device of the weights; by default the CPU.

    Raises:
        TypeError: if the device is neither a name nor a `torch.device`.
        ValueError: if there is no such method, file or device, or what was saved is damaged.

    Examples:
        >>> purifier = ifdefense.load("sor")
        >>> purifier(points, num_points=48).shape
        torch.Size([2, 48, 3])
    """
    name = known(name_or_path)
    target = None if device is None else device_of(device)
    if name in METHODS:
        purifier = METHODS[name].make()
    elif Path(name).is_dir():
        purifier = load_saved(Path(name))
        if not isinstance(purifier, Purifier):
            raise ValueError(f"{name} holds a {type(purifier).__name__}, not a purifier")
    else:
        from ifdefense.purifiers.pretrained import onet_mesh

        purifier = onet_mesh(name)
    return purifier if target is None else purifier.to(target)


def _from_pretrained(cls: type[Purifier], name_or_path: str | Path | None = None) -> Purifier:
    """Deprecated name of `ifdefense.load`."""
    warnings.warn(
        "Purifier.from_pretrained will be removed in version 0.2: call ifdefense.load",
        DeprecationWarning,
        stacklevel=2,
    )
    return load(DEFAULT if name_or_path is None else name_or_path)


# Set here, as the base class must not import purifiers.
Purifier.from_pretrained = classmethod(_from_pretrained)  # type: ignore[attr-defined]
