"""Worst case of several attacks, per cloud."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.base import Attack, ThreatModel
from attacks.best_so_far import BestSoFar
from attacks.oracle import Oracle

_STRONGEST = ("white-box", "score-based", "transfer")


@dataclass(frozen=True)
class WorstOf(Attack):
    """Several attacks on the same model; each cloud keeps the first result that reaches the goal.

    An ensemble as in AutoAttack, Croce & Hein, 2020, `arXiv:2003.01690 <https://arxiv.org/abs/2003.01690>`_.
    Attacks run in order on the clouds without success so far, all with the same random numbers. If no attack
    reaches the target, a misclassified result is preferred, then that of the first attack.

    Attributes:
        attacks: attacks of the same kind of change, norm and budget.

    Raises:
        ValueError: if there is no attack, or the threat models are incompatible.

    Examples:
        >>> attack = attacks.WorstOf((attacks.FGM("linf"), attacks.PGD("linf", iterations=2)))
        >>> result = attack(classifier, points, labels)
        >>> result.success.shape
        torch.Size([2])
    """

    attacks: tuple[Attack, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        threats = [attack.threat for attack in self.attacks]
        if not threats:
            raise ValueError("WorstOf needs at least one attack")
        changes = {dataclasses.replace(threat, knowledge="white-box", goal="both") for threat in threats}
        if len(changes) > 1:
            raise ValueError(f"the attacks differ in what they may change: {', '.join(map(str, changes))}")
        if {"targeted", "untargeted"} <= {threat.goal for threat in threats}:
            raise ValueError("some of the attacks are targeted, some untargeted")

    @property
    def threat(self) -> ThreatModel:
        """Largest knowledge and common goal of the attacks."""
        threats = [attack.threat for attack in self.attacks]
        knowledge = min((threat.knowledge for threat in threats), key=_STRONGEST.index)
        narrowest = next((threat for threat in threats if threat.goal != "both"), threats[0])
        return dataclasses.replace(narrowest, knowledge=knowledge)

    def budget(self, num_points: int) -> float | None:
        """Largest budget of the attacks."""
        budgets = [attack.budget(num_points) for attack in self.attacks]
        return max((budget for budget in budgets if budget is not None), default=None)

    def with_epsilon(self, epsilon: float) -> WorstOf:
        """All attacks with another budget."""
        return WorstOf(tuple(attack.with_epsilon(epsilon) for attack in self.attacks))

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Runs the attacks on the clouds without success so far."""
        state = generator.get_state()
        best, iterations = BestSoFar(points), torch.zeros_like(oracle.queries)
        for attack in self.attacks:
            rows = (best.rank < 3).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            generator.set_state(state)
            part = oracle.part(rows)
            found, taken = attack.run(part, points[rows], generator)
            found = attack.constrain(found, points[rows])
            best.see([found], _rank(part, found), rows=rows)
            oracle.queries[rows] += part.queries
            iterations[rows] += taken
        return best.kept[0], iterations


def _rank(oracle: Oracle, points: Tensor) -> Tensor:
    """``(b,)`` 3 where the goal is reached, 2 where the cloud is misclassified otherwise, else 1."""
    logits = oracle.logits(points)
    reached, wrong = oracle.reached(logits), logits.argmax(1) != oracle.labels
    return 1 + reached.long() + (reached | wrong).long()
