"""Settings of the training of a classifier."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from ifdefense.training.runs import check_ranges

Schedule = tuple[tuple[int, float], ...]
MatmulPrecision = Literal["highest", "high", "medium"]


@dataclasses.dataclass(frozen=True)
class ClassifierOptions:
    """Settings of a run. Lengths are in the unit-sphere frame.

    Attributes:
        schedule: ``((points, epochs), ...)``, random points per cloud and number of epochs; a fraction is an
            epoch on part of the clouds.
        batch_size: clouds per step.
        lr: largest learning rate of AdamW, reached after the warm-up, then a cosine to nearly zero.
        weight_decay: weight decay of AdamW.
        label_smoothing: label smoothing.
        alignment_penalty: weight of the distance of PointNet's feature alignment from orthogonality.
        max_scale: each axis is scaled by a factor between the inverse of this and this.
        max_shift: largest shift along each axis.
        jitter: standard deviation of the noise on each coordinate, clipped at five times it.
        max_rotation: largest rotation about the up axis z, in degrees.
        mix: probability that a batch is mixed by `classifiers.augmentation.cut_mix`.
        warmup: share of the steps with a rising rate.
        adversarial: share of each batch that is attacked, see `classifiers.adversarial`.
        delta: radius of that attack's L∞ ball.
        attack_steps: gradients of that attack.
        coherent: in a share of the batches, shifts are averaged over up to this number of nearest points of
            256, proportionally more for larger clouds; see `classifiers.adversarial.attacked`. 1 for none.
        coherent_share: probability that a batch is one of these.
        through_share: probability that a batch is attacked through a purifier and purified, see
            `classifiers.adversarial.attacked_through`; 0 in runs without a purifier.
        average: decay per step of a moving average of the weights, used for validation and export; 0 for
            none.
        half_search: find the largest points in bfloat16, see `classifiers.layers.max_pooled_linear`.
        matmul_precision: precision of products in training, see `torch.set_float32_matmul_precision`.
            ``"medium"``
            is two to four times faster on some processors.
        seed: seed of the initial weights, the order and the augmentation.

    Raises:
        ValueError: if a number is out of range, or ``through_share`` given without ``adversarial``.

    Examples:
        >>> ClassifierOptions(batch_size=16).lr
        0.002
    """

    schedule: Schedule = ((256, 18), (512, 4), (1024, 1))
    batch_size: int = 32
    lr: float = 2e-3
    weight_decay: float = 1e-4
    label_smoothing: float = 0.1
    alignment_penalty: float = 1e-3
    max_scale: float = 1.25
    max_shift: float = 0.1
    jitter: float = 0.01
    max_rotation: float = 0.0
    mix: float = 0.0
    warmup: float = 0.1
    adversarial: float = 0.0
    delta: float = 0.05
    attack_steps: int = 3
    coherent: int = 1
    coherent_share: float = 0.5
    through_share: float = 0.0
    average: float = 0.0
    half_search: bool = True
    matmul_precision: MatmulPrecision = "highest"
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(
            self,
            batch_size=(1, math.inf),
            lr=(1e-12, 10),
            weight_decay=(0, 10),
            label_smoothing=(0, 1),
            alignment_penalty=(0, math.inf),
            max_scale=(1, 10),
            max_shift=(0, 10),
            jitter=(0, 1),
            max_rotation=(0, 180),
            mix=(0, 1),
            warmup=(0, 1),
            adversarial=(0, 1),
            delta=(0, 10),
            attack_steps=(1, math.inf),
            coherent=(1, 256),
            coherent_share=(0, 1),
            through_share=(0, 1),
            average=(0, 1 - 1e-9),
        )
        if self.through_share and not self.adversarial:
            raise ValueError("through_share needs adversarial, the share of a batch that is attacked")
        if self.matmul_precision not in get_args(MatmulPrecision):
            raise ValueError(
                f"matmul_precision must be one of {', '.join(get_args(MatmulPrecision))}, "
                f"got {self.matmul_precision!r}"
            )

    @property
    def epochs(self) -> int:
        """Epochs of the whole schedule."""
        return len(self._epochs())

    def _epochs(self) -> list[tuple[int, float]]:
        """Points per cloud and share of the clouds in every epoch."""
        every = []
        for points, epochs in self.schedule:
            whole = math.floor(epochs)
            every += [(points, 1.0)] * whole
            if epochs > whole:
                every.append((points, epochs - whole))
        return every

    def points_at(self, epoch: int) -> int:
        """Points per cloud in an epoch, counted from 0."""
        if epoch >= self.epochs:
            raise ValueError(f"epoch {epoch} lies after the schedule")
        return self._epochs()[epoch][0]

    def batches_at(self, epoch: int, clouds: int) -> int:
        """Steps of an epoch."""
        return max(1, round(clouds // self.batch_size * self._epochs()[epoch][1]))
