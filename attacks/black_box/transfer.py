"""Attacks computed on one model and evaluated on another."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.base import Attack, ThreatModel
from attacks.oracle import Model, Oracle
from ifdefense.logits import frozen


@dataclass(frozen=True)
class Transfer(Attack):
    """An attack computed on a surrogate and evaluated on the victim, with one query.

    Papernot et al., 2016, `arXiv:1605.07277 <https://arxiv.org/abs/1605.07277>`_. Attacks that stop at their
    first success on the surrogate transfer less; disable ``early_stop``.

    Attributes:
        attack: the attack, with its budget.
        surrogate: ``(B, N, 3)`` points to ``(B, C)`` logits over the victim's classes.

    Examples:
        >>> surrogate = classifiers.build("pointnet", 4)
        >>> attack = attacks.Transfer(attacks.PGD("linf", iterations=2), surrogate)
        >>> result = attack(classifier, points, labels)
        >>> result.points.shape
        torch.Size([2, 64, 3])
    """

    attack: Attack
    surrogate: Model = dataclasses.field(repr=False)

    @property
    def threat(self) -> ThreatModel:
        """Threat model of the attack, without knowledge of the victim."""
        return dataclasses.replace(self.attack.threat, knowledge="transfer")

    def budget(self, num_points: int) -> float | None:
        """That of the attack."""
        return self.attack.budget(num_points)

    def with_epsilon(self, epsilon: float) -> Transfer:
        """The attack with another budget, on the same surrogate."""
        return dataclasses.replace(self, attack=self.attack.with_epsilon(epsilon))

    def constrain(self, points: Tensor, clean: Tensor) -> Tensor:
        """As the attack does."""
        return self.attack.constrain(points, clean)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Runs the attack on the surrogate."""
        own = Oracle(self.surrogate, oracle.labels, oracle.classes if oracle.targeted else None)
        with frozen(self.surrogate):
            return self.attack.run(own, points, generator)
