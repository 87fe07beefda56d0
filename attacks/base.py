"""Base class of the attacks: threat model, input checks, budget check and result."""

from __future__ import annotations

import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final, overload

import torch
from torch import Tensor

from attacks.functional import distances, projections
from attacks.oracle import Model, Oracle
from attacks.settings import check_epsilons, check_settings
from ifdefense.geometry.points import directed_chamfer
from ifdefense.guard import normal
from ifdefense.logits import apart, frozen
from ifdefense.provenance import ByCode
from ifdefense.threads import considerate

Norm = Literal["l2", "point-l2", "linf"]
DISTANCES: dict[Norm, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": distances.l2,
    "point-l2": distances.point_l2,
    "linf": distances.linf,
}
PROJECTIONS: dict[Norm, Callable[[Tensor, float], Tensor]] = {
    "l2": projections.l2,
    "point-l2": projections.point_l2,
    "linf": projections.linf,
}
TOLERANCE = 1e-4
"""Relative excess over a budget attributed to rounding."""


@dataclass(frozen=True)
class ThreatModel:
    """Knowledge, goal and allowed changes of an attacker.

    Attributes:
        knowledge: gradients of the model, gradients of another model, or logits only.
        goal: whether the attack needs targets, refuses them, or takes either.
        changes: whether points are shifted, added or dropped.
        norm: norm of a shift: of the whole cloud, the longest of a point, or the largest of a coordinate.
        epsilon: budget for a cloud of 1,024 points in the unit sphere; ``None`` if the size is minimised.
        count: number of points added or dropped.

    Examples:
        >>> attacks.PGD("linf", epsilon=0.05).threat
        ThreatModel(knowledge='white-box', goal='both', changes='shift', norm='linf', epsilon=0.05, count=0)
    """

    knowledge: Literal["white-box", "transfer", "score-based"]
    goal: Literal["targeted", "untargeted", "both"]
    changes: Literal["shift", "add", "drop"]
    norm: Norm | None = None
    epsilon: float | None = None
    count: int = 0


@dataclass(frozen=True, eq=False)
class AttackResult:
    """An attacked batch.

    Attributes:
        points: ``(B, M, 3)`` attacked clouds.
        success: ``(B,)`` whether the target is predicted; untargeted, whether the label is not.
        distances: ``(B,)`` per name: ``"l2"``, ``"point-l2"`` and ``"linf"`` of a shift; ``"dropped"``; or
            ``"added"`` with the mean (``"chamfer"``) and largest (``"hausdorff"``) squared distance of the
            added points to the clean cloud.
        queries: ``(B,)`` forward passes of the model, including the final check.
        iterations: ``(B,)`` steps taken.

    Examples:
        >>> result = attacks.FGM("linf", epsilon=0.05)(classifier, points, labels)
        >>> result.success.shape, sorted(result.distances)
        (torch.Size([2]), ['l2', 'linf', 'point-l2'])
    """

    points: Tensor
    success: Tensor
    distances: dict[str, Tensor]
    queries: Tensor
    iterations: Tensor


class BudgetError(RuntimeError):
    """An attack violated its own threat model."""


