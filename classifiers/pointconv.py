"""PointConv: convolutions whose weights are a function of the offset, re-weighted by the density.

Tensor names and shapes are those of `Wuziyi616/IF-Defense <https://github.com/Wuziyi616/IF-Defense>`_, whose
checkpoints can be loaded; those of the original, DylanWusee/pointconv_pytorch, cannot.

As in that code and unlike the paper, the input of the density network is the density, not its inverse, and
its last layer is a ReLU, not a sigmoid. Unlike that code, farthest-point sampling starts at the first point,
and a cloud with no more points than centres keeps all.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from classifiers.layers import check_points, layer_lists, shared
from classifiers.neighbourhoods import centres_of, edge, rows_of
from ifdefense.geometry.points import gather, knn, squared_distances


def density(points: Tensor, bandwidth: float) -> Tensor:
    """Gaussian kernel density at each point, up to a factor.

    ``mean_j exp(-|x_i - x_j|^2 / (2 h^2)) / (2.5 h)``, section 3.2 of the paper.

    Args:
        points: ``(B, N, 3)``.
        bandwidth: h, in the unit-sphere frame.

    Returns:
        ``(B, N)``.
    """
    kernel = squared_distances(points, points).mul(-0.5 / bandwidth**2).exp()
    return kernel.mean(2) / (2.5 * bandwidth)


class Network(nn.Module):
    """Shared MLP of the offsets (``flat=False``) or of the densities.

    Shapes: ``(..., C)`` to ``(..., K)``.
    """

    def __init__(self, channels: tuple[int, ...], flat: bool) -> None:
        super().__init__()
        self.mlp_convs, self.mlp_bns = layer_lists(channels[0], channels[1:])
        if flat:
            self.mlp_convs = nn.ModuleList([nn.Conv1d(a, b, 1) for a, b in itertools.pairwise(channels)])
            self.mlp_bns = nn.ModuleList([nn.BatchNorm1d(b) for b in channels[1:]])

    def norm_pairs(self) -> list[tuple[str, str]]:
        """Layers and the batch norms that follow them, for `classifiers.fold`."""
        return [(f"mlp_convs.{i}", f"mlp_bns.{i}") for i in range(len(self.mlp_convs))]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the network's output for every row."""
        for layer, norm in zip(self.mlp_convs, self.mlp_bns, strict=True):
            x = shared(x, layer, norm)
        return x


class DensityAbstraction(nn.Module):
    """One convolution around each centre.

    Args:
        centres: maximal number of centres; ``None`` for one, the mean, with all points as neighbours.
        neighbours: neighbours per centre.
        inputs: feature channels, without the coordinates.
        channels: channels of the layers on the neighbours' features.
        bandwidth: bandwidth of the density, in the unit-sphere frame.

    Shapes: ``(B, N, 3)`` and ``(B, N, C)`` to ``(B, S, 3)`` and ``(B, S, K)``.
    """

    def __init__(
        self,
        centres: int | None,
        neighbours: int,
        inputs: int,
        channels: tuple[int, int, int],
        bandwidth: float,
    ) -> None:
        super().__init__()
        self.centres, self.neighbours, self.bandwidth = centres, neighbours, bandwidth
        self.mlp_convs, self.mlp_bns = layer_lists(inputs + 3, channels)
        self.weightnet = Network((3, 8, 8, 16), flat=False)
        self.linear = nn.Linear(16 * channels[-1], channels[-1])
        self.bn_linear = nn.BatchNorm1d(channels[-1])
        self.densitynet = Network((1, 8, 8, 1), flat=True)

    def norm_pairs(self) -> list[tuple[str, str]]:
        """Layers and the batch norms that follow them, for `classifiers.fold`."""
        layers = [(f"mlp_convs.{i}", f"mlp_bns.{i}") for i in range(len(self.mlp_convs))]
        return [*layers, ("linear", "bn_linear")]

    def _neighbourhoods(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Centres ``(B, S, 3)`` and their neighbours' indices ``(B, S, k)``."""
        if self.centres is None:
            everything = torch.arange(points.shape[1], device=points.device)
            return points.mean(1, keepdim=True), everything.expand(len(points), 1, -1)
        centres = centres_of(points, self.centres)
        k = min(self.neighbours, points.shape[1])
        with torch.no_grad():
            return centres, knn(centres, points, k)[1]

    def forward(self, points: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the centres and their features."""
        centres, index = self._neighbourhoods(points)
        inputs = points if features is None else torch.cat([points, features], 2)
        first = self.mlp_convs[0]
        weight = first.weight.flatten(1)  # type: ignore[operator]
        x = edge(inputs @ weight.T, centres @ -weight[:, :3].T, index, first.bias, self.mlp_bns[0])  # type: ignore[arg-type]
        for layer, norm in zip(list(self.mlp_convs)[1:], list(self.mlp_bns)[1:], strict=True):
            x = shared(x, layer, norm)  # (B, S, k, K)
        scale = self.densitynet(density(points, self.bandwidth).unsqueeze(2))
        by_offset = self.weightnet(gather(points, index) - centres.unsqueeze(2))  # (B, S, k, 16)
        x = x.mT @ (by_offset * rows_of(scale, index))  # (B, S, K, 16)
        return centres, shared(x.flatten(2), self.linear, self.bn_linear)


class PointConv(nn.Module):
    """PointConv classifier (Wu et al., 2019, `arXiv:1811.07246 <https://arxiv.org/abs/1811.07246>`_).

    Args:
        num_classes: number of classes.
        dropout: dropout probability before the last two layers.

    Shapes: ``(B, N, 3)`` points, mean-centred and of largest norm 1, to ``(B, num_classes)`` logits, for any
    N of at least 1. The published sizes: 512 and 128 centres of 32 and 64 neighbours, bandwidths 0.1, 0.2
    and 0.4.

    Examples:
        >>> PointConv(num_classes=10).eval()(points).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 40, dropout: float = 0.4) -> None:
        super().__init__()
        self.sa1 = DensityAbstraction(512, 32, 0, (64, 64, 128), 0.1)
        self.sa2 = DensityAbstraction(128, 64, 128, (128, 128, 256), 0.2)
        self.sa3 = DensityAbstraction(None, 0, 256, (256, 512, 1024), 0.4)
        self.fc1 = nn.Linear(1024, 512)
        self.bn1 = nn.BatchNorm1d(512)
        self.drop1 = nn.Dropout(dropout)
        self.fc2 = nn.Linear(512, 256)
        self.bn2 = nn.BatchNorm1d(256)
        self.drop2 = nn.Dropout(dropout)
        self.fc3 = nn.Linear(256, num_classes)

    def norm_pairs(self) -> list[tuple[str, str]]:
        """Layers and the batch norms that follow them, for `classifiers.fold`."""
        return [("fc1", "bn1"), ("fc2", "bn2")]

    def forward(self, points: Tensor) -> Tensor:
        """Returns ``(B, num_classes)`` logits of ``(B, N, 3)`` points."""
        check_points(points)
        centres, features = self.sa1(points, None)
        centres, features = self.sa2(centres, features)
        _, x = self.sa3(centres, features)
        x = self.drop1(shared(x.squeeze(1), self.fc1, self.bn1))
        x = self.drop2(shared(x, self.fc2, self.bn2))
        logits: Tensor = self.fc3(x)
        return logits
