"""Occupancy Networks conditioned on voxels and on a single image, behind the decoder of the cloud network.

Mescheder et al., "Occupancy Networks: Learning 3D Reconstruction in Function Space", CVPR 2019
(https://arxiv.org/abs/1812.03828). Tensor names match the public code, those of the image encoder's features
torchvision's. Everything is in the unit-cube frame: x first, z up.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ifdefense.implicit.base import Calibration
from ifdefense.implicit.occupancy import ConditionalDecoder, OccupancyField

VOXELS = 32
"""Cells per side of the voxel input."""
VOXEL_BOX = 1.1
"""Side of the cube that the voxel input covers, unit cube."""
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Normalisation of images, those of ImageNet, as public weights expect."""


@dataclasses.dataclass(frozen=True)
class ConditionConfig:
    """Widths of a conditioned Occupancy Network; the defaults are those of the public code.

    Attributes:
        width: channels of the first convolution of the encoder: 32 in the public voxel encoder, 64 in
            ResNet-18.
        code: width of the code.
        decoder: hidden width of the decoder.
        frequencies: octaves of the positional encoding in the decoder.
        local: channels of features that the voxel encoder also gives at the queries; 0 in the public code.

    Raises:
        ValueError: if a width is not positive, or cannot be had.
    """

    width: int = 32
    code: int = 256
    decoder: int = 256
    frequencies: int = 0
    local: int = 0

    def __post_init__(self) -> None:
        for name, width in dataclasses.asdict(self).items():
            if width < (0 if name in ("local", "frequencies") else 1):
                raise ValueError(f"{name} of the network must be positive, got {width}")


class VoxelFeatures(NamedTuple):
    """What voxels are encoded to.

    Attributes:
        code: ``(B, code)``.
        local: ``(B, local, V, V, V)`` features of the cells, x first; ``None`` without any.
    """

    code: Tensor
    local: Tensor | None


