"""Convolutional Occupancy Network: features on three planes, conditioned on a point cloud.

Peng et al., "Convolutional Occupancy Networks", ECCV 2020 (https://arxiv.org/abs/2003.04618), with three
canonical planes. Tensor names and shapes match the public code, so its checkpoints load. Everything is in the
unit-cube frame: the cloud's longest side is 1 and its bounding box is centred on 0.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ifdefense.geometry.gathering import add_rows
from ifdefense.implicit.base import Calibration, evaluated, random_subset
from ifdefense.implicit.occupancy import ResnetBlockFC

CHUNK = 2048
"""Queries per chunk at inference, so that activations fit the cache of a core."""

AXES = ((0, 2), (0, 1), (1, 2))
"""Column and row axis of each plane: xz, xy, yz."""

SPAN = 1.1
"""Side of the square that a plane covers, unit cube; points beyond it use the features of its border."""

BLOCKS = 5
"""ResNet blocks of encoder and decoder."""


@dataclasses.dataclass(frozen=True)
class ConvolutionalConfig:
    """Sizes of a Convolutional Occupancy Network; the defaults are the published ones (1.98 M parameters).

    Attributes:
        encoder: hidden width of the PointNet.
        features: channels of the planes.
        filters: channels of the U-Net's first level; each further level has twice as many.
        depth: levels of the U-Net.
        decoder: hidden width of the decoder.
        resolution: cells per side of a plane, a multiple of ``2^(depth - 1)``.

    Raises:
        ValueError: if a size is not positive, or the resolution is not such a multiple.
    """

    encoder: int = 32
    features: int = 32
    filters: int = 32
    depth: int = 4
    decoder: int = 32
    resolution: int = 64

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} of the network must be positive, got {value}")
        if self.resolution % 2 ** (self.depth - 1):
            raise ValueError(
                f"the resolution of a U-Net of {self.depth} levels must be a multiple of "
                f"{2 ** (self.depth - 1)}, got {self.resolution}"
            )

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], resolution: int = 64) -> ConvolutionalConfig:
        """Infers the sizes from a state dict, except for the resolution, which it does not contain.

        Raises:
            ValueError: if tensors are missing.
        """
        try:
            features, encoder = state["encoder.fc_c.weight"].shape
            filters = state["encoder.unet.down_convs.0.conv1.weight"].shape[0]
            decoder = state["decoder.fc_p.weight"].shape[0]
        except KeyError as error:
            raise ValueError(f"not a Convolutional Occupancy Network: tensor {error} is missing") from None
        levels = {name.split(".")[3] for name in state if name.startswith("encoder.unet.down_convs.")}
        return cls(encoder, features, filters, len(levels), decoder, resolution)


def positions(points: Tensor) -> Tensor:
    """Coordinates on the planes, in [0, 1): ``(..., 3)`` points → ``(..., 3 planes, 2)``."""
    # The margins are those of the public code.
    scaled = (points / (SPAN + 1e-5) + 0.5).clamp(0, 1 - 1e-5)
    return torch.stack([scaled[..., list(axes)] for axes in AXES], -2)


def cells(points: Tensor, resolution: int) -> Tensor:
    """Cells of points on the planes: ``(..., 3)`` → ``(..., 3 planes)`` int64, rows first."""
    column, row = (positions(points) * resolution).long().unbind(-1)
    return row * resolution + column


def corners(points: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """Bilinear interpolation on the planes.

    Args:
        points: ``(M, 3)``.
        resolution: cells per side; the outermost cells lie on the border of the planes.

    Returns:
        ``(M, 12)`` cells, into the cells of the three planes one after the other, and their weights, whose
        sum is 1 for each plane.
    """
    place = positions(points) * (resolution - 1)
    low = place.detach().floor().clamp(max=resolution - 2)
    share = place - low  # (M, 3, 2)
    along = torch.stack([1 - share, share], -1)  # (M, 3, 2 axes, 2 ends)
    weights = along[..., 1, :, None] * along[..., 0, None, :]  # (M, 3, rows, columns)
    column, row = low.long().unbind(-1)
    first = row * resolution + column + torch.arange(3, device=points.device) * resolution**2
    steps = torch.tensor([0, 1, resolution, resolution + 1], device=points.device)
    return (first[..., None] + steps).flatten(1), weights.flatten(1)


class DownConv(nn.Module):
    """Two convolutions, then 2 × 2 max-pooling to the next level."""

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(size_in, size_out, 3, padding=1)
        self.conv2 = nn.Conv2d(size_out, size_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, size_in, H, W)`` → ``(B, size_out, H, W)``, before max-pooling."""
        return F.relu(self.conv2(F.relu(self.conv1(x))))


