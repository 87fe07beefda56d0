"""Occupancy Network conditioned on a point cloud.

Mescheder et al., "Occupancy Networks: Learning 3D Reconstruction in Function Space", CVPR 2019
(https://arxiv.org/abs/1812.03828). Tensor names and shapes match the public code, so its checkpoints load.
Everything is in the unit-cube frame: the cloud's longest side is 1 and its bounding box is centred on 0.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ifdefense.implicit.base import Calibration, evaluated

CHUNK = 2048
"""Queries per chunk of the folded decoder, so that activations fit the cache of a core."""


@dataclasses.dataclass(frozen=True)
class OccupancyConfig:
    """Widths of an Occupancy Network; the defaults are the published ones (10.37 M parameters).

    Attributes:
        encoder: hidden width of the ResNet-PointNet.
        code: width of the code.
        decoder: hidden width of the decoder.
        frequencies: octaves of the positional encoding in encoder and decoder; the published network uses
            none. See :func:`positional_encoding`.
    """

    encoder: int = 512
    code: int = 512
    decoder: int = 256
    frequencies: int = 0

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> OccupancyConfig:
        """Infers the widths from a state dict.

        Raises:
            ValueError: if tensors are missing.
        """
        try:
            code, encoder = state["encoder.fc_c.weight"].shape
            decoder, inputs = state["decoder.fc_p.weight"].shape[:2]
        except KeyError as error:
            raise ValueError(f"not an Occupancy Network: tensor {error} is missing") from None
        return cls(encoder=encoder, code=code, decoder=decoder, frequencies=(inputs - 3) // 6)


def positional_encoding(points: Tensor, frequencies: int) -> Tensor:
    """Concatenates coordinates with the sine and cosine of their first octaves.

    ``γ(x) = (x, sin(2⁰πx), cos(2⁰πx), …, sin(2^{L−1}πx), cos(2^{L−1}πx))``: Mildenhall et al., NeRF, ECCV
    2020 (https://arxiv.org/abs/2003.08934). Speeds up learning of sharp features.

    Args:
        points: ``(..., 3)``, unit-cube frame.
        frequencies: octaves L; 0 returns the points unchanged.

    Returns:
        ``(..., 3 + 6 L)``.
    """
    if frequencies == 0:
        return points
    octaves = math.pi * 2.0 ** torch.arange(frequencies, device=points.device, dtype=points.dtype)
    phase = (points[..., None, :] * octaves[:, None]).flatten(-2)
    return torch.cat([points, phase.sin(), phase.cos()], dim=-1)


def _start_small(layer: nn.Linear | nn.Conv1d) -> None:
    """Initialises the last layer of a residual branch with small weights, close to the identity."""
    nn.init.normal_(layer.weight, std=0.3 / math.sqrt(layer.weight.shape[1]))


class ResnetBlockFC(nn.Module):
    """``shortcut(x) + fc_1(relu(fc_0(relu(x))))`` on points, part of ``x`` optionally shared per cloud."""

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__()
        self.fc_0 = nn.Linear(size_in, size_out)
        self.fc_1 = nn.Linear(size_out, size_out)
        self.shortcut = None if size_in == size_out else nn.Linear(size_in, size_out, bias=False)
        _start_small(self.fc_1)

    def forward(self, x: Tensor, pooled: Tensor | None = None) -> Tensor:
        """Maps ``(B, N, size_in)``, or ``(B, N, size_in - P)`` with shared features ``(B, P)``.

        The product with ``pooled`` is computed once per cloud instead of once per point.
        """
        if pooled is None:
            hidden = self.fc_0(F.relu(x))
            residual = x if self.shortcut is None else self.shortcut(x)
        else:
            assert self.shortcut is not None
            width = x.shape[-1]
            shared = F.linear(F.relu(pooled), self.fc_0.weight[:, width:], self.fc_0.bias)
            hidden = F.linear(F.relu(x), self.fc_0.weight[:, :width]) + shared[:, None]
            shared = F.linear(pooled, self.shortcut.weight[:, width:])
            residual = F.linear(x, self.shortcut.weight[:, :width]) + shared[:, None]
        out: Tensor = residual + self.fc_1(F.relu(hidden))
        return out


class ResnetPointnet(nn.Module):
    """Encoder: five ResNet blocks over the points, each followed by concatenated max-pooled features."""

    def __init__(self, code: int = 512, hidden: int = 512, frequencies: int = 0) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.fc_pos = nn.Linear(3 + 6 * frequencies, 2 * hidden)
        self.block_0 = ResnetBlockFC(2 * hidden, hidden)
        self.block_1 = ResnetBlockFC(2 * hidden, hidden)
        self.block_2 = ResnetBlockFC(2 * hidden, hidden)
        self.block_3 = ResnetBlockFC(2 * hidden, hidden)
        self.block_4 = ResnetBlockFC(2 * hidden, hidden)
        self.fc_c = nn.Linear(hidden, code)

    def forward(self, points: Tensor) -> Tensor:
        """Codes ``(B, code)`` of clouds ``(B, N, 3)``."""
        x = self.block_0(self.fc_pos(positional_encoding(points, self.frequencies)))
        for block in (self.block_1, self.block_2, self.block_3, self.block_4):
            x = block(x, x.max(dim=1).values)
        code: Tensor = self.fc_c(F.relu(x.max(dim=1).values))
        return code


class ConditionalBatchNorm(nn.Module):
    """Batch normalisation whose scale and shift are linear functions of the code."""

    def __init__(self, code: int, features: int) -> None:
        super().__init__()
        self.conv_gamma = nn.Conv1d(code, features, 1)
        self.conv_beta = nn.Conv1d(code, features, 1)
        self.bn = nn.BatchNorm1d(features, affine=False)
        # Zero in the public code, so that initially the code has no influence and no gradient.
        nn.init.normal_(self.conv_gamma.weight, std=0.5 / math.sqrt(code))
        nn.init.ones_(cast(Tensor, self.conv_gamma.bias))
        nn.init.normal_(self.conv_beta.weight, std=0.5 / math.sqrt(code))
        nn.init.zeros_(cast(Tensor, self.conv_beta.bias))

    def affine(self, code: Tensor) -> tuple[Tensor, Tensor]:
        """``γ`` and ``β`` of ``(B, code)``, both ``(B, features)``."""
        gamma = F.linear(code, self.conv_gamma.weight[..., 0], self.conv_gamma.bias)
        beta = F.linear(code, self.conv_beta.weight[..., 0], self.conv_beta.bias)
        return gamma, beta

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """Normalises ``(B, Q, features)`` over clouds and queries, then scales and shifts by the code."""
        gamma, beta = self.affine(code)
        normed = self.bn(x.flatten(0, 1)).view_as(x)
        return torch.addcmul(beta[:, None], normed, gamma[:, None])

    def fold(self, code: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift per cloud at inference, both ``(B, features)``."""
        assert self.bn.running_mean is not None and self.bn.running_var is not None
        gamma, beta = self.affine(code)
        scale = gamma * torch.rsqrt(self.bn.running_var + self.bn.eps)
        return scale, beta - scale * self.bn.running_mean


class ConditionalResnetBlock(nn.Module):
    """``x + fc_1(relu(bn_1(fc_0(relu(bn_0(x, c))), c)))``."""

    def __init__(self, code: int, size: int) -> None:
        super().__init__()
        self.bn_0 = ConditionalBatchNorm(code, size)
        self.bn_1 = ConditionalBatchNorm(code, size)
        self.fc_0 = nn.Conv1d(size, size, 1)
        self.fc_1 = nn.Conv1d(size, size, 1)
        _start_small(self.fc_1)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """Maps ``(B, Q, size)``."""
        hidden = F.linear(F.relu(self.bn_0(x, code)), self.fc_0.weight[..., 0], self.fc_0.bias)
        return x + F.linear(F.relu(self.bn_1(hidden, code)), self.fc_1.weight[..., 0], self.fc_1.bias)


class ConditionalDecoder(nn.Module):
    """Decoder: five conditional ResNet blocks from query coordinates to occupancy logits.

    Args:
        code: width of the codes, which condition the batch norms.
        hidden: width of the blocks.
        frequencies: octaves of the positional encoding.
        latent: width of a second input, added to the features of the queries; 0 for none.
    """

    def __init__(self, code: int = 512, hidden: int = 256, frequencies: int = 0, latent: int = 0) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.fc_z = nn.Linear(latent, hidden) if latent else None
        self.fc_p = nn.Conv1d(3 + 6 * frequencies, hidden, 1)
        self.block0 = ConditionalResnetBlock(code, hidden)
        self.block1 = ConditionalResnetBlock(code, hidden)
        self.block2 = ConditionalResnetBlock(code, hidden)
        self.block3 = ConditionalResnetBlock(code, hidden)
        self.block4 = ConditionalResnetBlock(code, hidden)
        self.bn = ConditionalBatchNorm(code, hidden)
        self.fc_out = nn.Conv1d(hidden, 1, 1)

    @property
    def blocks(self) -> tuple[ConditionalResnetBlock, ...]:
        """The five blocks."""
        return (self.block0, self.block1, self.block2, self.block3, self.block4)

    def forward(self, queries: Tensor, code: Tensor, latent: Tensor | None = None) -> Tensor:
        """Logits ``(B, Q)`` at queries ``(B, Q, 3)`` of clouds with codes ``(B, code)``.

        ``latent`` is the second input, ``(B, latent)`` or one per query, ``(B, Q, latent)``.
        """
        x = F.linear(positional_encoding(queries, self.frequencies), self.fc_p.weight[..., 0], self.fc_p.bias)
        if self.fc_z is not None:
            assert latent is not None
            shift = self.fc_z(latent)
            x = x + (shift if shift.ndim == 3 else shift[:, None])
        for block in self.blocks:
            x = block(x, code)
        x = F.linear(F.relu(self.bn(x, code)), self.fc_out.weight[..., 0], self.fc_out.bias)
        return x.squeeze(-1)


Local = Callable[[Tensor], Tensor]
"""Latents ``(M, latent)`` of one cloud at queries ``(M, 3)``, unit cube."""


class _FoldedLayers(NamedTuple):
    """Folded decoder of one cloud: scale, shift, inner, bias, outer per block; last scale and shift."""

    layers: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    scale: Tensor
    shift: Tensor
    local: Local | None


class OccupancyField:
    """Fields of several clouds at inference, with folded batch norms; see `ifdefense.implicit.base.Field`.

    At inference a conditional batch norm is an affine map per cloud. The second one of each block is folded
    into the preceding linear layer, biases along the residual path into the following shifts. This leaves one
    scaling, two matrix products and two ReLUs per query and block.

    Args:
        decoder: decoder; its running statistics are used in training mode too.
        code: ``(B, code)`` codes of the clouds.
        latent: the decoder's second input: ``(B, latent)``, or a function of the queries for each cloud.
    """

    def __init__(
        self, decoder: ConditionalDecoder, code: Tensor, latent: Tensor | Sequence[Local] | None = None
    ) -> None:
        self.frequencies = decoder.frequencies
        self.start = decoder.fc_p.weight[..., 0].t()
        self.end = decoder.fc_out.weight[0, :, 0]
        assert decoder.fc_out.bias is not None
        self.end_bias = decoder.fc_out.bias
        self.inward = decoder.fc_z.weight.t() if decoder.fc_z is not None else None
        if latent is None:
            latents: Sequence[Tensor | Local | None] = [None] * len(code)
        else:
            latents = latent.split(1) if isinstance(latent, Tensor) else latent
        # One cloud at a time, as rounding varies with the batch size.
        self.clouds = [
            self._fold(decoder, row, second) for row, second in zip(code.split(1), latents, strict=True)
        ]

    @staticmethod
    def _fold(decoder: ConditionalDecoder, code: Tensor, latent: Tensor | Local | None) -> _FoldedLayers:
        """Folded layers for a code ``(1, code)`` and a latent ``(1, latent)`` or per query."""
        offset = decoder.fc_p.bias  # constant part of the residual path
        layers = []
        assert offset is not None
        if decoder.fc_z is not None:
            assert latent is not None
            offset = offset + (decoder.fc_z(latent) if isinstance(latent, Tensor) else decoder.fc_z.bias)
        for block in decoder.blocks:
            scale_0, shift_0 = block.bn_0.fold(code)
            scale_1, shift_1 = block.bn_1.fold(code)
            assert block.fc_0.bias is not None and block.fc_1.bias is not None
            inner = (scale_1.t() * block.fc_0.weight[..., 0]).t()
            bias = scale_1 * block.fc_0.bias + shift_1
            outer = block.fc_1.weight[..., 0].t()
            layers.append((scale_0, shift_0 + scale_0 * offset, inner, bias, outer))
            offset = offset + block.fc_1.bias
        scale, shift = decoder.bn.fold(code)
        local = None if latent is None or isinstance(latent, Tensor) else latent
        return _FoldedLayers(layers, scale, shift + scale * offset, local)

    def _logits(self, folded: _FoldedLayers, points: Tensor) -> Tensor:
        x = positional_encoding(points, self.frequencies) @ self.start
        if folded.local is not None:
            assert self.inward is not None
            x = x + folded.local(points) @ self.inward
        for scale, shift, inner, bias, outer in folded.layers:
            hidden = torch.addcmul(shift, x, scale).relu_()
            hidden = torch.addmm(bias, hidden, inner).relu_()
            x = torch.addmm(x, hidden, outer)
        hidden = torch.addcmul(folded.shift, x, folded.scale).relu_()
        return hidden @ self.end + self.end_bias

    def __call__(self, points: Tensor, cloud: Tensor) -> Tensor:
        """Logits of queries of several clouds.

        Args:
            points: ``(M, 3)`` queries, unit-cube frame.
            cloud: ``(M,)`` int64 index of each query's cloud, ascending.

        Returns:
            ``(M,)`` logits, independent of the batch.
        """
        fields = [functools.partial(self._logits, folded) for folded in self.clouds]
        return evaluated(fields, points, cloud, CHUNK)


class OccupancyNetwork(nn.Module):
    """Occupancy Network: encoder and decoder.

    Args:
        config: widths of the layers.
        calibration: interpretation of the field.
        views: disjoint subsets of ``calibration.points`` points whose codes are averaged by `encode`.

    Shapes:
        - **clouds:** ``(B, N, 3)``, unit-cube frame, any N; the published network was trained on 300 points
        - **queries:** ``(B, Q, 3)``, unit-cube frame
        - **logits:** ``(B, Q)``; occupancy is Bernoulli with these logits

    Examples:
        >>> network = OccupancyNetwork(OccupancyConfig(encoder=8, code=8, decoder=8)).eval()
        >>> network(points, queries=points[:, :5]).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        config: OccupancyConfig = OccupancyConfig(),
        calibration: Calibration = Calibration(),
        views: int = 3,
    ) -> None:
        super().__init__()
        self.config = config
        self.calibration = calibration
        self.views = views
        self.encoder = ResnetPointnet(config.code, config.encoder, config.frequencies)
        self.decoder = ConditionalDecoder(config.code, config.decoder, config.frequencies)

    @classmethod
    def of_weights(cls, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> OccupancyNetwork:
        """Builds an untrained network with the sizes and the calibration of weights."""
        return cls(OccupancyConfig.of_state(state), Calibration.of_metadata(metadata))

    def forward(self, clouds: Tensor, queries: Tensor) -> Tensor:
        """Occupancy logits at the queries."""
        logits: Tensor = self.decoder(queries, self.encoder(clouds))
        return logits

    def settings(self) -> dict[str, int]:
        """Attributes that affect the result and are not stored in the weights."""
        return {"views": self.views}

    def codes(self, clouds: Tensor) -> Tensor:
        """Codes ``(B, code)`` of clouds ``(B, N, 3)``, from all points.

        Clouds are encoded one by one, as rounding varies with the batch size.
        """
        return torch.cat([self.encoder(cloud) for cloud in clouds.split(1)])

    def encode(self, clouds: Sequence[Tensor], seed: int = 0) -> Tensor:
        """Codes ``(B, code)`` of clouds ``(N_i, 3)``, each the mean over random disjoint subsets."""
        device = next(self.parameters()).device
        codes = [
            self.encoder(self._subsets(cloud, seed).to(device)).mean(0, keepdim=True) for cloud in clouds
        ]
        return torch.cat(codes)

    def _subsets(self, cloud: Tensor, seed: int) -> Tensor:
        """Random subsets ``(V, P, 3)``, disjoint if there are enough points."""
        if self.calibration.points is None:
            return cloud[None]
        size = self.calibration.points
        order = torch.randperm(len(cloud), generator=torch.Generator().manual_seed(seed))
        take = torch.arange(size * self.views) % len(order)
        return cloud[order[take].to(cloud.device)].view(self.views, size, 3)

    def field(self, code: Tensor) -> OccupancyField:
        """The fields of codes ``(B, code)``, with folded batch norms."""
        return OccupancyField(self.decoder, code)


def occupancy_loss(logits: Tensor, occupied: Tensor) -> Tensor:
    """Binary cross-entropy, summed over queries and averaged over clouds.

    Args:
        logits: ``(B, Q)``.
        occupied: ``(B, Q)`` labels, bool or 0/1.
    """
    nll = F.binary_cross_entropy_with_logits(logits, occupied.to(logits.dtype), reduction="none")
    return nll.sum(-1).mean()
