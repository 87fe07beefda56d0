"""PU-Net, which upsamples clouds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ifdefense.geometry.points import (
    ball_query,
    farthest_point_sampling,
    farthest_samples,
    gather,
    three_interpolate,
)
from ifdefense.point_networks.base import PointNetwork

RADII = (0.05, 0.1, 0.2, 0.3)
"""Radius of the neighbourhoods of each level, unit sphere."""

NEIGHBOURS = 32
"""Maximum number of points per neighbourhood."""

WIDTHS = ((32, 32, 64), (64, 64, 128), (128, 128, 256), (256, 256, 512))
"""Layers of each level."""

UP = 64
"""Features of each level at the points of the input."""

Layers = list[tuple[Tensor, Tensor]]


class PUNet(PointNetwork):
    """PU-Net: features of neighbourhoods at four levels, expanded to several points per point.

    Yu et al., CVPR 2018, `arXiv:1801.06761 <https://arxiv.org/abs/1801.06761>`_, in the variant of DUP-Net
    (Zhou et al., ICCV 2019, `arXiv:1812.11017 <https://arxiv.org/abs/1812.11017>`_); tensor names match its
    public checkpoint. Level ``l`` has ``1 / 2^l`` of the points, farthest-point samples of the level before.

    Args:
        ratio: points of the result per point.

    Shapes: ``(B, N, 3)`` clouds in the unit sphere to ``(B, ratio N, 3)``; trained on N = 1,024.

    Examples:
        >>> PUNet(ratio=2).eval()(points).shape
        torch.Size([2, 128, 3])
    """

    points = 1024

    def __init__(self, ratio: int = 4) -> None:
        super().__init__()
        inputs = (0, *(widths[-1] for widths in WIDTHS[:-1]))
        self.SA_modules = nn.ModuleList(
            nn.ModuleDict({"mlps": nn.ModuleList([_layers(3 + size, *widths)])})
            for size, widths in zip(inputs, WIDTHS, strict=True)
        )
        self.FP_Modules = nn.ModuleList(
            nn.ModuleDict({"mlp": _layers(widths[-1], UP)}) for widths in WIDTHS[1:]
        )
        size = 3 + WIDTHS[0][-1] + UP * len(self.FP_Modules)
        self.FC_Modules = nn.ModuleList(_layers(size, 256, 128) for _ in range(ratio))
        self.pcd_layer = nn.ModuleList([_layers(128, 64), _layers(64, 3)])

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> PUNet:
        """Builds an untrained network with the sizes of a state dict."""
        branches = {name.split(".")[1] for name in state if name.startswith("FC_Modules.")}
        return cls(max(1, len(branches)))

    def forward(self, points: Tensor) -> Tensor:
        """Upsampled clouds, all first points before all second ones."""
        return self._upsampled(gather(points, farthest_point_sampling(points.detach(), points.shape[1])))

    def mapped(self, clouds: Sequence[Tensor]) -> list[Tensor]:
        """As `PointNetwork.mapped`, with all farthest-point samples in one loop."""
        start = torch.zeros(len(clouds), dtype=torch.int64, device=clouds[0].device)
        order = farthest_samples([cloud.detach() for cloud in clouds], list(map(len, clouds)), start)
        return [self._upsampled(cloud[index][None])[0] for cloud, index in zip(clouds, order, strict=True)]

    def _upsampled(self, points: Tensor) -> Tensor:
        """`forward` of clouds that are farthest-point samples of themselves."""
        # The first level is a permutation of the input, so features are in the order of that permutation.
        size = points.shape[1]
        level, features = points, points[..., :0]
        found = []
        for depth, (module, radius) in enumerate(zip(self.SA_modules, RADII, strict=True)):
            # Every prefix of a farthest-point sample is one, as the sampling is greedy.
            centre = points[:, : max(1, size >> depth)]
            features = _neighbourhoods(level, features, centre, radius, _parameters(_part(module, "mlps")[0]))
            level = centre
            if depth == 0:
                found += [points, features]
            else:
                up = three_interpolate(points, level, features)
                found.append(_applied(up, _parameters(_part(self.FP_Modules[depth - 1], "mlp"))))
        joined = torch.cat(found, -1)
        expanded = torch.cat([_applied(joined, _parameters(branch)) for branch in self.FC_Modules], 1)
        hidden = _applied(expanded, _parameters(self.pcd_layer[0]))
        ((weight, bias),) = _parameters(self.pcd_layer[1])
        return F.linear(hidden, weight, bias)


def _part(module: nn.Module, name: str) -> Any:
    """A submodule by name."""
    return cast(nn.ModuleDict, module)[name]


def _layers(*widths: int) -> nn.ModuleDict:
    """Layers shared by the points, under the names of the public checkpoint."""
    sizes = itertools.pairwise(widths)
    return nn.ModuleDict(
        {f"layer{i}": nn.ModuleDict({"conv": nn.Conv2d(a, b, 1)}) for i, (a, b) in enumerate(sizes)}
    )


def _parameters(layers: nn.Module) -> Layers:
    """Weights ``(K, C)`` and biases ``(K,)`` of `_layers`."""
    found = []
    for layer in cast(nn.ModuleDict, layers).values():
        conv = cast(nn.Conv2d, cast(nn.ModuleDict, layer)["conv"])
        found.append((conv.weight[:, :, 0, 0], cast(Tensor, conv.bias)))
    return found


def _applied(x: Tensor, layers: Layers) -> Tensor:
    """The layers with ReLU, on ``(..., C)``."""
    for weight, bias in layers:
        x = F.linear(x, weight, bias).relu_()
    return x


def _neighbourhoods(
    points: Tensor, features: Tensor, centre: Tensor, radius: float, layers: Layers
) -> Tensor:
    """Maximum of the layers over each ball of points: a set abstraction of PointNet++.

    The inputs of a point are its position relative to the centre and its features. The first layer is a
    linear function of the point minus one of the centre, and is thus computed once per point. Small balls are
    not padded, which halves the products.

    Args:
        points: ``(B, N, 3)``.
        features: ``(B, N, C)``, C may be 0.
        centre: ``(B, S, 3)``.
        radius: radius of the balls.
        layers: layers with ``3 + C`` inputs.

    Returns:
        ``(B, S, K)``.
    """
    (weight, bias), *rest = layers
    of = F.linear(torch.cat([points, features], -1), weight, bias).flatten(0, 1)
    at = F.linear(centre, weight[:, :3]).flatten(0, 1)
    index = ball_query(centre.detach(), points.detach(), radius, NEIGHBOURS)  # (B, S, k)
    own = index != index[..., :1]  # padding of a small ball repeats its first point
    own[..., 0] = True
    start = torch.arange(0, len(of), points.shape[1], device=index.device)
    count = own.sum(-1).flatten()
    ball, place = own.flatten(0, 1).nonzero().unbind(1)
    point = (index + start[:, None, None]).flatten(0, 1)[ball, place]
    edges = (of.index_select(0, point) - at.index_select(0, ball)).relu_()
    edges = _applied(edges, rest)
    best = torch.segment_reduce(edges, "max", lengths=count)
    return best.view(*centre.shape[:2], -1)