class UpConv(nn.Module):
    """Upsampling to twice the resolution, concatenation with the skip connection, then two convolutions."""

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__()
        self.upconv = nn.ConvTranspose2d(size_in, size_out, 2, stride=2)
        self.conv1 = nn.Conv2d(2 * size_out, size_out, 3, padding=1)
        self.conv2 = nn.Conv2d(size_out, size_out, 3, padding=1)

    def forward(self, down: Tensor, x: Tensor) -> Tensor:
        """``(B, size_out, 2 H, 2 W)`` and ``(B, size_in, H, W)`` → ``(B, size_out, 2 H, 2 W)``."""
        x = torch.cat([self.upconv(x), down], 1)
        return F.relu(self.conv2(F.relu(self.conv1(x))))


class UNet(nn.Module):
    """U-Net (Ronneberger et al., https://arxiv.org/abs/1505.04597) with padding."""

    def __init__(self, features: int, filters: int, depth: int) -> None:
        super().__init__()
        sizes = [filters * 2**level for level in range(depth)]
        self.down_convs = nn.ModuleList(map(DownConv, [features, *sizes[:-1]], sizes))
        self.up_convs = nn.ModuleList(map(UpConv, sizes[:0:-1], sizes[-2::-1]))
        self.conv_final = nn.Conv2d(filters, features, 1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.xavier_normal_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, features, R, R)``."""
        levels: list[Tensor] = []
        for down in self.down_convs:
            x = down(F.max_pool2d(x, 2) if levels else x)
            levels.append(x)
        for up, level in zip(self.up_convs, levels[-2::-1], strict=True):
            x = up(level, x)
        out: Tensor = self.conv_final(x)
        return out


class PlaneEncoder(nn.Module):
    """Encoder: a PointNet that pools over the cells of each plane, and a U-Net on the planes."""

    def __init__(self, config: ConvolutionalConfig) -> None:
        super().__init__()
        width = config.encoder
        self.resolution = config.resolution
        self.fc_pos = nn.Linear(3, 2 * width)
        self.blocks = nn.ModuleList(ResnetBlockFC(2 * width, width) for _ in range(BLOCKS))
        self.fc_c = nn.Linear(width, config.features)
        self.unet = UNet(config.features, config.filters, config.depth)

    def forward(self, clouds: Tensor) -> Tensor:
        """Planes ``(B, 3 R², features)`` of clouds ``(B, N, 3)``, cells by rows.

        Under autocast only the U-Net is in lower precision, as differences of positions are small.
        """
        with torch.autocast(clouds.device.type, enabled=False):
            image = self._images(clouds)
        image = self.unet(image).to(clouds.dtype)
        out: Tensor = image.permute(0, 2, 3, 1).reshape(len(clouds), 3 * self.resolution**2, -1)
        return out

    def _images(self, clouds: Tensor) -> Tensor:
        """Mean features of the points in each cell, ``(3 B, features, R, R)``; 0 in empty cells."""
        batch, area = len(clouds), self.resolution**2
        start = torch.arange(batch, device=clouds.device)[:, None, None] * (3 * area)
        plane = torch.arange(3, device=clouds.device) * area
        cell = (cells(clouds, self.resolution) + plane + start).flatten(0, 1)  # (B N, 3)
        filled, member = torch.unique(cell, return_inverse=True)
        x = self.blocks[0](self.fc_pos(clouds.flatten(0, 1)))
        for block in self.blocks[1:]:
            x = block(torch.cat([x, self._pooled(x, member, len(filled))], 1))
        x = self.fc_c(x)
        size = torch.bincount(member.flatten(), minlength=len(filled)).to(x.dtype)
        total = x.new_zeros(len(filled), x.shape[1])
        for column in member.unbind(1):
            total = add_rows(total, column, x)
        planes: Tensor = x.new_zeros(batch * 3 * area, x.shape[1])
        planes = planes.index_copy(0, filled, total / size[:, None])
        return planes.view(3 * batch, self.resolution, self.resolution, -1).permute(0, 3, 1, 2)

    @staticmethod
    def _pooled(x: Tensor, member: Tensor, count: int) -> Tensor:
        """Maximum over the points in each point's cell, summed over the planes, ``(B N, width)``."""
        out = torch.zeros_like(x)
        for column in member.unbind(1):
            index = column[:, None].expand_as(x)
            most = x.new_zeros(count, x.shape[1]).scatter_reduce(0, index, x, "amax", include_self=False)
            out = out + most.index_select(0, column)
        return out


