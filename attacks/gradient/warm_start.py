"""Attacks within a budget that start from the result of another attack."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from attacks.base import Attack, ThreatModel
from attacks.gradient.pgd import Bounded
from attacks.oracle import Oracle


@dataclass(frozen=True)
class WarmStart(Attack):
    """An attack that starts from given clouds, or from the result of another attack.

    Where gradients through the model are costly or noisy, a start found on a surrogate saves steps::

        attack = attacks.APGD("linf", iterations=20)
        attacks.WarmStart(attack, attacks.Transfer(attack, surrogate))(model, points, labels)

    The start is projected onto the budget of the attack. It counts as the attack's own start does: `APGD`
    keeps it if nothing better is found, `PGD` returns its last iterate.

    Attributes:
        attack: the attack, a `Bounded` one that starts from `Bounded.randomised`, such as `PGD` and `APGD`.
        start: an attack that shifts points, or ``(B, N, 3)`` clouds, one per example.

    Raises:
        TypeError: if the attack is not `Bounded`, or the start neither an attack nor a tensor.
        ValueError: if the start adds or drops points; in a call, if given clouds have another shape or are
            not finite, or the attack uses no start, such as `FGM`.

    Examples:
        >>> attack = attacks.APGD("linf", epsilon=0.05, iterations=2)
        >>> start = attacks.Transfer(attack, classifier)
        >>> result = attacks.WarmStart(attack, start)(classifier, points, labels)
        >>> bool(result.distances["linf"].max() <= 0.0501)
        True
    """

    attack: Bounded
    start: Attack | Tensor = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.attack, Bounded):
            raise TypeError(f"{type(self.attack).__name__} takes no start: it is not a Bounded attack")
        if isinstance(self.start, Attack):
            changes = self.start.threat.changes
            if changes != "shift":
                raise ValueError(f"{type(self.start).__name__} is no start: it {changes}s points")
        elif not isinstance(self.start, Tensor):
            raise TypeError(f"start must be an attack or a tensor, got {type(self.start).__name__}")

    @property
    def threat(self) -> ThreatModel:
        """That of the attack."""
        return self.attack.threat

    def budget(self, num_points: int) -> float | None:
        """That of the attack."""
        return self.attack.budget(num_points)

    def with_epsilon(self, epsilon: float) -> WarmStart:
        """The attack with another budget, from the same start."""
        return dataclasses.replace(self, attack=cast(Bounded, self.attack.with_epsilon(epsilon)))

    def constrain(self, points: Tensor, clean: Tensor) -> Tensor:
        """As the attack does."""
        return self.attack.constrain(points, clean)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Runs the attack from the start; iterations include those of the start."""
        if isinstance(self.start, Attack):
            begun, before = self.start.run(oracle, points, generator)
        else:
            begun, before = self._given(points), torch.zeros_like(oracle.queries)
        attack, asked = _started(self.attack, self.constrain(begun, points))
        attacked, taken = attack.run(oracle, points, generator)
        if not asked:
            raise ValueError(f"{self.attack} uses no start: it begins at the clean cloud")
        return attacked, before + taken

    def _given(self, points: Tensor) -> Tensor:
        assert isinstance(self.start, Tensor)
        if self.start.shape != points.shape:
            raise ValueError(
                f"the start has shape {tuple(self.start.shape)}, the clouds have {tuple(points.shape)}"
            )
        finite = self.start.isfinite().flatten(1).all(1)
        if not finite.all():
            raise ValueError(f"the start of example {int((~finite).nonzero()[0])} is NaN or infinite")
        return self.start.detach().to(points)


def _started(attack: Bounded, begun: Tensor) -> tuple[Bounded, list[bool]]:
    """The attack with ``begun`` as its start, and a list that grows whenever it asks for it."""
    asked: list[bool] = []

    def randomised(self: Bounded, points: Tensor, generator: torch.Generator) -> Tensor:
        asked.append(True)
        return begun.clone()

    cls = type(attack)
    started: type[Bounded] = type(cls.__name__, (cls,), {"randomised": randomised})
    settings: dict[str, Any] = {
        field.name: getattr(attack, field.name) for field in dataclasses.fields(cls) if field.init
    }
    return started(**settings), asked