class VoxelEncoder(nn.Module):
    """3D CNN: five convolutions, four of them halving the resolution from 32 to 2 cells per side.

    Args:
        code: width of the code.
        width: channels of the first convolution; they double with every halving.
        local: channels of the features of the cells, read off after the first convolution.
    """

    def __init__(self, code: int = 256, width: int = 32, local: int = 0) -> None:
        super().__init__()
        self.conv_in = nn.Conv3d(1, width, 3, padding=1)
        self.conv_0 = nn.Conv3d(width, 2 * width, 3, padding=1, stride=2)
        self.conv_1 = nn.Conv3d(2 * width, 4 * width, 3, padding=1, stride=2)
        self.conv_2 = nn.Conv3d(4 * width, 8 * width, 3, padding=1, stride=2)
        self.conv_3 = nn.Conv3d(8 * width, 16 * width, 3, padding=1, stride=2)
        self.fc = nn.Linear(16 * width * (VOXELS // 16) ** 3, code)
        self.conv_local = nn.Conv3d(width, local, 1) if local else None

    def forward(self, voxels: Tensor) -> VoxelFeatures:
        """Encodes occupancies ``(B, 32, 32, 32)``, x first.

        Raises:
            ValueError: if there are more or fewer cells.
        """
        if voxels.ndim != 4 or voxels.shape[1:] != (VOXELS,) * 3:
            raise ValueError(f"voxels must be (B, {VOXELS}, {VOXELS}, {VOXELS}), got {tuple(voxels.shape)}")
        x = F.relu(self.conv_in(voxels[:, None].to(self.fc.weight.dtype)))
        local = self.conv_local(x) if self.conv_local is not None else None
        for layer in (self.conv_0, self.conv_1, self.conv_2, self.conv_3):
            x = F.relu(layer(x))
        return VoxelFeatures(self.fc(x.flatten(1)), local)


def at_queries(local: Tensor, queries: Tensor) -> Tensor:
    """Features ``(B, C, V, V, V)`` of cells, interpolated at queries ``(B, Q, 3)``: ``(B, Q, C)``."""
    place = (queries * (2 / VOXEL_BOX)).flip(-1)  # grid_sample counts the last axis first
    found = F.grid_sample(local, place[:, :, None, None], padding_mode="border", align_corners=False)
    return found[..., 0, 0].transpose(1, 2)


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions with batch norms and a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = (
            nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if stride != 1 or channels != out
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, channels, H, W)`` to ``(B, out, H / stride, W / stride)``."""
        hidden = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(hidden + (x if self.downsample is None else self.downsample(x)))


class Resnet18(nn.Module):
    """ResNet-18 without its last layer, pooled features ``(B, 8 width)``; names as in torchvision.

    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (https://arxiv.org/abs/1512.03385).

    Args:
        width: channels of the first convolution, 64 in the paper.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        sizes = [width, width, 2 * width, 4 * width, 8 * width]
        for number in range(1, 5):
            first = BasicBlock(sizes[number - 1], sizes[number], 1 if number == 1 else 2)
            self.add_module(
                f"layer{number}", nn.Sequential(first, BasicBlock(sizes[number], sizes[number], 1))
            )

    def forward(self, x: Tensor) -> Tensor:
        """Features of normalised images ``(B, 3, H, W)``."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        return x.mean((2, 3))


class ImageEncoder(nn.Module):
    """ResNet-18 and a linear layer, which is left out where the widths agree already.

    Args:
        code: width of the code.
        width: channels of the first convolution.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, code: int = 256, width: int = 64) -> None:
        super().__init__()
        self.features = Resnet18(width)
        self.fc = nn.Linear(8 * width, code) if code != 8 * width else None
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Codes of images ``(B, H, W, 3)`` in [0, 1].

        Raises:
            ValueError: if there are not three channels.
        """
        if images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images must be (B, H, W, 3), got {tuple(images.shape)}")
        # Contiguous: with 4 channels that come last, the gradient of a strided 1 x 1 convolution corrupts the
        # heap (torch 2.13 on AVX2).
        x = self.features(((images - self.mean) / self.std).permute(0, 3, 1, 2).contiguous())
        code: Tensor = x if self.fc is None else self.fc(x)
        return code


class ConditionedNetwork(nn.Module):
    """What networks share that are conditioned on something else than points; see the subclasses.

    Args:
        config: widths of the layers.
        calibration: interpretation of the field.
    """

    encoder: nn.Module

    def __init__(self, config: ConditionConfig, calibration: Calibration = Calibration(points=None)) -> None:
        super().__init__()
        self.config = config
        self.calibration = calibration
        self.decoder = ConditionalDecoder(config.code, config.decoder, config.frequencies, config.local)

    @staticmethod
    def sizes(state: Mapping[str, Tensor]) -> tuple[int, int]:
        """Widths of the encoder and of its features of cells, from a state dict."""
        raise NotImplementedError

    @classmethod
    def of_weights(cls, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Self:
        """Builds an untrained network with the sizes and the calibration of weights.

        Raises:
            ValueError: if tensors are missing.
        """
        try:
            width, local = cls.sizes(state)
            code = state["decoder.bn.conv_beta.weight"].shape[1]
            decoder, inputs = state["decoder.fc_p.weight"].shape[:2]
        except KeyError as error:
            raise ValueError(f"not a {cls.__name__}: tensor {error} is missing") from None
        calibration = (
            Calibration.of_metadata(metadata) if "calibration" in metadata else Calibration(points=None)
        )
        return cls(ConditionConfig(width, code, decoder, (inputs - 3) // 6, local), calibration)

    @property
    def _like(self) -> Tensor:
        return self.decoder.fc_p.weight


class VoxelNetwork(ConditionedNetwork):
    """Occupancy Network conditioned on voxels.

    With ``config.local``, the decoder also gets features of the cells around a query, through the layer that
    takes the latent of the generative network. A code alone cannot hold where thin parts are.

    Shapes:
        - **voxels:** ``(B, 32, 32, 32)`` occupancies of the cells of a cube of side `VOXEL_BOX`, x first
        - **queries:** ``(B, Q, 3)``, unit cube
        - **logits:** ``(B, Q)``
    """

    def __init__(
        self,
        config: ConditionConfig = ConditionConfig(),
        calibration: Calibration = Calibration(points=None),
    ) -> None:
        super().__init__(config, calibration)
        self.encoder = VoxelEncoder(config.code, config.width, config.local)

    @staticmethod
    def sizes(state: Mapping[str, Tensor]) -> tuple[int, int]:
        """Widths of the encoder and of its features of cells, from a state dict."""
        local = state.get("encoder.conv_local.weight")
        return len(state["encoder.conv_in.weight"]), 0 if local is None else len(local)

    def forward(self, voxels: Tensor, queries: Tensor) -> Tensor:
        """Occupancy logits at the queries."""
        code, local = self.encoder(voxels)
        logits: Tensor = self.decoder(queries, code, None if local is None else at_queries(local, queries))
        return logits

    def encode(self, voxels: Sequence[Tensor], seed: int = 0) -> VoxelFeatures:
        """Features of voxels ``(32, 32, 32)``; ``seed`` is not used.

        Voxels are encoded one by one, as rounding varies with the batch size.
        """
        found = [self.encoder(each[None].to(self._like.device)) for each in voxels]
        codes, locals_ = zip(*found, strict=True)
        return VoxelFeatures(torch.cat(codes), torch.cat(locals_) if self.config.local else None)

    def field(self, code: VoxelFeatures) -> OccupancyField:
        """The fields of encoded voxels, with folded batch norms."""
        if code.local is None:
            return OccupancyField(self.decoder, code.code)
        return OccupancyField(
            self.decoder, code.code, [functools.partial(_of_one, each) for each in code.local.split(1)]
        )


def _of_one(local: Tensor, points: Tensor) -> Tensor:
    return at_queries(local, points[None])[0]


class ImageNetwork(ConditionedNetwork):
    """Occupancy Network conditioned on a single image; the shape is in its own frame, not the camera's.

    Shapes:
        - **images:** ``(B, H, W, 3)`` in [0, 1]
        - **queries:** ``(B, Q, 3)``, unit cube
        - **logits:** ``(B, Q)``
    """

    def __init__(
        self,
        config: ConditionConfig = ConditionConfig(width=64),
        calibration: Calibration = Calibration(points=None),
    ) -> None:
        if config.local:
            raise ValueError("an image has no features of cells: local must be 0")
        super().__init__(config, calibration)
        self.encoder = ImageEncoder(config.code, config.width)

    @staticmethod
    def sizes(state: Mapping[str, Tensor]) -> tuple[int, int]:
        """Widths of the encoder and of its features of cells, from a state dict."""
        return len(state["encoder.features.conv1.weight"]), 0

    def forward(self, images: Tensor, queries: Tensor) -> Tensor:
        """Occupancy logits at the queries."""
        logits: Tensor = self.decoder(queries, self.encoder(images))
        return logits

    def encode(self, images: Sequence[Tensor], seed: int = 0) -> Tensor:
        """Codes ``(B, code)`` of images ``(H, W, 3)`` in [0, 1], one by one; ``seed`` is not used."""
        return torch.cat([self.encoder(image[None].to(self._like.device)) for image in images])

    def field(self, code: Tensor) -> OccupancyField:
        """The fields of codes ``(B, code)``, with folded batch norms."""
        return OccupancyField(self.decoder, code)


def voxel_centres() -> Tensor:
    """Centres ``(32, 32, 32, 3)`` of the cells of the voxel input, x first, unit cube."""
    axis = ((torch.arange(VOXELS, dtype=torch.float32) + 0.5) / VOXELS - 0.5) * VOXEL_BOX
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)


def voxelise(distance: Callable[[Tensor], Tensor]) -> Tensor:
    """Voxels ``(32, 32, 32)`` of a solid: cells within half a cell of it, so that thin parts are not lost.

    Args:
        distance: signed distance of points ``(M, 3)`` in the unit cube, ``(M,)``, such as `Shape.sdf`.
    """
    found = distance(voxel_centres().reshape(-1, 3))
    return (found <= VOXEL_BOX / VOXELS / 2).view((VOXELS,) * 3)
