"""PointMLP: residual layers on normalised neighbourhoods.

Tensor names and shapes are those of `ma-xu/pointMLP-pytorch
<https://github.com/ma-xu/pointMLP-pytorch>`_. Offsets are divided by their standard deviation in the cloud;
that code computes it over the batch, so that the logits of a cloud depend on the others.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from classifiers.layers import activated, check_points, linear, shared
from classifiers.neighbourhoods import edge, rows_of
from ifdefense.geometry.points import farthest_point_sampling, gather, knn

STAGES = 4
NEIGHBOURS = 24


class Layer(nn.Module):
    """A shared layer, batch norm and ReLU: ``(..., C)`` to ``(..., K)``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(inputs, outputs, 1, bias=False), nn.BatchNorm1d(outputs))

    def norm_pairs(self) -> list[tuple[str, str]]:
        """Layers and the batch norms that follow them, for `classifiers.fold`."""
        return [("net.0", "net.1")]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layer's output."""
        return shared(x, self.net[0], self.net[1])


class Residual(nn.Module):
    """``act(x + norm(W act(norm(V x))))``, with ``width`` hidden channels."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.net1 = nn.Sequential(nn.Conv1d(channels, width, 1, bias=False), nn.BatchNorm1d(width))
        self.net2 = nn.Sequential(nn.Conv1d(width, channels, 1, bias=False), nn.BatchNorm1d(channels))

    def norm_pairs(self) -> list[tuple[str, str]]:
        """Layers and the batch norms that follow them, for `classifiers.fold`."""
        return [("net1.0", "net1.1"), ("net2.0", "net2.1")]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output, of the shape of its input."""
        return activated(linear(shared(x, *self.net1), *self.net2) + x)


class Grouper(nn.Module):
    """Geometric affine module, equation 2: scale and shift of normalised offsets of features.

    Args:
        channels: C of the features.

    Shapes: ``(B, N, C)`` features, ``(B, S)`` centres and ``(B, S, k)`` neighbours to ``(B,)`` spreads.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.affine_alpha = nn.Parameter(torch.ones(1, 1, 1, channels))
        self.affine_beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, features: Tensor, own: Tensor, index: Tensor) -> Tensor:
        """Returns the standard deviation of all offsets of each cloud, plus 1e-5."""
        offsets = rows_of(features, index) - own.unsqueeze(2)
        return offsets.flatten(1).std(1) + 1e-5


class Stage(nn.Module):
    """The layers before the maximum over the neighbours (``transfer`` and blocks)."""

    def __init__(self, inputs: int, channels: int, blocks: int, width: int) -> None:
        super().__init__()
        self.transfer = Layer(2 * inputs, channels)
        self.operation = nn.Sequential(*[Residual(channels, width) for _ in range(blocks)])

    def forward(self, grouper: Grouper, features: Tensor, own: Tensor, index: Tensor) -> Tensor:
        """Returns ``(B, S, K)`` features of the centres."""
        layer, norm = cast(nn.Conv1d, self.transfer.net[0]), self.transfer.net[1]
        of_offset, of_centre = layer.weight.flatten(1).chunk(2, 1)
        spread = grouper(features, own, index).view(-1, 1, 1)
        scaled = of_offset * grouper.affine_alpha.flatten()
        at = own @ of_centre.T - own @ scaled.T / spread + of_offset @ grouper.affine_beta.flatten()
        x = edge(features @ scaled.T / spread, at, index, layer.bias, norm)
        return cast(Tensor, self.operation(x)).amax(2)


class After(nn.Module):
    """The blocks after the maximum."""

    def __init__(self, channels: int, blocks: int, width: int) -> None:
        super().__init__()
        self.operation = nn.Sequential(*[Residual(channels, width) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        """Returns features of the shape of the input."""
        return cast(Tensor, self.operation(x))


class PointMLP(nn.Module):
    """PointMLP classifier (Ma et al., 2022, `arXiv:2202.07123 <https://arxiv.org/abs/2202.07123>`_).

    Args:
        num_classes: number of classes.
        elite: the small variant of 0.7 M parameters instead of 13.2 M.
        dropout: dropout probability before the last two layers.

    Shapes: ``(B, N, 3)`` points, mean-centred and of largest norm 1, to ``(B, num_classes)`` logits, for any
    N of at least 2. As published, each of four stages keeps half of the points (at least one), with 24
    neighbours each (or all).

    Examples:
        >>> PointMLP(num_classes=10, elite=True).eval()(points).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 40, elite: bool = False, dropout: float = 0.5) -> None:
        super().__init__()
        width, blocks = (32, (1, 1, 2, 1)) if elite else (64, (2, 2, 2, 2))
        growth = (2, 2, 2, 1) if elite else (2, 2, 2, 2)
        self.embedding = Layer(3, width)
        self.local_grouper_list = nn.ModuleList()
        self.pre_blocks_list = nn.ModuleList()
        self.pos_blocks_list = nn.ModuleList()
        for stage in range(STAGES):
            channels = width * growth[stage]
            middle = channels // 4 if elite else channels
            self.local_grouper_list.append(Grouper(width))
            self.pre_blocks_list.append(Stage(width, channels, blocks[stage], middle))
            self.pos_blocks_list.append(After(channels, blocks[stage], middle))
            width = channels
        self.classifier = nn.Sequential(
            nn.Linear(width, 512),
            nn.BatchNorm1d(512),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(512, 256),
            nn.BatchNorm1d(256),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(256, num_classes),
        )

    def norm_pairs(self) -> list[tuple[str, str]]:
        """Layers and the batch norms that follow them, for `classifiers.fold`."""
        return [("classifier.0", "classifier.1"), ("classifier.4", "classifier.5")]

    def forward(self, points: Tensor) -> Tensor:
        """Returns ``(B, num_classes)`` logits of ``(B, N, 3)`` points."""
        check_points(points)
        x = self.embedding(points)
        stages = zip(self.local_grouper_list, self.pre_blocks_list, self.pos_blocks_list, strict=True)
        for grouper, before, after in stages:
            size = points.shape[1]
            chosen = farthest_point_sampling(points.detach(), max(1, size // 2))
            centres, own = gather(points, chosen), gather(x, chosen)
            with torch.no_grad():
                index = knn(centres, points, min(NEIGHBOURS, size))[1]
            points, x = centres, after(before(grouper, x, own, index))
        return cast(Tensor, self.classifier(x.amax(1)))
