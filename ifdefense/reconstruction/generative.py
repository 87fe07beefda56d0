"""Generative Occupancy Network: sampling from a prior, and interpolation.

Mescheder et al., "Occupancy Networks: Learning 3D Reconstruction in Function Space", CVPR 2019, section 3.2
(https://arxiv.org/abs/1812.03828). A latent encoder maps labelled points of a solid to a normal distribution
``q(z | points, occupancies)``, and the decoder's logits depend on a ``z`` drawn from it. Training minimises

    cross-entropy of the occupancies + KL(q(z | ·) ‖ N(0, I)).

Tensor names and shapes match the public code. Everything is in the unit-cube frame.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ifdefense.implicit.base import Calibration, random_subset
from ifdefense.implicit.occupancy import (
    ConditionalDecoder,
    OccupancyField,
    ResnetPointnet,
    occupancy_loss,
)


@dataclasses.dataclass(frozen=True)
class GenerativeConfig:
    """Widths of a generative Occupancy Network; the defaults are those of the public code.

    Attributes:
        encoder: hidden width of the point encoder that conditions the shapes; 0 for none. The decoder is then
            conditioned on the latent itself, in every layer.
        code: width of the code; not used without an encoder.
        decoder: hidden width of the decoder.
        frequencies: octaves of the positional encoding in point encoder and decoder.
        latent: width of the latent.
        hidden: hidden width of the latent encoder.

    Raises:
        ValueError: if a width is not positive.
    """

    encoder: int = 512
    code: int = 512
    decoder: int = 256
    frequencies: int = 0
    latent: int = 128
    hidden: int = 128

    def __post_init__(self) -> None:
        for name, width in dataclasses.asdict(self).items():
            if width < (0 if name in ("encoder", "frequencies") else 1):
                raise ValueError(f"{name} of the network must be positive, got {width}")

    @property
    def condition(self) -> int:
        """Width of the code that conditions the decoder."""
        return self.code if self.encoder else self.latent

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> GenerativeConfig:
        """Infers the widths from a state dict.

        Raises:
            ValueError: if tensors are missing.
        """
        try:
            latent, hidden = state["encoder_latent.fc_mean.weight"].shape
            decoder, inputs = state["decoder.fc_p.weight"].shape[:2]
        except KeyError as error:
            raise ValueError(f"not a generative Occupancy Network: tensor {error} is missing") from None
        given = state.get("encoder.fc_c.weight")
        code, encoder = given.shape if given is not None else (latent, 0)
        return cls(encoder, code, decoder, (inputs - 3) // 6, latent, hidden)


class LatentEncoder(nn.Module):
    """Maps labelled points to the mean and the logarithm of the standard deviation of a latent.

    Point-wise layers, each followed by concatenation with the maximum over the points; invariant to the order
    of the points.

    Args:
        latent: width of the latent.
        code: width of a code that also conditions the distribution; 0 for none.
        hidden: width of the layers.
    """

    def __init__(self, latent: int = 128, code: int = 512, hidden: int = 128) -> None:
        super().__init__()
        self.fc_pos = nn.Linear(3, hidden)
        self.fc_c = nn.Linear(code, hidden) if code else None
        self.fc_0 = nn.Linear(1, hidden)
        self.fc_1 = nn.Linear(hidden, hidden)
        self.fc_2 = nn.Linear(2 * hidden, hidden)
        self.fc_3 = nn.Linear(2 * hidden, hidden)
        self.fc_mean = nn.Linear(hidden, latent)
        self.fc_logstd = nn.Linear(hidden, latent)

    def forward(self, points: Tensor, occupied: Tensor, code: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log σ, both ``(B, latent)``.

        Args:
            points: ``(B, P, 3)``, unit cube.
            occupied: ``(B, P)`` occupancies, bool or probabilities.
            code: ``(B, code)``, if the encoder takes one.
        """
        x = self.fc_0(occupied[..., None].to(points.dtype)) + self.fc_pos(points)
        if self.fc_c is not None:
            assert code is not None
            x = x + self.fc_c(code)[:, None]
        x = self.fc_1(F.relu(x))
        for layer in (self.fc_2, self.fc_3):
            pooled = x.amax(1, keepdim=True).expand_as(x)
            x = layer(F.relu(torch.cat([x, pooled], -1)))
        x = x.amax(1)
        return self.fc_mean(x), self.fc_logstd(x)


