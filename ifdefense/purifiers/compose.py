"""Chains of purifiers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor, nn

from ifdefense.purifiers.base import Outcome, Purifier


class Compose(Purifier):
    """Chains purifiers; each normalises its own input.

    Only the last one has to return the requested number of points.

    Args:
        parts: purifiers in order of application, at least one.
        name: name of the chain; by default the joined names of the parts.

    Raises:
        ValueError: if ``parts`` is empty.

    Examples:
        >>> chain = ifdefense.Compose([ifdefense.load("sor"), ifdefense.load("srs")])
        >>> chain.name, chain(points).shape
        ('sor+srs', torch.Size([2, 64, 3]))
    """

    def __init__(self, parts: Sequence[Purifier], name: str | None = None) -> None:
        super().__init__()
        if not parts:
            raise ValueError("a chain needs at least one purifier")
        self.parts = nn.ModuleList(parts)
        self.name = name or "+".join(part.name for part in parts)
        self.deterministic = all(part.deterministic for part in parts)
        self.differentiable = all(part.differentiable for part in parts)
        self.normalise = any(part.normalise for part in parts)

    def restore(
        self, clouds: list[Tensor], counts: Sequence[int | None], seed: int, distinct: bool = False
    ) -> list[Outcome]:
        """Applies the parts; selections of input points are composed."""
        chain = [Outcome(cloud) for cloud in clouds]
        for number, part in enumerate(self.parts):
            assert isinstance(part, Purifier)
            wanted = counts if number == len(self.parts) - 1 else [None] * len(clouds)
            results = part.restore([outcome.points for outcome in chain], wanted, seed, distinct)
            # The part has removed duplicates, so only new points can contain some.
            distinct = all(outcome.index is not None for outcome in results)
            chain = [_joined(a, b, number == 0) for a, b in zip(chain, results, strict=True)]
        return chain

    run = restore  # the parts normalise their inputs themselves


def _joined(before: Outcome, after: Outcome, first: bool) -> Outcome:
    """Composes two outcomes, relative to the input of the first."""
    if first:
        return after
    both = before.index is not None and after.index is not None
    return dataclasses.replace(after, index=before.index[after.index] if both else None, kept=before.kept)  # type: ignore[index]
