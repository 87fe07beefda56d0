"""DGCNN: edge convolutions on nearest neighbours in feature space, recomputed in every layer.

Tensor names and shapes are those of `antao97/dgcnn.pytorch
<https://github.com/antao97/dgcnn.pytorch>`_, where batch norms of convolutions have two names.

Edge features are never materialised, which is exact: ``W [x_j - x_i, x_i] = W1 x_j + (W2 - W1) x_i`` needs
one product per point, and the maximum over the neighbours commutes with batch norm and leaky ReLU, which are
monotone (see `classifiers.neighbourhoods.edge_max`).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from classifiers.layers import added_product, check_points, max_and_mean_pooled, separate_aliases, shared
from classifiers.neighbourhoods import edge_max, in_part
from ifdefense.geometry.gathering import together

SLOPE = 0.2
"""Negative slope of every leaky ReLU."""


@torch.no_grad()
def nearest_features(x: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` nearest rows of each row, itself included, unordered.

    Distances come from a matrix product of the centred rows; `ifdefense.geometry.points.knn` sums squared
    differences, which is better for few dimensions.

    Args:
        x: ``(B, N, C)`` features.
        k: neighbours, at most N.

    Returns:
        ``(B, N, k)`` indices.
    """
    size = x.shape[1]
    index = torch.empty(*x.shape[:2], k, dtype=torch.int64, device=x.device)
    centred = x - x.mean(1, keepdim=True)
    for part in together(len(x), size * size, x.device):
        rows = centred[part]
        square = (rows * rows).sum(-1)
        # Up to the norm of the row itself.
        distances = added_product(square.unsqueeze(-2), rows, rows.mT, alpha=-2)
        index[part] = smallest(distances.view(-1, size), k).view(index[part].shape)
    return index


def smallest(values: Tensor, k: int, group: int = 8) -> Tensor:
    """Columns of the ``k`` smallest values of each row, unordered; twice as fast as ``topk`` on a CPU.

    The k smallest values lie in the k groups of columns with the smallest minima (up to ties), and minima can
    be vectorised, unlike a selection.

    Args:
        values: ``(M, N)``.
        k: columns per row, at most N.
        group: columns per group.

    Returns:
        ``(M, k)`` indices.
    """
    groups = values.shape[1] // group
    if values.device.type != "cpu" or groups < 2 * k:
        return values.topk(k, dim=1, largest=False, sorted=False).indices
    dealt = values[:, : groups * group].unflatten(1, (group, groups))
    best = dealt.amin(1).topk(k, dim=1, largest=False, sorted=False).indices  # (M, k)
    column = torch.arange(0, groups * group, groups, device=values.device).view(-1, 1) + best.unsqueeze(1)
    column = column.flatten(1)  # (M, group * k)
    rest = torch.arange(groups * group, values.shape[1], device=values.device)
    if len(rest):
        column = torch.cat([column, rest.expand(len(column), -1)], 1)
    chosen = values.gather(1, column).topk(k, dim=1, largest=False, sorted=False).indices
    return torch.gather(column, 1, chosen)


class DGCNN(nn.Module):
    """DGCNN classifier (Wang et al., 2019, `arXiv:1801.07829 <https://arxiv.org/abs/1801.07829>`_).

    Args:
        num_classes: number of classes.
        neighbours: k of the graphs; the paper's 20 for 1,024 points.
        dropout: dropout probability before the last two layers.
        width: channels of the first layer, to which all others are proportional; the paper's 64.

    Shapes: ``(B, N, 3)`` points, mean-centred and of largest norm 1, to ``(B, num_classes)`` logits, for any
    N of at least 1; with fewer points than neighbours the graph is complete.

    Examples:
        >>> DGCNN(num_classes=10, neighbours=8).eval()(points).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, num_classes: int = 40, neighbours: int = 20, dropout: float = 0.5, width: int = 64
    ) -> None:
        super().__init__()
        self.neighbours, self.sparsity = neighbours, 1.0
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.bn3, self.bn4 = nn.BatchNorm2d(2 * width), nn.BatchNorm2d(4 * width)
        self.bn5 = nn.BatchNorm1d(16 * width)
        self.conv1 = nn.Sequential(nn.Conv2d(6, width, 1, bias=False), self.bn1)
        self.conv2 = nn.Sequential(nn.Conv2d(2 * width, width, 1, bias=False), self.bn2)
        self.conv3 = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 1, bias=False), self.bn3)
        self.conv4 = nn.Sequential(nn.Conv2d(4 * width, 4 * width, 1, bias=False), self.bn4)
        self.conv5 = nn.Sequential(nn.Conv1d(8 * width, 16 * width, 1, bias=False), self.bn5)
        self.linear1 = nn.Linear(32 * width, 8 * width, bias=False)
        self.bn6 = nn.BatchNorm1d(8 * width)
        self.dp1 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(8 * width, 4 * width)
        self.bn7 = nn.BatchNorm1d(4 * width)
        self.dp2 = nn.Dropout(dropout)
        self.linear3 = nn.Linear(4 * width, num_classes)
        self.register_state_dict_post_hook(separate_aliases)  # type: ignore[no-untyped-call]

    def norm_pairs(self) -> list[tuple[str, str]]:
        """Layers and the batch norms that follow them, for `classifiers.fold`."""
        convolutions = [(f"conv{i}.0", f"bn{i}") for i in range(1, 6)]
        return [*convolutions, ("linear1", "bn6"), ("linear2", "bn7")]

    def sized_for(self, points: int) -> None:
        """Scales the number of neighbours to the number of points: all at 1,024, at least 8."""
        self.sparsity = points / 1024

    def _edges(self, x: Tensor, block: nn.Sequential) -> Tensor:
        """An edge convolution: ``(B, N, C)`` to ``(B, N, K)``."""
        layer = cast(nn.Conv2d, block[0])
        of_difference, of_centre = layer.weight.flatten(1).chunk(2, 1)
        index = nearest_features(x, min(in_part(self.neighbours, self.sparsity), x.shape[1]))
        at = x @ (of_centre - of_difference).T
        if layer.bias is not None:
            at = at + layer.bias
        return edge_max(x @ of_difference.T, at, index, block[1], SLOPE)

    def forward(self, points: Tensor) -> Tensor:
        """Returns ``(B, num_classes)`` logits of ``(B, N, 3)`` points."""
        check_points(points)
        x, parts = points, []
        for block in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = self._edges(x, block)
            parts.append(x)
        x = max_and_mean_pooled(torch.cat(parts, 2), self.conv5[0], self.conv5[1], SLOPE)
        x = self.dp1(shared(x, self.linear1, self.bn6, SLOPE))
        x = self.dp2(shared(x, self.linear2, self.bn7, SLOPE))
        logits: Tensor = self.linear3(x)
        return logits
