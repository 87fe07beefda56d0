"""Purifiers as folders: the spec as JSON, the weights of all networks as safetensors; no pickles.

==========================  ======================================================================
``purifier.json``           format, versions, the spec (`ifdefense.purifiers.specs`), and what each
                            network needs beside its tensors
``weights.safetensors``     tensors of all networks, as ``"0.decoder.fc_p.weight"``; floats are
                            float16 where that is exact
==========================  ======================================================================
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ifdefense.checkpoints import CheckpointError, load_into, load_tensors
from ifdefense.implicit.base import metadata_of
from ifdefense.provenance import digest_of_weights, versions
from ifdefense.purifiers.packing import modules_in
from ifdefense.purifiers.specs import describe, imported, rebuild

if TYPE_CHECKING:
    from ifdefense.purifiers.base import Purifier

SPEC = "purifier.json"
WEIGHTS = "weights.safetensors"
FORMAT = 1
"""Version of the format, raised if older versions of this library cannot read new folders."""


def save(purifier: Purifier, folder: str | Path) -> None:
    """Writes a folder, see `ifdefense.Purifier.save`."""
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not an empty folder; nothing was saved")
    try:
        spec = json.loads(json.dumps(purifier.spec()))
    except TypeError as error:
        raise TypeError(f"{purifier.name} cannot be saved: {error}") from None
    networks: list[dict[str, str]] = []
    tensors: dict[str, Tensor] = {}
    for number, (found, network) in enumerate(_networks(purifier, spec)):
        for each in found:
            each["number"] = number
        networks.append(_metadata(network))
        tensors |= {f"{number}.{name}": _exact(value) for name, value in network.state_dict().items()}
    for name in _classes(spec):
        if "<" in name or name.startswith("__main__:"):
            raise TypeError(f"{purifier.name} cannot be saved: {name} cannot be imported by other programs")
    about = {"format": FORMAT, "versions": versions(), "purifier": spec, "networks": networks}
    _write(target, json.dumps(about, indent=1) + "\n", tensors)


def load_saved(folder: Path) -> Any:
    """The purifier of a folder, see `ifdefense.load`."""
    about = _read(folder)
    path = folder / WEIGHTS
    tensors = load_tensors(path) if about["networks"] else {}
    described = {each["number"]: each for each in _parts(about["purifier"]) if "number" in each}
    networks = [
        _network(described[number], number, metadata, tensors, path)
        for number, metadata in enumerate(about["networks"])
    ]
    for network in networks:  # codes of equal networks are reused
        for other in networks:
            if hasattr(network, "share") and other is not network:
                network.share(other)
    try:
        return rebuild(about["purifier"], networks)
    except (TypeError, ValueError) as error:  # from constructors
        raise ValueError(f"{folder / SPEC} cannot be loaded: {error}") from error


def _networks(purifier: Purifier, spec: Any) -> Iterator[tuple[list[dict[str, Any]], nn.Module]]:
    """The networks of a purifier, with their descriptions in its spec."""
    wanted: dict[str, list[dict[str, Any]]] = {}
    for part in _parts(spec):
        if "weights" in part:
            wanted.setdefault(json.dumps(part), []).append(part)
    classes = {parts[0]["class"] for parts in wanted.values()}
    for module in modules_in(purifier):
        if describe(type(module)) in classes:
            found = wanted.pop(json.dumps(describe(module)), None)
            if found is not None:
                yield found, module


def _metadata(network: nn.Module) -> dict[str, str]:
    """What the network needs beside its tensors to be built again."""
    if not hasattr(network, "of_weights"):
        raise TypeError(
            f"{type(network).__name__} cannot be saved: it needs a class method of_weights(state, metadata)"
        )
    own = getattr(network, "metadata", None)
    return own() if callable(own) else metadata_of(network)


def _network(
    spec: dict[str, Any], number: int, metadata: dict[str, str], tensors: dict[str, Tensor], path: Path
) -> Any:
    """Builds a network and loads its weights."""
    prefix = f"{number}."
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    try:
        network = imported(spec["class"]).of_weights(state, metadata)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path} has no {spec['class']}: {error}") from None
    load_into(network, state, path)
    for name, value in spec["settings"].items():
        setattr(network, name, value)
    network.source, network.up_axis = spec["source"], spec.get("up_axis", metadata.get("up"))
    if digest_of_weights(network) != spec["weights"]:
        raise CheckpointError(f"the weights in {path} differ from those in {SPEC}")
    return network


def _read(folder: Path) -> dict[str, Any]:
    """The JSON of a folder, checked."""
    path = folder / SPEC
    if not path.is_file():
        raise ValueError(f"{folder} is not a saved purifier: it has no {SPEC}")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(about, dict) or not isinstance(about.get("format"), int):
        raise ValueError(f"{path} does not describe a purifier")
    if about["format"] > FORMAT:
        version = about.get("versions", {}).get("ifdefense", "?")
        raise ValueError(f"{path} was saved by a later version of ifdefense, {version}")
    numbers = [part["number"] for part in _parts(about.get("purifier")) if "number" in part]
    networks = about.get("networks")
    if (
        not isinstance(about.get("purifier"), dict)
        or not isinstance(networks, list)
        or set(numbers) != set(range(len(networks)))
    ):
        raise ValueError(f"{path} is damaged: its networks and its purifier do not fit")
    return about


def _write(target: Path, text: str, tensors: dict[str, Tensor]) -> None:
    """Writes the files beside the target, then moves them, so that no folder is half written."""
    from safetensors.torch import save_file

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}."))
    try:
        partial.chmod(0o755)
        (partial / SPEC).write_text(text, encoding="utf-8")
        if tensors:
            save_file(tensors, partial / WEIGHTS)
        os.replace(partial, target)  # fails if the target has been filled meanwhile
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _exact(value: Tensor) -> Tensor:
    """A copy of a tensor, as float16 if nothing is lost."""
    value = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    if value.dtype != torch.float32:
        return value
    half = value.half()
    return half if torch.equal(half.float().view(torch.int32), value.view(torch.int32)) else value


def _parts(spec: Any) -> Iterator[dict[str, Any]]:
    """All dictionaries in a spec that describe an object."""
    if isinstance(spec, dict):
        if "class" in spec:
            yield spec
        for value in spec.values():
            yield from _parts(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from _parts(value)


def _classes(spec: Any) -> Iterator[str]:
    return (part["class"] for part in _parts(spec))
