"""Auto-encoder of point clouds."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ifdefense.point_networks.base import PointNetwork

SHIPPED = "autoencoder-modelnet40"
"""Name of the shipped weights."""


class AutoEncoder(PointNetwork):
    """PointNet encoder and MLP decoder, a compact version of AdvPC's without batch norm.

    Achlioptas et al., 2018, `arXiv:1707.02392 <https://arxiv.org/abs/1707.02392>`_.

    Args:
        code: size of the latent code.
        points: points of a reconstruction.

    Shapes: ``(B, N, 3)`` clouds in the unit sphere to ``(B, points, 3)``.

    Examples:
        >>> AutoEncoder(code=16, points=32)(points).shape
        torch.Size([2, 32, 3])
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
    def of_state(cls, state: Mapping[str, Tensor]) -> AutoEncoder:
        """Builds an untrained auto-encoder with the sizes of a state dict."""
        if not {"code.weight", "decoder.4.bias"} <= state.keys():
            return cls()
        return cls(code=len(state["code.weight"]), points=len(state["decoder.4.bias"]) // 3)
