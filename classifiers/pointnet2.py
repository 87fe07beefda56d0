"""PointNet++: PointNets on the neighbourhoods of fewer and fewer centres.

Tensor names and shapes are those of `yanx27/Pointnet_Pointnet2_pytorch
<https://github.com/yanx27/Pointnet_Pointnet2_pytorch>`_, without normals; IF-Defense uses the same. Unlike
that code:

* The output is logits, not their log-softmax.
* Farthest-point sampling starts at the first point, not at a random one: the network is deterministic.
* A cloud with no more points than a level has centres keeps all of them.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from torch import Tensor, nn

from classifiers.layers import check_points, layer_lists, pooled, shared
from classifiers.neighbourhoods import centres_of, edge, group_pooled, in_part
from ifdefense.geometry.points import ball_query


@dataclasses.dataclass(frozen=True)
class Scale:
    """One neighbourhood size of a level.

    Attributes:
        radius: radius of the balls, in the unit-sphere frame.
        neighbours: points per ball.
        channels: channels of the three layers.
    """

    radius: float
    neighbours: int
    channels: tuple[int, int, int]


def ball_layers(
    points: Tensor,
    features: Tensor | None,
    centres: Tensor,
    scale: Scale,
    sparsity: float,
    layers: nn.ModuleList,
    norms: nn.ModuleList,
    points_first: bool,
) -> Tensor:
    """A PointNet on every ball: ``(B, N, 3)``, ``(B, N, C)`` and ``(B, S, 3)`` to ``(B, S, K)``."""
    first = cast(nn.Conv2d, layers[0])
    weight = first.weight.flatten(1)
    if features is None:
        of_points, inputs = weight, points
    elif points_first:
        of_points, inputs = weight[:, :3], torch.cat([points, features], 2)
    else:
        of_points, inputs = weight[:, -3:], torch.cat([features, points], 2)
    index = ball_query(centres.detach(), points.detach(), scale.radius, in_part(scale.neighbours, sparsity))
    x = edge(inputs @ weight.T, centres @ -of_points.T, index, first.bias, norms[0])
    x = shared(x, layers[1], norms[1])
    return group_pooled(x, layers[2], norms[2])


class SetAbstraction(nn.Module):
    """A level with one neighbourhood size, or the last level over all points.

    Args:
        centres: maximal number of centres; ``None`` for one feature vector of the whole cloud.
        scale: the neighbourhoods; without centres only its channels are used.
        inputs: feature channels, without the coordinates.

    Shapes: ``(B, N, 3)`` and ``(B, N, C)`` to ``(B, S, 3)`` and ``(B, S, K)``, or to ``(B, K)``.
    """

    def __init__(self, centres: int | None, scale: Scale, inputs: int) -> None:
        super().__init__()
        self.centres, self.scale, self.sparsity = centres, scale, 1.0
        self.mlp_convs, self.mlp_bns = layer_lists(inputs + 3, scale.channels)

    def norm_pairs(self) -> list[tuple[str, str]]:
        """Layers and the batch norms that follow them, for `classifiers.fold`."""
        return [(f"mlp_convs.{i}", f"mlp_bns.{i}") for i in range(len(self.mlp_convs))]

    def forward(self, points: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the centres and their features."""
        if self.centres is None:
            x = points if features is None else torch.cat([points, features], 2)
            for layer, norm in zip(list(self.mlp_convs)[:-1], self.mlp_bns, strict=False):
                x = shared(x, layer, norm)
            return points[:, :0], pooled(x, self.mlp_convs[-1], self.mlp_bns[-1])
        centres = centres_of(points, in_part(self.centres, self.sparsity))
        mlp = self.mlp_convs, self.mlp_bns
        return centres, ball_layers(
            points, features, centres, self.scale, self.sparsity, *mlp, points_first=True
        )


