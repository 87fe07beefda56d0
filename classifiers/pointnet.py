"""PointNet: an MLP shared by the points, max-pooling, and a small head.

Tensor names and shapes are those of `yanx27/Pointnet_Pointnet2_pytorch
<https://github.com/yanx27/Pointnet_Pointnet2_pytorch>`_, whose checkpoints can be loaded; the output is
logits, not their log-softmax. Batch norms are folded into the layers before them, in training too, and the
layers from
128 to 1,024 channels are used only through their maximum over the points, see `classifiers.layers`: the
gradient reaches at most 1,024 points per cloud, so the backward pass is cheap.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classifiers.layers import check_points, folded, max_pooled_linear


def _shared(x: Tensor, layer: nn.Module, norm: nn.Module) -> Tensor:
    """A layer shared by the points, batch norm and ReLU: ``(B, N, C)`` to ``(B, N, K)``."""
    return F.linear(x, *folded(layer, norm, x)).relu_()


def _pooled(x: Tensor, layer: nn.Module, norm: nn.Module, search: torch.dtype | None) -> Tensor:
    """A shared layer, batch norm and the maximum over the points: ``(B, N, C)`` to ``(B, K)``."""
    weight, bias = folded(layer, norm, x)
    return max_pooled_linear(x, weight, search) + bias


class Alignment(nn.Module):
    """Predicts a ``channels x channels`` matrix from the features of a cloud (Spatial Transformer, "T-net").

    Args:
        channels: channels C of the input features.

    Shapes: ``(B, N, C)`` to ``(B, C, C)``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.search: torch.dtype | None = None
        self.conv1 = nn.Conv1d(channels, 64, 1)
        self.conv2 = nn.Conv1d(64, 128, 1)
        self.conv3 = nn.Conv1d(128, 1024, 1)
        self.fc1 = nn.Linear(1024, 512)
        self.fc2 = nn.Linear(512, 256)
        self.fc3 = nn.Linear(256, channels * channels)
        self.bn1 = nn.BatchNorm1d(64)
        self.bn2 = nn.BatchNorm1d(128)
        self.bn3 = nn.BatchNorm1d(1024)
        self.bn4 = nn.BatchNorm1d(512)
        self.bn5 = nn.BatchNorm1d(256)

    def norm_pairs(self) -> list[tuple[str, str]]:
        """Layers and the batch norms that follow them, for `classifiers.fold`."""
        return [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("fc1", "bn4"), ("fc2", "bn5")]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the ``(B, C, C)`` matrices for ``(B, N, C)`` features."""
        x = _shared(x, self.conv1, self.bn1)
        x = _shared(x, self.conv2, self.bn2)
        x = _pooled(x, self.conv3, self.bn3, self.search).relu()
        x = self.bn4(self.fc1(x)).relu()
        x = self.bn5(self.fc2(x)).relu()
        matrix = self.fc3(x).unflatten(1, (self.channels, self.channels))
        return cast(Tensor, matrix + torch.eye(self.channels, dtype=x.dtype, device=x.device))


class Encoder(nn.Module):
    """Points to one feature vector per cloud.

    Args:
        feature_transform: whether the 64 features of each point are aligned by a predicted matrix as well.

    Shapes: ``(B, N, 3)`` to ``(B, 1024)``, and the ``(B, 64, 64)`` feature alignment or ``None``.
    """

    def __init__(self, feature_transform: bool) -> None:
        super().__init__()
        self.search: torch.dtype | None = None
        self.stn = Alignment(3)
        self.conv1 = nn.Conv1d(3, 64, 1)
        self.conv2 = nn.Conv1d(64, 128, 1)
        self.conv3 = nn.Conv1d(128, 1024, 1)
        self.bn1 = nn.BatchNorm1d(64)
        self.bn2 = nn.BatchNorm1d(128)
        self.bn3 = nn.BatchNorm1d(1024)
        self.fstn = Alignment(64) if feature_transform else None

    def norm_pairs(self) -> list[tuple[str, str]]:
        """Layers and the batch norms that follow them, for `classifiers.fold`."""
        return [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")]

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns ``(B, 1024)`` features of ``(B, N, 3)`` points, and the feature alignment."""
        x = points @ self.stn(points)
        x = _shared(x, self.conv1, self.bn1)
        alignment = None
        if self.fstn is not None:
            alignment = self.fstn(x)
            x = x @ alignment
        x = _shared(x, self.conv2, self.bn2)
        return _pooled(x, self.conv3, self.bn3, self.search), alignment


class PointNet(nn.Module):
    """PointNet classifier (Qi et al., 2017, `arXiv:1612.00593 <https://arxiv.org/abs/1612.00593>`_).

    Args:
        num_classes: number of classes.
        feature_transform: whether the 64-channel features are aligned by a predicted matrix.
        dropout: dropout probability before the last layer.

    Shapes: ``(B, N, 3)`` points, mean-centred and of largest norm 1, to ``(B, num_classes)`` logits, for any
    N of at least 1.

    Examples:
        >>> PointNet(num_classes=10).eval()(points).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 40, feature_transform: bool = True, dropout: float = 0.4) -> None:
        super().__init__()
        self.feat = Encoder(feature_transform)
        self.fc1 = nn.Linear(1024, 512)
        self.fc2 = nn.Linear(512, 256)
        self.fc3 = nn.Linear(256, num_classes)
        self.dropout = nn.Dropout(dropout)
        self.bn1 = nn.BatchNorm1d(512)
        self.bn2 = nn.BatchNorm1d(256)

    def norm_pairs(self) -> list[tuple[str, str]]:
        """Layers and the batch norms that follow them, for `classifiers.fold`."""
        return [("fc1", "bn1"), ("fc2", "bn2")]

    def search_in(self, dtype: torch.dtype | None) -> None:
        """Sets the dtype for finding the largest points, see `max_pooled_linear`."""
        for module in self.modules():
            if isinstance(module, (Alignment, Encoder)):
                module.search = dtype

    def forward(self, points: Tensor) -> Tensor:
        """Returns ``(B, num_classes)`` logits of ``(B, N, 3)`` points."""
        return self.with_alignment(points)[0]

    def with_alignment(self, points: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and the ``(B, 64, 64)`` feature alignment that training penalises, if there is one."""
        check_points(points)
        x, alignment = self.feat(points)
        x = self.bn1(self.fc1(x)).relu()
        x = self.bn2(self.dropout(self.fc2(x))).relu()
        logits: Tensor = self.fc3(x)
        return logits, alignment


def orthogonality_penalty(matrices: Tensor) -> Tensor:
    """Mean distance of ``(B, C, C)`` matrices from orthogonal ones.

    ``mean ||A A^T - I||_F``, section 3 of the paper.
    """
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    distance: Tensor = torch.linalg.matrix_norm(matrices @ matrices.mT - identity)
    return distance.mean()