class Attack(ByCode, ABC):
    """Base class. A subclass declares its `threat` and implements `run`; `constrain` enforces a budget.

    Numeric fields of a dataclass are checked if they are annotated with a range of `attacks.settings`.

    Examples:
        >>> result = attacks.PGD("l2", iterations=2)(classifier, points, labels, targets=(labels + 1) % 4)
        >>> result.success.dtype, result.distances["l2"].shape
        (torch.bool, torch.Size([2]))
    """

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    @abstractmethod
    def threat(self) -> ThreatModel:
        """Threat model at these settings."""

    @abstractmethod
    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Attacks clean clouds ``(B, N, 3)``; runs without gradients except in `Oracle.gradient`.

        Returns:
            ``(B, M, 3)`` attacked clouds and the ``(B,)`` iterations per example.
        """

    def constrain(self, points: Tensor, clean: Tensor) -> Tensor:
        """Projects attacked clouds onto the budget; by default the identity."""
        return points

    def budget(self, num_points: int) -> float | None:
        """Budget of a cloud of ``num_points`` points in the norm of the threat model, or ``None``."""
        return self.threat.epsilon

    def with_epsilon(self, epsilon: float) -> Attack:
        """The attack with another budget in the norm of its threat model, for any number of points.

        Raises:
            ValueError: if the attack has no budget to set.
        """
        if "epsilon" not in getattr(self, "__dataclass_fields__", ()):
            raise ValueError(f"{type(self).__name__} has no field 'epsilon' to set")
        changed: Attack = dataclasses.replace(self, epsilon=epsilon)  # type: ignore[type-var]
        return changed

    @overload
    def __call__(
        self,
        model: Model,
        points: Tensor,
        labels: Tensor,
        targets: Tensor | None = None,
        *,
        epsilons: None = None,
        generator: torch.Generator | None = None,
    ) -> AttackResult: ...

    @overload
    def __call__(
        self,
        model: Model,
        points: Tensor,
        labels: Tensor,
        targets: Tensor | None = None,
        *,
        epsilons: Sequence[float],
        generator: torch.Generator | None = None,
    ) -> list[AttackResult]: ...

    @final
    def __call__(
        self,
        model: Model,
        points: Tensor,
        labels: Tensor,
        targets: Tensor | None = None,
        *,
        epsilons: Sequence[float] | None = None,
        generator: torch.Generator | None = None,
    ) -> AttackResult | list[AttackResult]:
        """Attacks a batch of clouds, within one budget or several.

        A module is attacked in evaluation mode and restored afterwards. All examples share their random
        numbers, so a result does not depend on the batch. Works in `torch.inference_mode`, too. The caller's
        autocast applies inside the model, not to the attack's own distances and updates; these are computed
        in float32 at least.

        With ``epsilons``, an attack with a budget runs once per budget, always with the same random numbers.
        An attack that minimises the shift runs once; clouds outside of a budget are projected onto it and
        evaluated again. A success within a budget also counts for larger budgets, where its cloud is returned
        if the attack fails. Queries and iterations are those of
        the run and of the final check.

        Args:
            model: ``(B, N, 3)`` points to ``(B, C)`` logits, differentiable unless the attack is score-based;
                for other outputs and precisions see `ifdefense.logits.classify`.
            points: ``(B, N, 3)`` clean clouds in the model's frame, floating point; not modified.
            labels: ``(B,)`` true classes.
            targets: ``(B,)`` classes to aim at; untargeted without them.
            epsilons: budgets in the norm of the threat model, in any order, instead of the attack's own.
            generator: source of randomness on the CPU; by default a new one with seed 0.

        Returns:
            The result, or with ``epsilons`` one result per budget in their order.

        Raises:
            TypeError: if an argument is not a tensor, or the generator not a `torch.Generator`.
            ValueError: if the input or the model's output is invalid; names the example. With
                ``epsilons`` also if the attack adds or drops points, or minimises no norm.
            BudgetError: if the attack violates its own threat model.
        """
        labels, targets = self.validated(points, labels, targets)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
            raise TypeError(f"generator must be a torch.Generator on the CPU, got {generator!r}")
        if epsilons is not None:
            return self._within(check_epsilons(epsilons), model, (points, labels, targets), generator)
        with apart(), frozen(model), torch.no_grad(), considerate():
            clean = normal(points.detach()).to(torch.promote_types(points.dtype, torch.float32))
            labels = normal(labels)
            targets = None if targets is None else normal(targets)
            oracle = Oracle(model, labels, targets)
            attacked, iterations = self.run(oracle, clean.clone(), generator)
            attacked = self.constrain(attacked, clean).to(points.dtype)
            sizes = self._measured(attacked, clean)
            success = oracle.reached(oracle.logits(attacked))
        return AttackResult(attacked, success, sizes, oracle.queries, iterations)

    def _within(
        self,
        epsilons: list[float],
        model: Model,
        batch: tuple[Tensor, Tensor, Tensor | None],
        generator: torch.Generator,
    ) -> list[AttackResult]:
        """Results for several budgets; the batch is points, labels and targets."""
        threat, name = self.threat, type(self).__name__
        if threat.changes != "shift":
            raise ValueError(f"{name} has no epsilon: it {threat.changes}s {threat.count} points")
        if threat.norm is None:
            raise ValueError(f"{name} takes no epsilons: its threat model has no norm to measure them in")
        state = generator.get_state()
        found = self(model, *batch, generator=generator) if threat.epsilon is None else None
        results: dict[float, AttackResult] = {}
        for epsilon in sorted(set(epsilons)):
            if found is None:
                generator.set_state(state)
                new = self.with_epsilon(epsilon)(model, *batch, generator=generator)
            else:
                new = _Projected(dataclasses.replace(threat, epsilon=epsilon), found)(model, *batch)
                new = dataclasses.replace(new, queries=new.queries + found.queries)
            results[epsilon] = new
        for smaller, larger in itertools.pairwise(results):
            results[larger] = _joined(results[smaller], results[larger])
        return [results[epsilon] for epsilon in epsilons]

    def validated(
        self, points: Tensor, labels: Tensor, targets: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Checks the input; returns labels and targets as int64 on the device of the points."""
        check_tensor("points", points)
        if points.ndim != 3 or points.shape[2] != 3 or 0 in points.shape or not points.is_floating_point():
            raise ValueError(
                f"expected floating-point clouds of shape (B, N, 3), got {tuple(points.shape)} {points.dtype}"
            )
        finite = points.isfinite().flatten(1).all(1)
        if not finite.all():
            raise ValueError(f"example {int((~finite).nonzero()[0])} has NaN or infinite coordinates")
        labels = self._classes("labels", labels, points)
        goal = self.threat.goal
        if targets is None:
            if goal == "targeted":
                raise ValueError(f"{type(self).__name__} is a targeted attack: give it targets")
            return labels, None
        if goal == "untargeted":
            raise ValueError(f"{type(self).__name__} is an untargeted attack: it takes no targets")
        targets = self._classes("targets", targets, points)
        if (targets == labels).any():
            example = int((targets == labels).nonzero()[0])
            raise ValueError(f"example {example}: the target equals the label, {int(labels[example])}")
        return labels, targets

    @staticmethod
    def _classes(name: str, values: Tensor, points: Tensor) -> Tensor:
        check_tensor(name, values)
        if values.shape != points.shape[:1] or values.is_floating_point() or values.dtype == torch.bool:
            raise ValueError(
                f"{name} must be integers of shape ({len(points)},), got {tuple(values.shape)} {values.dtype}"
            )
        if (values < 0).any():
            example = int((values < 0).nonzero()[0])
            raise ValueError(f"example {example}: class {int(values[example])} in {name} is out of range")
        return values.to(points.device, torch.int64)

    def _measured(self, attacked: Tensor, clean: Tensor) -> dict[str, Tensor]:
        """Sizes of the change, after checking that the threat model allows it."""
        eps = torch.finfo(attacked.dtype).eps
        attacked = attacked.to(clean.dtype)
        threat = self.threat
        added = attacked.shape[1] - clean.shape[1]
        expected = {"shift": 0, "add": threat.count, "drop": -threat.count}[threat.changes]
        if added != expected or len(attacked) != len(clean):
            raise BudgetError(
                f"{type(self).__name__} returned shape {tuple(attacked.shape)} for {tuple(clean.shape)}"
            )
        if threat.changes == "shift":
            return self._measured_shift(attacked, clean, eps)
        whole, part = (attacked, clean) if threat.changes == "add" else (clean, attacked)
        if not _contains(whole, part).all():
            raise BudgetError(f"{type(self).__name__} moved points, but may only {threat.changes} them")
        count = torch.full((len(clean),), threat.count, device=clean.device)
        if threat.changes == "drop":
            return {"dropped": count}
        # Original points are at distance 0 and do not affect the sum or the maximum.
        share = attacked.shape[1] / max(1, threat.count)
        return {
            "added": count,
            "chamfer": directed_chamfer(attacked, clean) * share,
            "hausdorff": distances.directed_hausdorff(attacked, clean),
        }

    def _measured_shift(self, attacked: Tensor, clean: Tensor, eps: float) -> dict[str, Tensor]:
        sizes: dict[str, Tensor] = {name: size(attacked, clean) for name, size in DISTANCES.items()}
        norm, budget = self.threat.norm, self.budget(clean.shape[1])
        if norm is not None and budget is not None:
            rounding = eps * clean.abs().max() * clean.shape[1] ** 0.5
            over = sizes[norm] > budget * (1 + TOLERANCE) + rounding
            if over.any():
                example = int(over.nonzero()[0])
                raise BudgetError(
                    f"{type(self).__name__}: example {example} has {norm} {float(sizes[norm][example]):.4g} "
                    f"over its budget {budget:.4g}"
                )
        return sizes