def kl_divergence(mean: Tensor, log_std: Tensor) -> Tensor:
    """``KL(N(μ, σ²) ‖ N(0, I)) = ½ Σ (μ² + σ² − 1 − 2 log σ)`` in nats, ``(B,)``.

    Args:
        mean: ``(B, latent)``.
        log_std: log σ, ``(B, latent)``.
    """
    return 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).sum(-1)


class GenerativeOccupancyNetwork(nn.Module):
    """Occupancy Network with a latent: a distribution of shapes, optionally conditioned on a cloud.

    Args:
        config: widths of the layers.
        calibration: interpretation of the field.

    Shapes:
        - **points, queries:** ``(B, P, 3)`` and ``(B, Q, 3)``, unit cube
        - **occupied:** ``(B, P)`` occupancies of the points
        - **latent:** ``(B, latent)``
        - **logits:** ``(B, Q)``

    Example:
        >>> model = load_network("generative")
        >>> meshes = extract_meshes(model.sample(8, seed=1), 8)
    """

    def __init__(
        self,
        config: GenerativeConfig = GenerativeConfig(),
        calibration: Calibration = Calibration(),
    ) -> None:
        super().__init__()
        self.config = config
        self.calibration = calibration
        self.encoder = (
            ResnetPointnet(config.code, config.encoder, config.frequencies) if config.encoder else None
        )
        self.encoder_latent = LatentEncoder(
            config.latent, config.code if config.encoder else 0, config.hidden
        )
        self.decoder = ConditionalDecoder(config.condition, config.decoder, config.frequencies, config.latent)

    @classmethod
    def of_weights(
        cls, state: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> GenerativeOccupancyNetwork:
        """Builds an untrained network with the sizes and the calibration of weights."""
        return cls(GenerativeConfig.of_state(state), Calibration.of_metadata(metadata))

    @property
    def _like(self) -> Tensor:
        return self.encoder_latent.fc_mean.weight

    def posterior(
        self, points: Tensor, occupied: Tensor, clouds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and log σ ``(B, latent)`` of ``q(z | points, occupied)``; ``clouds`` are the condition."""
        return self.encoder_latent(points, occupied, self._given(clouds))  # type: ignore[no-any-return]

    def _given(self, clouds: Tensor | None) -> Tensor | None:
        """Codes of the clouds, if the network is conditioned on clouds.

        Raises:
            ValueError: if there are clouds and no encoder, or an encoder and no clouds.
        """
        if (clouds is None) != (self.encoder is None):
            raise ValueError(
                "this network is not conditioned on clouds, but got some"
                if self.encoder is None
                else "this network is conditioned on clouds, but got none"
            )
        return None if clouds is None or self.encoder is None else self.encoder(clouds)

    def forward(
        self, points: Tensor, occupied: Tensor, queries: Tensor, clouds: Tensor | None = None
    ) -> Tensor:
        """Logits at the queries for labelled points, with the mean of the latent."""
        code = self._given(clouds)
        mean, _ = self.encoder_latent(points, occupied, code)
        logits: Tensor = self.decoder(queries, mean if code is None else code, mean)
        return logits

    def drawn(
        self, points: Tensor, occupied: Tensor, queries: Tensor, clouds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits ``(B, Q)`` with a latent ``μ + σ ε``, and the KL ``(B,)``; ε by the global generator."""
        code = self._given(clouds)
        mean, log_std = self.encoder_latent(points, occupied, code)
        latent = mean + log_std.exp() * torch.randn_like(mean)
        return self.decoder(queries, latent if code is None else code, latent), kl_divergence(mean, log_std)

    def latents(self, count: int, seed: int = 0) -> Tensor:
        """``(count, latent)`` from the prior; a larger count begins with the same latents.

        Raises:
            ValueError: if ``count`` is negative.
        """
        if count < 0:
            raise ValueError(f"the number of samples cannot be negative, got {count}")
        # Row by row, because torch draws large blocks in a different order.
        generator = torch.Generator().manual_seed(seed)
        rows = [
            torch.randn(self.config.latent, generator=generator, dtype=torch.float32) for _ in range(count)
        ]
        return torch.stack(rows).to(self._like) if rows else self._like.new_zeros(0, self.config.latent)

    def decode(self, latent: Tensor, code: Tensor | None = None) -> OccupancyField:
        """Fields of latents ``(B, latent)``.

        Args:
            latent: latents.
            code: codes of `encode`, ``(B, code)`` or ``(1, code)`` for all; only of a conditioned network.

        Raises:
            ValueError: if a code is missing or unexpected, or a shape is wrong.
        """
        if latent.ndim != 2 or latent.shape[1] != self.config.latent:
            raise ValueError(f"latents must be (B, {self.config.latent}), got {tuple(latent.shape)}")
        if (code is None) != (self.encoder is None):
            raise ValueError(
                "this network is not conditioned, but got a code"
                if self.encoder is None
                else "this network is conditioned on clouds: pass the code of a cloud, from encode"
            )
        return OccupancyField(self.decoder, latent if code is None else code.expand(len(latent), -1), latent)

    def sample(self, count: int, seed: int = 0, code: Tensor | None = None) -> OccupancyField:
        """Fields of ``count`` shapes drawn from the prior.

        Args:
            count: number of shapes.
            seed: of the latents.
            code: code ``(1, code)`` of a cloud as condition; only for a conditioned network.
        """
        return self.decode(self.latents(count, seed), code)

    def interpolate(self, a: Tensor, b: Tensor, steps: int, code: Tensor | None = None) -> OccupancyField:
        """Fields of ``steps`` shapes interpolated between two latents, both included.

        Args:
            a: ``(latent,)``, such as a row of `latents`, or the mean of `posterior`.
            b: the same.
            steps: number of shapes, at least 2.
            code: as of `sample`.

        Raises:
            ValueError: if there are fewer than 2 steps, or a latent has a wrong shape.
        """
        if steps < 2:
            raise ValueError(f"an interpolation needs at least 2 steps, got {steps}")
        if a.shape != (self.config.latent,) or b.shape != a.shape:
            raise ValueError(
                f"latents must be ({self.config.latent},), got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        share = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device)[:, None]
        return self.decode(torch.lerp(a[None], b[None], share), code)

    def encode(self, clouds: Sequence[Tensor], seed: int = 0) -> Tensor:
        """Codes ``(B, code)`` of clouds ``(N_i, 3)``, as conditions.

        Raises:
            ValueError: if the network is not conditioned on clouds.
        """
        if self.encoder is None:
            raise ValueError("this network is not conditioned on clouds")
        given = (random_subset(cloud, self.calibration.points, seed) for cloud in clouds)
        return torch.cat([self.encoder(cloud[None].to(self._like.device)) for cloud in given])

    def field(self, code: Tensor) -> OccupancyField:
        """The fields of codes ``(B, code)`` at the mean of the prior, z = 0."""
        return self.decode(code.new_zeros(len(code), self.config.latent), code)


def generative_loss(
    network: nn.Module, inputs: Sequence[Tensor], labels: Tensor, weight: float = 1.0
) -> Tensor:
    """Negative evidence lower bound: cross-entropy, summed over queries, plus ``weight`` times the KL.

    Args:
        network: a `GenerativeOccupancyNetwork`.
        inputs: arguments of its forward pass.
        labels: ``(B, Q)`` occupancies of the queries.
        weight: of the KL.
    """
    assert isinstance(network, GenerativeOccupancyNetwork)
    logits, divergence = network.drawn(*inputs)
    return occupancy_loss(logits.float(), labels) + weight * divergence.mean()
