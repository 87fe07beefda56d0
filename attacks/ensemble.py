"""The standard attacker: several attacks within one budget, each on the clouds that withstand the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from attacks.base import Attack, Norm
from attacks.black_box.square import Square
from attacks.defence_aware.jgba import JGBA
from attacks.gradient.apgd import APGD
from attacks.gradient.pgd import Bounded, per_coordinate
from attacks.gradient.si_adv import SIAdv
from attacks.optimised.aof import AOF
from attacks.oracle import Oracle
from attacks.settings import NonNegativeFloat, PositiveInt, Range
from attacks.worst_of import WorstOf


@dataclass(frozen=True)
class Ensemble(Bounded):
    """APGD-CE, targeted APGD-DLR, SI-Adv, JGBA, AOF and Square, each on the clouds still standing.

    AutoAttack, Croce & Hein, 2020, `arXiv:2003.01690 <https://arxiv.org/abs/2003.01690>`_, for clouds: FAB,
    which minimises a norm, is replaced by attacks that follow the surface or the graph of the points. All are
    within one norm and budget, and a cloud keeps the first success. Clouds that are misclassified already are
    not changed. The targeted loss needs 4 classes and is left out for fewer, as is Square in ``"l2"``.

    Steps of SI-Adv and JGBA have their published lengths relative to the budget.

    Other settings are those of `Bounded`.

    Attributes:
        norm: norm of the budget.
        delta: budget per coordinate (AutoAttack has none for clouds; recent papers: 0.05 in ``"linf"``).
        iterations: steps of each attack by gradients (AutoAttack: 100).
        targets: classes that DLR aims at, the strongest others (AutoAttack: 9).
        queries: most queries of Square (AutoAttack: 5,000).

    Examples:
        >>> attack = attacks.Ensemble("linf", delta=0.05, iterations=2, targets=1, queries=10)
        >>> result = attack(classifier, points, labels)
        >>> bool(result.distances["linf"].max() <= 0.0501)
        True
    """

    norm: Norm = "linf"
    delta: NonNegativeFloat = 0.05
    iterations: PositiveInt = 100
    targets: PositiveInt = 9
    queries: Annotated[int, Range(2)] = 5000

    def members(self, num_points: int, num_classes: int) -> tuple[Attack, ...]:
        """The attacks on clouds of ``num_points`` points, in order."""
        norm, steps, radius = self.norm, self.iterations, self.budget(num_points)
        longest = radius / per_coordinate(norm, num_points) * per_coordinate("point-l2", num_points)
        found: list[Attack] = [APGD(norm, epsilon=radius, iterations=steps)]
        if num_classes >= 4:
            found.append(APGD(norm, epsilon=radius, iterations=steps, loss="dlr", targets=self.targets))
        step = SIAdv.step / SIAdv.epsilon * longest
        found.append(SIAdv(radius, iterations=steps, step=step, norm=norm))
        step = JGBA.step / JGBA.epsilon * longest
        found.append(JGBA(radius, iterations=steps, step=step, norm=norm))
        found.append(AOF(radius, restarts=1, iterations=steps, norm=norm))
        if norm != "l2":
            found.append(Square(norm, epsilon=radius, queries=self.queries))
        return tuple(found)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Runs the members on the clouds that are classified correctly."""
        logits = oracle.logits(points)
        rows = (~oracle.reached(logits)).nonzero().squeeze(1)
        attacked, taken = points.clone(), torch.zeros_like(oracle.queries)
        if len(rows):
            part = oracle.part(rows)
            members = WorstOf(self.members(points.shape[1], logits.shape[1]))
            attacked[rows], taken[rows] = members.run(part, points[rows], generator)
            oracle.queries[rows] += part.queries
        return attacked, taken
