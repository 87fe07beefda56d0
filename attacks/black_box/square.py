"""Score-based random search over shifts of regions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from attacks.base import Norm, ThreatModel
from attacks.functional.losses import cross_entropy, margin
from attacks.gradient.pgd import Bounded
from attacks.oracle import Oracle
from attacks.settings import PositiveFraction, PositiveInt, Range
from ifdefense.geometry import points as operations

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries of 10,000 after which the regions halve (section 5 of the paper)."""


@dataclass(frozen=True)
class Square(Bounded):
    """Square Attack: random search that shifts one region at a time, from logits alone.

    Andriushchenko et al., 2020, `arXiv:1912.00049 <https://arxiv.org/abs/1912.00049>`_, algorithm 1, for
    clouds: a square of the image is the neighbourhood of a random point, with the same share of the points,
    and is set to one shift of full length, kept if the loss falls. Loss (margin, or cross-entropy of the
    target) and schedule are the published ones; the initial stripes are cells of random centres.
    All examples try the same point, by its index, and the same shift; misclassified clouds are not changed.

    Attributes:
        norm: ``"linf"`` or ``"point-l2"``; other settings of the budget as in `Bounded`.
        queries: most queries (AutoAttack: 5,000), including the clean cloud, without the final check.
        share: initial share of the points that is moved (AutoAttack: 0.8).
        cells: cells of the initial pattern (our choice).

    Raises:
        ValueError: if a setting is out of range, or the norm is ``"l2"``.

    Examples:
        >>> attack = attacks.Square("linf", queries=20)
        >>> result = attack(classifier, points, labels)
        >>> bool((result.queries <= 21).all())
        True
    """

    norm: Norm = "linf"
    queries: Annotated[int, Range(2)] = 5000
    share: PositiveFraction = 0.8
    cells: PositiveInt = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm == "l2":
            raise ValueError("Square takes a budget per point or coordinate: norm 'point-l2' or 'linf'")

    @property
    def threat(self) -> ThreatModel:
        """Logits only, targeted or untargeted shifts."""
        return ThreatModel("score-based", "both", "shift", self.norm, self.budget(1024))

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Runs the search; examples stop at their first success."""
        loss = cross_entropy if oracle.targeted else margin
        attacked = points.clone()
        logits = oracle.logits(points)
        value = loss(logits, oracle.classes, oracle.targeted)
        active = (~oracle.reached(logits)).nonzero().squeeze(1)
        taken = torch.zeros_like(oracle.queries)
        for query in range(1, self.queries):
            if len(active) == 0:
                break
            if query == 1:
                tried = points[active] + self._pattern(points[active], generator)
            else:
                tried = self._moved(attacked[active], points[active], query, generator)
            logits = oracle.logits(tried, active)
            new = loss(logits, oracle.classes[active], oracle.targeted)
            reached = oracle.reached(logits, active)
            taken[active] += 1
            # As published, the pattern is accepted regardless of its loss.
            better = (new < value[active]) | reached | (query == 1)
            attacked[active[better]], value[active[better]] = tried[better], new[better]
            active = active[~reached]
        return attacked, taken

    def _pattern(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """``(b, N, 3)`` shifts of full length, one per cell of random centres."""
        num = clean.shape[1]
        centres = torch.randperm(num, generator=generator)[: self.cells].to(clean.device)
        cell = operations.knn(clean, clean[:, centres], 1)[1].squeeze(2)
        return self._shifts(len(centres), clean, generator)[cell]

    def _moved(self, attacked: Tensor, clean: Tensor, query: int, generator: torch.Generator) -> Tensor:
        """``(b, N, 3)`` clouds with one neighbourhood set to one shift of full length."""
        num = clean.shape[1]
        halvings = sum(query * 10_000 > mark * self.queries for mark in HALVINGS)
        size = max(1, round(self.share / 2**halvings * num))
        centre = int(torch.randint(num, (1,), generator=generator))
        region = operations.knn(clean[:, centre : centre + 1], clean, size)[1].squeeze(1)
        moved = operations.gather(clean, region) + self._shifts(1, clean, generator)
        return attacked.scatter(1, region.unsqueeze(2).expand(-1, -1, 3), moved)

    def _shifts(self, count: int, like: Tensor, generator: torch.Generator) -> Tensor:
        """``(count, 3)`` random shifts of full length."""
        drawn = torch.randn(count, 3, generator=generator, dtype=torch.float64)
        if self.norm == "linf":
            drawn = torch.where(drawn < 0, -1.0, 1.0).double()
        else:
            drawn = drawn / drawn.norm(dim=1, keepdim=True)
        return (self.budget(like.shape[1]) * drawn).to(like)
