"""PCT: a transformer with offset attention on the features of neighbourhoods.

Tensor names and shapes are those of `Strawberry-Eat-Mango/PCT_Pytorch
<https://github.com/Strawberry-Eat-Mango/PCT_Pytorch>`_, where query and key share their weights under two
names. A cloud with no more points than a level has centres keeps all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from classifiers.layers import check_points, pooled, separate_aliases, shared
from classifiers.neighbourhoods import edge, group_pooled
from ifdefense.geometry.points import farthest_point_sampling, gather, knn

SLOPE = 0.2
"""Negative slope of the leaky ReLUs of the last layers."""


class Neighbourhoods(nn.Module):
    """Sampling and grouping, section 3.4: features of centres from those of their nearest points.

    Args:
        centres: maximal number of centres.
        neighbours: neighbours per centre.
        channels: output channels, twice the input channels.

    Shapes: ``(B, N, 3)`` and ``(B, N, C)`` to ``(B, S, 3)`` and ``(B, S, 2 C)``.
    """

    def __init__(self, centres: int, neighbours: int, channels: int) -> None:
        super().__init__()
        self.centres, self.neighbours = centres, neighbours
        self.conv1 = nn.Conv1d(channels, channels, 1, bias=False)
        self.conv2 = nn.Conv1d(channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm1d(channels)
        self.bn2 = nn.BatchNorm1d(channels)

    def norm_pairs(self) -> list[tuple[str, str]]:
        """Layers and the batch norms that follow them, for `classifiers.fold`."""
        return [("conv1", "bn1"), ("conv2", "bn2")]

    def forward(self, points: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the centres and their features."""
        centres, own = points, features
        if points.shape[1] > self.centres:
            chosen = farthest_point_sampling(points.detach(), self.centres)
            centres, own = gather(points, chosen), gather(features, chosen)
        with torch.no_grad():
            index = knn(centres, points, min(self.neighbours, points.shape[1]))[1]
        of_difference, of_centre = self.conv1.weight.flatten(1).chunk(2, 1)
        at = own @ (of_centre - of_difference).T
        x = edge(features @ of_difference.T, at, index, self.conv1.bias, self.bn1)
        return centres, group_pooled(x, self.conv2, self.bn2)


class OffsetAttention(nn.Module):
    """``x + act(norm(W (x - attention(x))))``, equations 5 to 8.

    Softmax over the rows of the attention, then its columns are scaled to sum 1.

    Args:
        channels: C.

    Shapes: ``(B, N, C)`` to ``(B, N, C)``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.q_conv = nn.Conv1d(channels, channels // 4, 1, bias=False)
        self.k_conv = nn.Conv1d(channels, channels // 4, 1, bias=False)
        self.q_conv.weight = self.k_conv.weight
        self.v_conv = nn.Conv1d(channels, channels, 1)
        self.trans_conv = nn.Conv1d(channels, channels, 1)
        self.after_norm = nn.BatchNorm1d(channels)

    def norm_pairs(self) -> list[tuple[str, str]]:
        """Layers and the batch norms that follow them, for `classifiers.fold`."""
        return [("trans_conv", "after_norm")]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the features with the attention's offset added."""
        query = x @ self.q_conv.weight.flatten(1).T
        value = nn.functional.linear(x, self.v_conv.weight.flatten(1), self.v_conv.bias)
        attention = (query @ query.mT).softmax(2)
        attention = attention / (1e-9 + attention.sum(1, keepdim=True))
        return x + shared(x - attention.mT @ value, self.trans_conv, self.after_norm)


class Transformer(nn.Module):
    """Two shared layers and four attentions, concatenated: ``(B, N, C)`` to ``(B, N, 4 C)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(channels, channels, 1, bias=False)
        self.conv2 = nn.Conv1d(channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm1d(channels)
        self.bn2 = nn.BatchNorm1d(channels)
        self.sa1 = OffsetAttention(channels)
        self.sa2 = OffsetAttention(channels)
        self.sa3 = OffsetAttention(channels)
        self.sa4 = OffsetAttention(channels)

    def norm_pairs(self) -> list[tuple[str, str]]:
        """Layers and the batch norms that follow them, for `classifiers.fold`."""
        return [("conv1", "bn1"), ("conv2", "bn2")]

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``(B, N, 4 C)`` features of ``(B, N, C)``."""
        x = shared(x, self.conv1, self.bn1)
        x = shared(x, self.conv2, self.bn2)
        parts = []
        for attention in (self.sa1, self.sa2, self.sa3, self.sa4):
            x = attention(x)
            parts.append(x)
        return torch.cat(parts, 2)


class PCT(nn.Module):
    """Point Cloud Transformer (Guo et al., 2021, `arXiv:2012.09688 <https://arxiv.org/abs/2012.09688>`_).

    Args:
        num_classes: number of classes.
        dropout: dropout probability before the last two layers.

    Shapes: ``(B, N, 3)`` points, mean-centred and of largest norm 1, to ``(B, num_classes)`` logits, for any
    N of at least 1. The published sizes: 512 and 256 centres of 32 neighbours, four attentions of 256
    channels.

    Examples:
        >>> PCT(num_classes=10).eval()(points).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 40, dropout: float = 0.5) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(3, 64, 1, bias=False)
        self.conv2 = nn.Conv1d(64, 64, 1, bias=False)
        self.bn1 = nn.BatchNorm1d(64)
        self.bn2 = nn.BatchNorm1d(64)
        self.gather_local_0 = Neighbourhoods(512, 32, 128)
        self.gather_local_1 = Neighbourhoods(256, 32, 256)
        self.pt_last = Transformer(256)
        self.conv_fuse = nn.Sequential(nn.Conv1d(1280, 1024, 1, bias=False), nn.BatchNorm1d(1024))
        self.linear1 = nn.Linear(1024, 512, bias=False)
        self.bn6 = nn.BatchNorm1d(512)
        self.dp1 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(512, 256)
        self.bn7 = nn.BatchNorm1d(256)
        self.dp2 = nn.Dropout(dropout)
        self.linear3 = nn.Linear(256, num_classes)
        self.register_state_dict_post_hook(separate_aliases)  # type: ignore[no-untyped-call]

    def norm_pairs(self) -> list[tuple[str, str]]:
        """Layers and the batch norms that follow them, for `classifiers.fold`."""
        heads = [("linear1", "bn6"), ("linear2", "bn7")]
        return [("conv1", "bn1"), ("conv2", "bn2"), ("conv_fuse.0", "conv_fuse.1"), *heads]

    def forward(self, points: Tensor) -> Tensor:
        """Returns ``(B, num_classes)`` logits of ``(B, N, 3)`` points."""
        check_points(points)
        x = shared(points, self.conv1, self.bn1)
        x = shared(x, self.conv2, self.bn2)
        centres, x = self.gather_local_0(points, x)
        _, x = self.gather_local_1(centres, x)
        x = torch.cat([self.pt_last(x), x], 2)
        if self.training:  # the pooled form would need the covariance of 1,280 channels
            x = shared(x, self.conv_fuse[0], self.conv_fuse[1], SLOPE).amax(1)
        else:
            x = pooled(x, self.conv_fuse[0], self.conv_fuse[1], SLOPE)
        x = self.dp1(shared(x, self.linear1, self.bn6, SLOPE))
        x = self.dp2(shared(x, self.linear2, self.bn7, SLOPE))
        logits: Tensor = self.linear3(x)
        return logits
