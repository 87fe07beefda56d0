"""Folds batch norms into the layers before them: for faster inference and attacks."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from classifiers.layers import folded


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """Copies a classifier without its batch norms, equal in evaluation mode up to rounding.

    ``norm(W x + b) = (s W) x + (s b + t)`` with the running statistics in s and t. Parameters of the copy
    require no gradient, so an attack computes only that of the points.

    Args:
        model: a classifier of this package, or a module whose submodules list their layers and norms in a
            method ``norm_pairs``.

    Returns:
        The copy, in evaluation mode.

    Raises:
        ValueError: if the layer before a batch norm is unknown.

    Examples:
        >>> model = classifiers.build("pointnet", 4).eval()
        >>> torch.allclose(classifiers.fold(model)(points), model(points), atol=1e-4)
        True
    """
    result = copy.deepcopy(model).eval()
    for part in list(result.modules()):
        pairs: list[tuple[str, str]] = part.norm_pairs() if hasattr(part, "norm_pairs") else []  # type: ignore[operator]
        for layer_name, norm_name in pairs:
            norm = part.get_submodule(norm_name)
            if isinstance(norm, nn.Identity):
                continue
            layer = cast(nn.Linear, part.get_submodule(layer_name))
            weight, bias = folded(layer, norm, layer.weight)
            layer.weight = nn.Parameter(weight.view_as(layer.weight))
            layer.bias = nn.Parameter(bias)
            _replace(result, norm, nn.Identity())
    left = [name for name, part in result.named_modules() if isinstance(part, _BatchNorm)]
    if left:
        raise ValueError(
            f"{type(model).__name__} has batch norms without a known layer before them: {', '.join(left)}"
        )
    return result.requires_grad_(False)


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replaces a module under all of its names."""
    for part in root.modules():
        for name, child in list(part._modules.items()):
            if child is old:
                setattr(part, name, new)
