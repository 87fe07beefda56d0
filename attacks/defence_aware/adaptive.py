"""Attacks that know the defence: gradients through a purifier, success on the defended classifier.

The threat model is the strictest one: the attacker has the classifier and the purifier, code, weights and
settings of both, and may ask the defended classifier as often as it likes. What it does not have is the seed
that the defence draws from, unless `EOT` is told so.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attacks.base import Attack, AttackResult, Model, Oracle, ThreatModel, _frozen
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.geometry.points import gather, knn

Purify = Callable[..., Tensor]
"""``(B, N, 3)`` clouds to ``(B, M, 3)`` in the same frame, with or without an argument ``seed``."""

Gradient = Literal["nearest", "identity", "exact"]
GRADIENTS: tuple[Gradient, ...] = ("nearest", "identity", "exact")


def selected(points: Tensor, mask: Tensor) -> Tensor:
    """The points that a filter keeps, as many as came in: in their order, then again from the first.

    Makes an outlier filter a purifier whose gradient is exact, for a choice of points is linear in them; that
    another choice would be made elsewhere is a jump, and has no gradient.

    Args:
        points: ``(B, N, 3)``.
        mask: ``(B, N)`` points that stay, at least one of each cloud.

    Returns:
        ``(B, N, 3)``; differentiable.

    Raises:
        ValueError: if no point of a cloud stays.
    """
    count = mask.sum(1, keepdim=True)
    if (count == 0).any():
        raise ValueError(f"example {int((count == 0).nonzero()[0, 0])}: the filter keeps no point")
    kept_first = (~mask).byte().argsort(dim=1, stable=True)
    turn = torch.arange(points.shape[1], device=points.device) % count
    return gather(points, kept_first.gather(1, turn))


class BPDA(nn.Module):
    """A purifier that gradients pass: forwards it is the real one, backwards something differentiable.

    Backward pass differentiable approximation, Athalye et al., 2018, section 4.1,
    `arXiv:1802.00420 <https://arxiv.org/abs/1802.00420>`_: as a purifier returns nearly what it was given,
    its derivative is taken to be the identity. A purifier of clouds may also drop, add and reorder points, so
    that rows of the input and of the output do not belong together; then the gradient of every purified
    point goes to the input point nearest to it. For a purifier that only chooses among the points (SOR, SRS)
    this is the exact gradient wherever points are distinct.

    Args:
        purifier: callable on ``(B, N, 3)`` clouds; if it takes an argument ``seed``, it is given one.
        gradient: ``"nearest"`` as above; ``"identity"`` for a purifier that keeps number and order of the
            points; ``"exact"`` to differentiate the purifier itself. The last is right only if all of it is
            differentiable: a step in it that passes no gradient hides its share without a word.

    Raises:
        ValueError: for another kind of gradient.
    """

    def __init__(self, purifier: Purify, gradient: Gradient = "nearest") -> None:
        super().__init__()
        if gradient not in GRADIENTS:
            raise ValueError(f"unknown gradient {gradient!r}; there are: {', '.join(GRADIENTS)}")
        self.purifier = purifier
        self.gradient = gradient
        self.seeded = _takes_seed(purifier)
        """Whether the purifier takes a seed."""

    def forward(self, points: Tensor, seed: int = 0) -> Tensor:
        """Purified clouds ``(B, M, 3)``, the values of the real purifier.

        Args:
            points: ``(B, N, 3)``.
            seed: seed of the purifier's draws.

        Raises:
            ValueError: if the purifier returns something else than ``B`` clouds, or the gradient that was
                chosen does not fit it.
        """
        if self.gradient == "exact":
            purified = self._purified(points, seed)
            if points.requires_grad and torch.is_grad_enabled() and not purified.requires_grad:
                raise ValueError('gradient="exact" needs a purifier that passes gradients; this one does not')
            return purified
        with torch.no_grad():
            purified = self._purified(points.detach(), seed)
        if self.gradient == "identity":
            if purified.shape != points.shape:
                raise ValueError(
                    f'gradient="identity" needs as many points as came in: {tuple(purified.shape)} came out '
                    f"for {tuple(points.shape)}"
                )
            source = points
        else:
            source = gather(points, knn(purified, points.detach(), 1)[1].squeeze(2))
        return purified + (source - source.detach())  # adds exactly 0

    def _purified(self, points: Tensor, seed: int) -> Tensor:
        purified = self.purifier(points, seed=seed) if self.seeded else self.purifier(points)
        if purified.ndim != 3 or len(purified) != len(points) or purified.shape[2] != 3:
            raise ValueError(
                f"the purifier must return clouds of shape ({len(points)}, M, 3), "
                f"it returned {tuple(purified.shape)}"
            )
        return purified.to(points)


def _takes_seed(purifier: Purify) -> bool:
    """Whether a callable, a module or a partial of one has a parameter ``seed`` that is still free."""
    function: Any = purifier
    while isinstance(function, functools.partial):
        if "seed" in function.keywords:
            return False
        function = function.func
    if isinstance(function, nn.Module):
        function = function.forward
    try:
        return "seed" in inspect.signature(function).parameters
    except ValueError:  # a builtin without a signature
        return False


@dataclass(frozen=True)
class EOT:
    """Expectation over transformation: how the attacker averages over the purifier's random draws.

    Athalye et al., 2018, section 4.2, `arXiv:1802.00420 <https://arxiv.org/abs/1802.00420>`_. The logits, and
    with them the gradients, are means over ``samples`` draws. All clouds of a batch see the same draws, so
    that a result does not depend on the batch.

    An attacker who knows the seed of the defence too, against which a seed is no defence at all, is
    ``EOT(samples=1, first=seed, fresh=False)``.

    Attributes:
        samples: draws that are averaged for each gradient.
        first: seed of the first draw. The default is not the seed that defences draw from, 0.
        fresh: whether every gradient draws anew, or all use the same ``samples`` seeds.

    Raises:
        ValueError: if there is no sample.
    """

    samples: int = 8
    first: int = 1
    fresh: bool = True

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")

    def seeds(self, query: int) -> range:
        """Seeds of the draws for a query, counted from 0."""
        start = self.first + (query * self.samples if self.fresh else 0)
        return range(start, start + self.samples)


class DefenceAware(nn.Module):
    """A defended classifier as an attacker sees it who knows the defence.

    Where a gradient is asked for, these are the logits through `BPDA`, averaged by `EOT`. Where none is, they
    are those of the defence as it stands, with its own seed: an attack that checks its result, as all of ours
    do in the end, checks it on the real defence.

    Args:
        classifier: ``(B, M, 3)`` clouds to ``(B, C)`` logits.
        purifier: what each cloud passes first, with its gradient.
        eot: average over the purifier's draws; by default that of `EOT` where the purifier takes a seed, and
            a single call where it takes none.
        normalise: whether purified clouds are centred and scaled to the unit sphere before they are
            classified, as `ifdefense.purifiers.purifier.Defended` does. The gradient passes that exactly.
        seed: seed that the real defence draws from.
    """

    def __init__(
        self,
        classifier: Model,
        purifier: BPDA,
        eot: EOT | None = None,
        *,
        normalise: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.purifier = purifier
        self.eot = eot if eot is not None else EOT() if purifier.seeded else EOT(samples=1)
        self.normalise = normalise
        self.seed = seed
        self.gradients = 0
        """Gradients that were asked for so far."""

    def forward(self, points: Tensor) -> Tensor:
        """Logits ``(B, C)`` of clouds ``(B, N, 3)``."""
        if not (torch.is_grad_enabled() and points.requires_grad):
            return self._logits(points, self.seed)
        seeds = self.eot.seeds(self.gradients)
        self.gradients += 1
        total = self._logits(points, seeds[0])
        for seed in seeds[1:]:
            total = total + self._logits(points, seed)
        return total / len(seeds)

    def _logits(self, points: Tensor, seed: int) -> Tensor:
        purified = self.purifier(points, seed)
        return self.classifier(to_unit_sphere(purified) if self.normalise else purified)


@dataclass(frozen=True)
class Adaptive(Attack):
    """An attack that sees through a purifier; see `adaptive`.

    It is called with the bare classifier, and reports success on the defended one. ``queries`` of the result
    counts calls of the defended model, each of which passes the purifier ``eot.samples`` times where a
    gradient is asked for.

    Attributes:
        attack: attack to carry out.
        purifier: the defence.
        gradient: how gradients pass the purifier, see `BPDA`.
        eot: average over the purifier's draws, see `DefenceAware`.
        normalise: whether purified clouds are normalised before they are classified.
        seed: seed that the real defence draws from.
        fallback: whether an example that is not fooled takes the clouds of the plain attack, made on the bare
            classifier with the same random numbers, if those fool the defence; in a targeted attack also
            if they alone are misclassified, without reaching the target.
    """

    attack: Attack
    purifier: Purify
    gradient: Gradient = "nearest"
    eot: EOT | None = None
    normalise: bool = True
    seed: int = 0
    fallback: bool = True

    def __post_init__(self) -> None:
        BPDA(self.purifier, self.gradient)  # raises for what is no gradient

    @property
    def threat(self) -> ThreatModel:
        """That of the attack; what it knows includes the defence."""
        return self.attack.threat

    def budget(self, num_points: int) -> float | None:
        """That of the attack."""
        return self.attack.budget(num_points)

    def constrain(self, points: Tensor, clean: Tensor) -> Tensor:
        """As the attack does."""
        return self.attack.constrain(points, clean)

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The attack itself, on whatever model the oracle stands for."""
        return self.attack.run(oracle, points, generator)

    def defended(self, classifier: Model) -> DefenceAware:
        """The defended classifier as the attacker sees it."""
        return DefenceAware(
            classifier,
            BPDA(self.purifier, self.gradient),
            self.eot,
            normalise=self.normalise,
            seed=self.seed,
        )

    # What the base class finalises, checks, budget and report, all happens in the call of the attack itself.
    def __call__(  # type: ignore[misc]
        self,
        model: Model,
        points: Tensor,
        labels: Tensor,
        targets: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> AttackResult:
        """Attacks a classifier behind the purifier; see `Attack.__call__`.

        Args:
            model: the bare classifier.
            points: ``(B, N, 3)`` clean clouds, in the purifier's and the classifier's frame.
            labels: ``(B,)`` true classes.
            targets: ``(B,)`` classes to aim at, if the attack can.
            generator: source of the attack's randomness on the CPU, not of the purifier's.

        Returns:
            The attacked, not yet purified clouds; success is that on the defended classifier.
        """
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        state = generator.get_state()
        result = self.attack(self.defended(model), points, labels, targets, generator=generator)
        if not self.fallback or result.success.all():
            return result
        rows = ~result.success
        again = torch.Generator()
        again.set_state(state)

        def part(values: Tensor) -> Tensor:
            return values[rows.to(values.device)]

        left = None if targets is None else part(targets)
        plain = self.attack(model, part(points), part(labels), left, generator=again)
        return self._merged(model, result, plain, part(labels), left)

    def _merged(
        self, model: Model, result: AttackResult, plain: AttackResult, labels: Tensor, targets: Tensor | None
    ) -> AttackResult:
        """The plain attack's clouds where they alone reach the goal, or at least leave the true class.

        ``plain``, ``labels`` and ``targets`` are those of the examples without success.
        """
        defended = self.defended(model)
        device = result.points.device
        with _frozen(defended), torch.no_grad():
            labels = labels.long().to(device)
            oracle = Oracle(defended, labels, None if targets is None else targets.long().to(device))
            failed = (~result.success).nonzero().squeeze(1)
            logits = oracle.logits(plain.points)
            fooled = better = oracle.reached(logits)
            if targets is not None:  # another class than the target is better than the true one
                own = oracle.logits(result.points[failed]).argmax(1)
                better = fooled | ((logits.argmax(1) != labels) & (own == labels))

        def merged(of_all: Tensor, of_plain: Tensor) -> Tensor:
            new = of_all.clone()
            new[failed[better]] = of_plain[better]
            return new

        return AttackResult(
            merged(result.points, plain.points),
            merged(result.success, fooled),
            {name: merged(size, plain.distances[name]) for name, size in result.distances.items()},
            result.queries.index_add(0, failed, plain.queries + oracle.queries),
            result.iterations.index_add(0, failed, plain.iterations),
        )


def adaptive(
    attack: Attack,
    purifier: Purify,
    *,
    gradient: Gradient = "nearest",
    eot: EOT | None = None,
    normalise: bool = True,
    seed: int = 0,
    fallback: bool = True,
) -> Adaptive:
    """Makes any attack one that knows the defence, through `BPDA` and `EOT`.

    The result is again an attack, called with the bare classifier::

        adaptive(PGD(), Purifier.from_pretrained("onet-mesh"))(classifier, clouds, labels)

    It is never weaker than the plain attack: where it fails, the clouds of the plain one are tried on the
    defence as well, as an attacker would. ``fallback=False`` leaves that out.

    Args:
        attack: attack to carry out. One that takes no gradients runs on the real defended model.
        purifier: the defence, ``(B, N, 3)`` clouds to ``(B, M, 3)`` in the same frame, perhaps with an
            argument ``seed``; further arguments are given with `functools.partial`, such as the
            ``num_points`` of a purifier that has to refill what an attack drops.
        gradient: how gradients pass the purifier, see `BPDA`.
        eot: average over the purifier's draws; by default 8 where it takes a seed.
        normalise: whether purified clouds are normalised before they are classified, as
            `ifdefense.purifiers.purifier.Defended` does by default.
        seed: seed that the real defence draws from.
        fallback: see above.

    Raises:
        ValueError: for an unknown gradient, or an attack that is adaptive already.
    """
    if isinstance(attack, Adaptive):
        raise ValueError("the attack is adaptive already")
    return Adaptive(attack, purifier, gradient, eot, normalise, seed, fallback)
