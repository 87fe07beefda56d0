"""Auto-encoder of point clouds."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn

from ifdefense.checkpoints import load_into, load_state, shipped

SHIPPED = "autoencoder-modelnet40"
"""Name of the shipped weights."""


class AutoEncoder(nn.Module):
    """PointNet encoder and MLP decoder, a compact version of AdvPC's without batch norm.

    Achlioptas et al., 2018, `arXiv:1707.02392 <https://arxiv.org/abs/1707.02392>`_.

    Args:
        code: size of the latent code.
        points: points of a reconstruction.

    Shapes: ``(B, N, 3)`` clouds in the unit sphere to ``(B, points, 3)``.
    """

    def __init__(self, code: int = 128, points: int = 1024) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 256)
        )
        self.code = nn.Linear(256, code)
        self.decoder = nn.Sequential(
            nn.Linear(code, 256), nn.ReLU(), nn.Linear(256, 384), nn.ReLU(), nn.Linear(384, 3 * points)
        )

    def forward(self, points: Tensor) -> Tensor:
        """Reconstructed clouds."""
        code = self.code(self.encoder(points).amax(1))
        rebuilt: Tensor = self.decoder(code).unflatten(1, (-1, 3))
        return rebuilt

    @classmethod
    def from_file(cls, path: str | Path) -> AutoEncoder:
        """Auto-encoder with the weights and sizes of a file.

        Raises:
            ifdefense.checkpoints.CheckpointError: if the file does not fit.
        """
        state = load_state(path)
        sizes = {}
        if {"code.weight", "decoder.4.bias"} <= state.keys():
            sizes = {"code": len(state["code.weight"]), "points": len(state["decoder.4.bias"]) // 3}
        model = cls(**sizes)
        load_into(model, state, path)
        return model.eval()


@functools.lru_cache(maxsize=8)
def pretrained(device: torch.device, dtype: torch.dtype) -> AutoEncoder:
    """The shipped auto-encoder with frozen parameters."""
    return AutoEncoder.from_file(shipped("attacks", SHIPPED)).to(device, dtype).requires_grad_(False)