class MultiScaleAbstraction(nn.Module):
    """A level with several neighbourhood sizes, whose features are concatenated.

    Args:
        centres: maximal number of centres.
        scales: the neighbourhoods.
        inputs: feature channels, without the coordinates.

    Shapes: ``(B, N, 3)`` and ``(B, N, C)`` to ``(B, S, 3)`` and ``(B, S, K)``.
    """

    def __init__(self, centres: int, scales: tuple[Scale, ...], inputs: int) -> None:
        super().__init__()
        self.centres, self.scales, self.sparsity = centres, scales, 1.0
        self.conv_blocks, self.bn_blocks = nn.ModuleList(), nn.ModuleList()
        for scale in scales:
            layers, norms = layer_lists(inputs + 3, scale.channels)
            self.conv_blocks.append(layers)
            self.bn_blocks.append(norms)

    def norm_pairs(self) -> list[tuple[str, str]]:
        """Layers and the batch norms that follow them, for `classifiers.fold`."""
        return [
            (f"conv_blocks.{block}.{i}", f"bn_blocks.{block}.{i}")
            for block, scale in enumerate(self.scales)
            for i in range(len(scale.channels))
        ]

    def forward(self, points: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the centres and their features."""
        centres = centres_of(points, in_part(self.centres, self.sparsity))
        blocks = zip(self.scales, self.conv_blocks, self.bn_blocks, strict=True)
        parts = [
            ball_layers(points, features, centres, scale, self.sparsity, layers, norms, points_first=False)  # type: ignore[arg-type]
            for scale, layers, norms in blocks
        ]
        return centres, torch.cat(parts, 2)


class PointNet2(nn.Module):
    """PointNet++ classifier (Qi et al., 2017, `arXiv:1706.02413 <https://arxiv.org/abs/1706.02413>`_).

    Args:
        num_classes: number of classes.
        multi_scale: three neighbourhood sizes per level (MSG) instead of one (SSG).
        dropout: dropout probability before the last two layers.

    Shapes: ``(B, N, 3)`` points, mean-centred and of largest norm 1, to ``(B, num_classes)`` logits, for any
    N of at least 1. The published sizes: 512 and 128 centres.

    Examples:
        >>> PointNet2(num_classes=10).eval()(points).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 40, multi_scale: bool = False, dropout: float = 0.4) -> None:
        super().__init__()
        whole = Scale(float("inf"), 0, (256, 512, 1024))
        self.sa1: nn.Module
        self.sa2: nn.Module
        if multi_scale:
            first = (
                Scale(0.1, 16, (32, 32, 64)),
                Scale(0.2, 32, (64, 64, 128)),
                Scale(0.4, 128, (64, 96, 128)),
            )
            second = (
                Scale(0.2, 32, (64, 64, 128)),
                Scale(0.4, 64, (128, 128, 256)),
                Scale(0.8, 128, (128, 128, 256)),
            )
            self.sa1 = MultiScaleAbstraction(512, first, 0)
            self.sa2 = MultiScaleAbstraction(128, second, 320)
            self.sa3 = SetAbstraction(None, whole, 640)
        else:
            self.sa1 = SetAbstraction(512, Scale(0.2, 32, (64, 64, 128)), 0)
            self.sa2 = SetAbstraction(128, Scale(0.4, 64, (128, 128, 256)), 128)
            self.sa3 = SetAbstraction(None, whole, 256)
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

    def sized_for(self, points: int) -> None:
        """Scales centres and neighbours to the number of points: all at 1,024, at least 8."""
        for level in (self.sa1, self.sa2):
            cast(SetAbstraction, level).sparsity = points / 1024

    def forward(self, points: Tensor) -> Tensor:
        """Returns ``(B, num_classes)`` logits of ``(B, N, 3)`` points."""
        check_points(points)
        centres, features = self.sa1(points, None)
        centres, features = self.sa2(centres, features)
        _, x = self.sa3(centres, features)
        x = self.drop1(shared(x, self.fc1, self.bn1))
        x = self.drop2(shared(x, self.fc2, self.bn2))
        logits: Tensor = self.fc3(x)
        return logits