class Ball(Attack):
    """Base of attacks that project shifts onto the ball of their threat model."""

    def constrain(self, points: Tensor, clean: Tensor) -> Tensor:
        """Projects onto the ball around the clean clouds."""
        norm, budget = self.threat.norm, self.budget(clean.shape[1])
        assert norm is not None and budget is not None, "a ball has a norm and a radius"
        return clean + PROJECTIONS[norm](points - clean, budget)


@dataclass(frozen=True)
class _Projected(Attack):
    """The result of an attack without a budget, projected onto a budget."""

    stated: ThreatModel
    found: AttackResult

    @property
    def threat(self) -> ThreatModel:
        """Threat model of the attack, with a budget."""
        return self.stated

    def constrain(self, points: Tensor, clean: Tensor) -> Tensor:
        """Projects clouds outside of the budget; others are unchanged."""
        norm, epsilon = self.stated.norm, self.stated.epsilon
        assert norm is not None and epsilon is not None, "a budget has a norm"
        inside = DISTANCES[norm](points, clean) <= epsilon
        return torch.where(inside[:, None, None], points, clean + PROJECTIONS[norm](points - clean, epsilon))

    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns the earlier result."""
        return self.found.points, self.found.iterations


def _joined(smaller: AttackResult, larger: AttackResult) -> AttackResult:
    """Result for a larger budget, replaced by that for a smaller one where the larger failed."""
    lost = smaller.success & ~larger.success
    return dataclasses.replace(
        larger,
        points=torch.where(lost[:, None, None], smaller.points, larger.points),
        success=larger.success | lost,
        distances={
            name: torch.where(lost, smaller.distances[name], size) for name, size in larger.distances.items()
        },
    )


def _contains(whole: Tensor, part: Tensor) -> Tensor:
    """``(B,)`` whether the points of ``(B, M, 3)`` are among those of ``(B, N, 3)``."""
    inside = [
        len(torch.unique(torch.cat([one, other]), dim=0)) == len(torch.unique(one, dim=0))
        for one, other in zip(whole, part, strict=True)
    ]
    return torch.tensor(inside, device=whole.device)


def check_tensor(name: str, value: Any) -> None:
    """Raises a TypeError unless the value is a tensor."""
    if not isinstance(value, Tensor):
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        raise TypeError(f"{name} must be a torch.Tensor, got {kind}; convert with torch.as_tensor")
