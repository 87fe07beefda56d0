"""Point-cloud classifiers, from ``(B, N, 3)`` points to ``(B, num_classes)`` logits.

Clouds are mean-centred and of largest norm 1.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

__all__ = ["load"]


def load(name: str, weights: str | Path | None = None) -> nn.Module:
    """Loads a classifier, in evaluation mode.

    Args:
        name: ``"pointnet-modelnet40"``, ``"pointnet-modelnet40-hybrid"`` or ``"pointnet-procedural"``, the
            weights that are shipped; or ``"pointnet"`` together with ``weights``.
        weights: file to read instead: our safetensors, or a public ``.pth`` checkpoint with yanx27's tensor
            names (bare or under ``"model_state_dict"``, ``"model"`` or ``"state_dict"``, with or without the
            prefix ``module.``). No code that it carries is run.

    Raises:
        ValueError: if the name is unknown, or the weights cannot be read or do not fit; names the tensors
            that do not.
    """
    from classifiers.pointnet import PointNet
    from ifdefense.checkpoints import CheckpointError, load_into, load_state, shipped

    if name.partition("-")[0] != "pointnet":
        raise ValueError(f"unknown classifier {name!r}; there is: pointnet")
    path = shipped("classifiers", name) if weights is None else weights
    state = load_state(path)
    if "fc3.bias" not in state:
        raise CheckpointError(f"{path} is no PointNet: tensor fc3.bias is missing")
    model = PointNet(len(state["fc3.bias"]), any(tensor.startswith("feat.fstn.") for tensor in state))
    load_into(model, state, path)
    return model.eval()
