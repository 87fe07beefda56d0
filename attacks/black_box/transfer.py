"""Attacks made on one model and scored on another."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.base import Attack, Model, Oracle, ThreatModel, _frozen


@dataclass(frozen=True)
class Transfer(Attack):
    """Any attack, made on a surrogate; the victim is asked once, at the end, whether it falls for it too.

    Papernot et al., 2016, `arXiv:1605.07277 <https://arxiv.org/abs/1605.07277>`_. The attacker knows the
    surrogate as the attack demands, and of the victim only its classes. Queries are the victim's, so 1 an
    example; iterations are those of the attack. Attacks that stop at their first success on the surrogate
    transfer less: turn their ``early_stop`` off.

    Attributes:
        attack: the attack, with its settings and its budget.
        surrogate: ``(B, N, 3)`` points to ``(B, C)`` logits over the victim's classes; attacked in evaluation
            mode and found unchanged afterwards.
    """

    attack: Attack
    surrogate: Model = dataclasses.field(repr=False)

    @property
    def threat(self) -> ThreatModel:
        """That of the attack, but without knowledge of the victim."""
        return dataclasses.replace(self.attack.threat, knowledge="transfer")

    def budget(self, num_points: int) -> float | None:
        """That of the attack."""
        return self.attack.budget(num_points)

    def constrain(self, points: Tensor, clean: Tensor) -> Tensor:
        """As the attack does."""
        return self.attack.constrain(points, clean)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Runs the attack on the surrogate."""
        # In a targeted attack the true classes do not matter any more: the targets stand in for them.
        own = Oracle(self.surrogate, oracle.classes, oracle.classes if oracle.targeted else None)
        with _frozen(self.surrogate):
            return self.attack.run(own, points, generator)