class PlaneDecoder(nn.Module):
    """Decoder: five ResNet blocks on a query's coordinates, each after adding features of the planes."""

    def __init__(self, config: ConvolutionalConfig) -> None:
        super().__init__()
        self.resolution = config.resolution
        self.fc_p = nn.Linear(3, config.decoder)
        self.fc_c = nn.ModuleList(nn.Linear(config.features, config.decoder) for _ in range(BLOCKS))
        self.blocks = nn.ModuleList(ResnetBlockFC(config.decoder, config.decoder) for _ in range(BLOCKS))
        self.fc_out = nn.Linear(config.decoder, 1)

    def forward(self, queries: Tensor, planes: Tensor, start: Tensor | None = None) -> Tensor:
        """Logits of queries.

        Args:
            queries: ``(M, 3)``.
            planes: ``(P, features)`` cells of the planes of one or more clouds.
            start: ``(M,)`` first cell of each query's cloud; ``None`` for one cloud.

        Returns:
            ``(M,)``.
        """
        index, weights = corners(queries, self.resolution)
        if start is not None:
            index = index + start[:, None]
        with torch.autocast(queries.device.type, enabled=False):
            features = F.embedding_bag(index, planes, mode="sum", per_sample_weights=weights)
            x = self.fc_p(queries)
            for layer, block in zip(self.fc_c, self.blocks, strict=True):
                x = block(x + layer(features))
            logits: Tensor = self.fc_out(F.relu(x)).squeeze(-1)
        return logits


class ConvolutionalField:
    """The fields of several clouds at inference; see `ifdefense.implicit.base.Field`.

    Args:
        decoder: decoder of the network.
        planes: ``(B, 3 R², features)`` planes of the clouds.
    """

    def __init__(self, decoder: PlaneDecoder, planes: Tensor) -> None:
        self.decoder, self.planes = decoder, planes

    def __call__(self, points: Tensor, cloud: Tensor) -> Tensor:
        """Logits of queries of several clouds; differentiable.

        Args:
            points: ``(M, 3)`` queries, unit-cube frame.
            cloud: ``(M,)`` int64 index of each query's cloud, ascending.

        Returns:
            ``(M,)`` logits, independent of the batch.
        """
        fields = [functools.partial(self.decoder, planes=planes) for planes in self.planes]
        return evaluated(fields, points, cloud, CHUNK)


class ConvolutionalNetwork(nn.Module):
    """Convolutional Occupancy Network: encoder and decoder.

    Args:
        config: sizes of the layers.
        calibration: interpretation of the field.

    Shapes:
        - **clouds:** ``(B, N, 3)``, unit-cube frame, any N; IF-Defense's network was trained on 600 points
        - **queries:** ``(B, Q, 3)``, unit-cube frame
        - **logits:** ``(B, Q)``; occupancy is Bernoulli with these logits

    Examples:
        >>> network = ConvolutionalNetwork(ConvolutionalConfig(filters=4, resolution=16)).eval()
        >>> network(points, queries=points[:, :5]).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        config: ConvolutionalConfig = ConvolutionalConfig(),
        calibration: Calibration = Calibration(points=600),
    ) -> None:
        super().__init__()
        self.config = config
        self.calibration = calibration
        self.encoder = PlaneEncoder(config)
        self.decoder = PlaneDecoder(config)

    @classmethod
    def of_weights(cls, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> ConvolutionalNetwork:
        """Builds an untrained network with the sizes and the calibration of weights.

        Public checkpoints contain neither resolution nor calibration; those of IF-Defense are assumed.

        Raises:
            ValueError: if tensors are missing or the metadata is damaged.
        """
        try:
            resolution = int(json.loads(metadata.get("config", "{}")).get("resolution", 64))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"the configuration of the weights cannot be read: {error}") from None
        config = ConvolutionalConfig.of_state(state, resolution)
        if "calibration" not in metadata:
            return cls(config)
        return cls(config, Calibration.of_metadata(metadata))

    def settings(self) -> dict[str, int]:
        """Attributes that affect the result and are not stored in the weights."""
        return {"resolution": self.config.resolution}

    def codes(self, clouds: Tensor) -> Tensor:
        """Planes ``(B, 3 R², features)`` of clouds ``(B, N, 3)``, from all points.

        Clouds are encoded one by one, as rounding varies with the batch size.
        """
        return torch.cat([self.encoder(cloud) for cloud in clouds.split(1)])

    def forward(self, clouds: Tensor, queries: Tensor) -> Tensor:
        """Occupancy logits at the queries."""
        planes = self.encoder(clouds)
        start = torch.arange(len(planes), device=planes.device) * planes.shape[1]
        starts = start.repeat_interleave(queries.shape[1])
        logits: Tensor = self.decoder(queries.flatten(0, 1), planes.flatten(0, 1), starts)
        return logits.view(queries.shape[:2])

    def encode(self, clouds: Sequence[Tensor], seed: int = 0) -> Tensor:
        """Planes of clouds ``(N_i, 3)``, limited to a random subset of ``calibration.points`` points."""
        device = self.decoder.fc_p.weight.device
        most = self.calibration.points
        return torch.cat([self.codes(random_subset(cloud, most, seed)[None].to(device)) for cloud in clouds])

    def field(self, code: Tensor) -> ConvolutionalField:
        """The fields of encoded clouds."""
        return ConvolutionalField(self.decoder, code)
