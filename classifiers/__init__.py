"""Point-cloud classifiers, from ``(B, N, 3)`` points to ``(B, num_classes)`` logits.

Clouds are mean-centred and of largest norm 1.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from classifiers.fold import fold
from classifiers.geometric import from_geometric
from classifiers.upright import upright
from ifdefense.geometry.axes import axis_of

__all__ = ["NETWORKS", "build", "fold", "from_geometric", "load", "upright"]

NETWORKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "pointnet": ("classifiers.pointnet", "PointNet", {}),
    "pointnet2-ssg": ("classifiers.pointnet2", "PointNet2", {}),
    "pointnet2-msg": ("classifiers.pointnet2", "PointNet2", {"multi_scale": True}),
    "dgcnn": ("classifiers.dgcnn", "DGCNN", {}),
    "dgcnn-small": ("classifiers.dgcnn", "DGCNN", {"width": 12, "neighbours": 10}),
    "pointconv": ("classifiers.pointconv", "PointConv", {}),
    "pct": ("classifiers.pct", "PCT", {}),
    "pointmlp": ("classifiers.pointmlp", "PointMLP", {}),
    "pointmlp-elite": ("classifiers.pointmlp", "PointMLP", {"elite": True}),
}
"""Module, class and arguments of each network, by name."""

_LAST = {"dgcnn": "linear3.bias", "dgcnn-small": "linear3.bias", "pct": "linear3.bias"}
_LAST |= {"pointmlp": "classifier.8.bias", "pointmlp-elite": "classifier.8.bias"}
_TITLE = {
    "pointnet": "PointNet",
    "dgcnn": "DGCNN",
    "dgcnn-small": "DGCNN",
    "pct": "PCT",
    "pointconv": "PointConv",
}


def build(network: str, num_classes: int = 40, **options: Any) -> nn.Module:
    """Creates a network with fresh weights.

    Args:
        network: one of `NETWORKS`.
        num_classes: number of classes.
        options: further arguments of the class.

    Raises:
        ValueError: if the network is unknown.

    Examples:
        >>> model = classifiers.build("dgcnn", num_classes=10).eval()
        >>> model(points).shape
        torch.Size([2, 10])
    """
    if network not in NETWORKS:
        raise ValueError(f"unknown classifier {network!r}; there are: {', '.join(NETWORKS)}")
    module, name, fixed = NETWORKS[network]
    model: nn.Module = getattr(importlib.import_module(module), name)(num_classes, **fixed, **options)
    return model


def load(name: str, weights: str | Path | None = None, *, up: str | None = None) -> nn.Module:
    """Loads a classifier, in evaluation mode.

    Its attribute ``up_axis`` is the up axis of its input; ``None`` if not stored in the weights.

    Args:
        name: shipped weights, such as ``"pointnet-modelnet40-hybrid"``; or a network of `NETWORKS` together
            with ``weights``.
        weights: ``.safetensors`` file, or a public checkpoint with the tensor names of yanx27, antao97,
            Strawberry-Eat-Mango, ma-xu or IF-Defense; see `ifdefense.checkpoints.load_state`.
        up: up axis of its training clouds, by default that stored in the weights. Weights of IF-Defense, and
            others trained on ModelNet40 as HDF5, are y up without storing it.

    Raises:
        FileNotFoundError: if ``weights`` names no file.
        ValueError: if the name is unknown, or the weights cannot be read or do not match; the message names
            the tensors.

    Examples:
        >>> model = classifiers.load("pointnet-modelnet40")
        >>> model(points).shape
        torch.Size([2, 40])
    """
    from ifdefense.checkpoints import (
        CheckpointError,
        load_into,
        load_state,
        shipped,
        stated_axis,
        unlike,
    )

    known = [network for network in NETWORKS if name == network or name.startswith(network + "-")]
    if not known:
        raise ValueError(f"unknown classifier {name!r}; there are: {', '.join(NETWORKS)}")
    network = max(known, key=len)
    path = shipped("classifiers", name) if weights is None else weights
    names = _names(network)
    state = load_state(path, names, functools.partial(canonical, network))
    last = _LAST.get(network, "fc3.bias")
    if last not in state:
        title = _TITLE.get(network, network)
        raise CheckpointError(f"{path} is not a {title}: tensor {last} is missing; {unlike(state, names)}")
    options: dict[str, Any] = {}
    if network == "pointnet":
        options["feature_transform"] = any(tensor.startswith("feat.fstn.") for tensor in state)
    model = build(network, len(state[last]), **options)
    load_into(model, state, path)
    model.up_axis = stated_axis(path) if up is None else axis_of(up)  # type: ignore[assignment]  # Module takes any attribute
    return model.eval()


@functools.cache
def _names(network: str) -> tuple[str, ...]:
    """Names of tensors common to all variants of a network."""
    options = {"feature_transform": False} if network == "pointnet" else {}
    with torch.device("meta"):  # no initialisation
        return tuple(build(network, 1, **options).state_dict())


def canonical(network: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames tensors from a public naming to ours.

    IF-Defense keeps a layer and its batch norm together: PointNet's ``conv1.0`` and ``conv1.1`` are ``conv1``
    and ``bn1``; DGCNN's ``linear1.1`` is a second name of ``bn6``.

    Args:
        network: one of `NETWORKS`.
        state: tensors by name.
    """
    renames: list[tuple[str, str]] = []
    if network == "pointnet" and "fc1.0.weight" in state:
        renames = [
            (r"^feat\.stn\.fc1\.1\.", "feat.stn.bn4."),
            (r"^feat\.stn\.fc2\.1\.", "feat.stn.bn5."),
            (r"conv(\d)\.1\.", r"bn\1."),
            (r"^fc1\.1\.", "bn1."),
            (r"(conv|fc)(\d)\.0\.", r"\1\2."),
        ]
    elif network.startswith("dgcnn") and "linear1.0.weight" in state:
        renames = [
            (r"^linear1\.1\.", "bn6."),
            (r"^linear2\.1\.", "bn7."),
            (r"^linear(\d)\.0\.", r"linear\1."),
        ]
    result = {}
    for name, value in state.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        result[name] = value
    return result
