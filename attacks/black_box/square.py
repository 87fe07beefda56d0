"""A score-based attack: random search over shifts of whole regions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.base import Norm, Oracle, ThreatModel
from attacks.functional.losses import cross_entropy, margin
from attacks.gradient.pgd import Bounded
from ifdefense.geometry import points as operations

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries of 10,000 after which the regions halve (Andriushchenko et al., 2020, section 5)."""


@dataclass(frozen=True)
class Square(Bounded):
    """Random search that moves one region at a time to the edge of the budget, by the logits alone.

    Square Attack, Andriushchenko et al., 2020, `arXiv:1912.00049 <https://arxiv.org/abs/1912.00049>`_,
    algorithm 1, brought to clouds. There, a random square of the image is set to a random corner of the
    budget, and kept if the loss falls. Here, the square is a random point's neighbourhood in the clean cloud,
    with the same share of the points as the square has of the pixels, and all of it is set to *one* shift of
    full length: random signs for ``"linf"``, a random direction for ``"point-l2"``. As there, the loss is the
    margin, or the cross-entropy towards a target; the share halves by the same schedule; and the search
    starts from a random pattern at the edge of the budget, there stripes, here cells of random centres.

    Why not SimBA (Guo et al., 2019, `arXiv:1905.07121 <https://arxiv.org/abs/1905.07121>`_), which tries
    single coordinates or low frequencies: networks on clouds pool by maxima, a single coordinate mostly
    changes no logit, so that most queries would be lost; and clouds have no common frequency basis.
    Neighbourhoods are the clouds' low frequencies.

    A cloud that is misclassified already is left alone. All examples try the same point, by its index, and
    the same shift.

    Attributes:
        norm: ``"linf"`` or ``"point-l2"``. A budget over all points together would ask for another search, as
            in the paper.
        delta: size of the budget a coordinate (IF-Defense's for PGD: 0.08).
        epsilon: budget in the norm itself, instead of ``delta``.
        queries: largest number of queries (AutoAttack: 5,000), the first on the clean cloud; the check of the
            result comes on top.
        share: first share of the points that is moved at once (AutoAttack: 0.8).
        cells: cells of the pattern that the search starts from, at most one a point (our choice).

    Raises:
        ValueError: if a number is out of range, or the norm is ``"l2"``.
    """

    norm: Norm = "linf"
    queries: int = 5000
    share: float = 0.8
    cells: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm == "l2":
            raise ValueError("Square keeps a budget of each point or coordinate: norm 'linf' or 'point-l2'")
        if self.queries < 2 or self.cells < 1:
            raise ValueError(
                f"queries must be at least 2 and cells at least 1, got {self.queries} and {self.cells}"
            )
        if not 0 < self.share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {self.share}")

    @property
    def threat(self) -> ThreatModel:
        """Logits only, targeted or untargeted shifts within the budget."""
        return ThreatModel("score-based", "both", "shift", self.norm, self.budget(1024))

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Searches; an example leaves as soon as it has reached its goal."""
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
            # As published: the pattern is taken whatever its loss.
            better = (new < value[active]) | reached | (query == 1)
            attacked[active[better]], value[active[better]] = tried[better], new[better]
            active = active[~reached]
        return attacked, taken

    def _pattern(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """``(b, N, 3)`` shifts at the edge of the budget, one for each cell of random centres."""
        num = clean.shape[1]
        centres = torch.randperm(num, generator=generator)[: self.cells].to(clean.device)
        cell = operations.knn(clean, clean[:, centres], 1)[1].squeeze(2)
        return self._shifts(len(centres), clean, generator)[cell]

    def _moved(self, attacked: Tensor, clean: Tensor, query: int, generator: torch.Generator) -> Tensor:
        """``(b, N, 3)`` clouds with one neighbourhood set to one shift at the edge of the budget."""
        num = clean.shape[1]
        halvings = sum(query * 10_000 > mark * self.queries for mark in HALVINGS)
        size = max(1, round(self.share / 2**halvings * num))
        centre = int(torch.randint(num, (1,), generator=generator))
        region = operations.knn(clean[:, centre : centre + 1], clean, size)[1].squeeze(1)
        moved = operations.gather(clean, region) + self._shifts(1, clean, generator)
        return attacked.scatter(1, region.unsqueeze(2).expand(-1, -1, 3), moved)

    def _shifts(self, count: int, like: Tensor, generator: torch.Generator) -> Tensor:
        """``(count, 3)`` random shifts of the full budget."""
        drawn = torch.randn(count, 3, generator=generator, dtype=torch.float64)
        if self.norm == "linf":
            drawn = torch.where(drawn < 0, -1.0, 1.0).double()
        else:
            drawn = drawn / drawn.norm(dim=1, keepdim=True)
        return (self.budget(like.shape[1]) * drawn).to(like)
