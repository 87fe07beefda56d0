"""What all attacks share.

A stated threat model, checked input, a model that is checked and counted, an enforced budget, a report.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from attacks.functional import distances, projections

Model = Callable[[Tensor], Tensor]
"""``(B, N, 3)`` points to ``(B, C)`` logits."""

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
"""Share of a budget by which rounding may exceed it."""


@dataclass(frozen=True)
class ThreatModel:
    """What an attacker knows, wants and may do.

    Attributes:
        knowledge: the model's gradients, those of another model, or its logits only.
        goal: whether it aims at a class, away from one, or can do both.
        changes: whether points are shifted, added or dropped.
        norm: how the size of a shift is measured; ``None`` where points are not shifted.
        epsilon: largest size of a shift of a cloud of 1,024 points in the unit sphere; ``None`` if it is
            minimised instead.
        count: points that are added or dropped.
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
        success: ``(B,)`` whether the target is predicted, or in an untargeted attack another class than the
            label.
        distances: ``(B,)`` sizes of the change by name: the norms of a shift; the number of points dropped;
            or the number of points added, with their mean and their largest squared distance from the nearest
            clean point.
        queries: ``(B,)`` forward passes of the model, the last check included.
        iterations: ``(B,)`` steps taken.
    """

    points: Tensor
    success: Tensor
    distances: dict[str, Tensor]
    queries: Tensor
    iterations: Tensor


class BudgetError(RuntimeError):
    """An attack returned clouds outside its own threat model: a fault in the attack."""


class Oracle:
    """The model under attack: checks what it returns, counts the queries of each example, knows the goal.

    Args:
        model: model under attack.
        labels: ``(B,)`` true classes.
        targets: ``(B,)`` classes to aim at, or ``None``.
    """

    def __init__(self, model: Model, labels: Tensor, targets: Tensor | None) -> None:
        self._model = model
        self.targeted = targets is not None
        self.classes = labels if targets is None else targets
        """``(B,)`` targets in a targeted attack, true classes otherwise."""
        self._largest = int(max(labels.max(), self.classes.max()))
        self.queries = torch.zeros_like(labels)

    def logits(self, points: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """``(b, C)`` logits of clouds that stand for the examples ``rows``.

        Raises:
            ValueError: if they are of another shape, not finite, or have no entry for a label or target.
        """
        logits = self._model(points)
        if logits.ndim != 2 or len(logits) != len(points):
            raise ValueError(
                f"the model must return logits of shape ({len(points)}, C), it returned {tuple(logits.shape)}"
            )
        if self._largest >= logits.shape[1]:
            raise ValueError(
                f"class {self._largest} is out of range: the model has {logits.shape[1]} classes"
            )
        finite = logits.detach().isfinite().all(1)
        if not finite.all():
            example = int(torch.arange(len(self.queries), device=finite.device)[rows][~finite][0])
            raise ValueError(f"the model returned NaN or infinite logits for example {example}")
        self.queries[rows] += 1
        return logits

    def reached(self, logits: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """``(b,)`` whether the attacker's goal is reached."""
        predicted = logits.argmax(1)
        return predicted == self.classes[rows] if self.targeted else predicted != self.classes[rows]

    def gradient(
        self,
        points: Tensor,
        loss: Callable[[Tensor, Tensor, bool], Tensor],
        rows: Tensor | slice = slice(None),
    ) -> tuple[Tensor, Tensor]:
        """``(b, C)`` logits and the ``(b, N, 3)`` gradient of each example's own loss.

        Args:
            points: ``(b, N, 3)`` clouds.
            loss: one of `attacks.functional.losses`.
            rows: examples that the clouds stand for.

        Raises:
            ValueError: as `logits` does, or if the model's output does not depend differentiably on the
                points.
        """
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            logits = self.logits(points, rows)
            if not logits.requires_grad:
                raise ValueError(
                    "the model gives no gradient: its logits do not depend differentiably on the points"
                )
            total = loss(logits, self.classes[rows], self.targeted).sum()
            (gradient,) = torch.autograd.grad(total, points, allow_unused=True)
        if gradient is None:
            raise ValueError(
                "the model gives no gradient: its logits do not depend differentiably on the points"
            )
        return logits.detach(), gradient


@contextlib.contextmanager
def _frozen(model: Model) -> Iterator[None]:
    """Puts a module into evaluation mode without gradients of its parameters; restores it afterwards."""
    if not isinstance(model, nn.Module):
        yield
        return
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


class Attack(ABC):
    """An attack on classifiers of point clouds.

    A subclass states its `threat` and writes `run`, which is only the mathematics;
    `constrain` keeps its budget.
    """

    @property
    @abstractmethod
    def threat(self) -> ThreatModel:
        """The threat model with these settings."""

    @abstractmethod
    def run(self, oracle: Oracle, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Attacks a batch; gradients are off but inside `Oracle.gradient`.

        Args:
            oracle: model under attack and goal.
            points: ``(B, N, 3)`` clean clouds; not to be changed.
            generator: source of randomness, on the CPU.

        Returns:
            ``(B, M, 3)`` attacked clouds, and the ``(B,)`` iterations that each example took.
        """

    def constrain(self, points: Tensor, clean: Tensor) -> Tensor:
        """Brings attacked clouds back into the budget; without a budget, nothing is done."""
        return points

    def budget(self, num_points: int) -> float | None:
        """Largest size of the shift of a cloud of ``num_points`` points, in the norm of the threat model."""
        return self.threat.epsilon

    @final
    def __call__(
        self,
        model: Model,
        points: Tensor,
        labels: Tensor,
        targets: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> AttackResult:
        """Attacks a batch of clouds.

        A module is attacked in evaluation mode and found unchanged afterwards. All examples start from the
        same random numbers, so that a result does not depend on the other examples of its batch.

        Args:
            model: ``(B, N, 3)`` points to ``(B, C)`` logits, differentiable unless the threat model is
                score-based.
            points: ``(B, N, 3)`` clean clouds in the model's frame, floating point; left untouched.
            labels: ``(B,)`` true classes.
            targets: ``(B,)`` classes to aim at; without them the attack is untargeted.
            generator: source of randomness on the CPU; a fresh one of seed 0 by default.

        Returns:
            The attacked clouds, inside the budget, and what it took.

        Raises:
            ValueError: if the input or what the model returns is not as described; says which example and
                why.
            BudgetError: if the attack breaks its own threat model.
        """
        labels, targets = self._validated(points, labels, targets)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        clean = points.detach()
        with _frozen(model), torch.no_grad():
            oracle = Oracle(model, labels, targets)
            attacked, iterations = self.run(oracle, clean.clone(), generator)
            attacked = self.constrain(attacked, clean)
            sizes = self._measured(attacked, clean)
            success = oracle.reached(oracle.logits(attacked))
        return AttackResult(attacked, success, sizes, oracle.queries, iterations)

    def _validated(
        self, points: Tensor, labels: Tensor, targets: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Labels and targets as int64, after every check that needs no model."""
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
        if values.shape != points.shape[:1] or values.is_floating_point() or values.dtype == torch.bool:
            raise ValueError(
                f"{name} must be integers of shape ({len(points)},), got {tuple(values.shape)} {values.dtype}"
            )
        if (values < 0).any():
            example = int((values < 0).nonzero()[0])
            raise ValueError(f"example {example}: class {int(values[example])} in {name} is out of range")
        return values.to(points.device, torch.int64)

    def _measured(self, attacked: Tensor, clean: Tensor) -> dict[str, Tensor]:
        """Sizes of the change, after the check that it is one that the threat model allows."""
        threat = self.threat
        added = attacked.shape[1] - clean.shape[1]
        expected = {"shift": 0, "add": threat.count, "drop": -threat.count}[threat.changes]
        if added != expected or len(attacked) != len(clean):
            raise BudgetError(
                f"{type(self).__name__} returned shape {tuple(attacked.shape)} for {tuple(clean.shape)}"
            )
        if threat.changes == "shift":
            return self._measured_shift(attacked, clean)
        whole, part = (attacked, clean) if threat.changes == "add" else (clean, attacked)
        if not _contains(whole, part).all():
            raise BudgetError(f"{type(self).__name__} moved points, but may only {threat.changes} them")
        count = torch.full((len(clean),), threat.count, device=clean.device)
        if threat.changes == "drop":
            return {"dropped": count}
        # The points that were there are at distance 0 and leave the sum and the maximum as they are.
        share = attacked.shape[1] / max(1, threat.count)
        return {
            "added": count,
            "chamfer": distances.directed_chamfer(attacked, clean) * share,
            "hausdorff": distances.directed_hausdorff(attacked, clean),
        }

    def _measured_shift(self, attacked: Tensor, clean: Tensor) -> dict[str, Tensor]:
        sizes: dict[str, Tensor] = {name: size(attacked, clean) for name, size in DISTANCES.items()}
        norm, budget = self.threat.norm, self.budget(clean.shape[1])
        if norm is not None and budget is not None:
            rounding = torch.finfo(clean.dtype).eps * clean.abs().max() * clean.shape[1] ** 0.5
            over = sizes[norm] > budget * (1 + TOLERANCE) + rounding
            if over.any():
                example = int(over.nonzero()[0])
                raise BudgetError(
                    f"{type(self).__name__}: example {example} has {norm} {float(sizes[norm][example]):.4g} "
                    f"over its budget {budget:.4g}"
                )
        return sizes


class Ball(Attack):
    """An attack whose shifts are brought back into the ball of its threat model; not an attack by itself."""

    def constrain(self, points: Tensor, clean: Tensor) -> Tensor:
        """Nearest clouds within the budget around the clean ones."""
        norm, budget = self.threat.norm, self.budget(clean.shape[1])
        assert norm is not None and budget is not None, "a ball has a norm and a radius"
        return clean + PROJECTIONS[norm](points - clean, budget)


def _contains(whole: Tensor, part: Tensor) -> Tensor:
    """``(B,)`` whether all points of ``(B, M, 3)`` parts stand among those of ``(B, N, 3)`` clouds."""
    inside = [
        len(torch.unique(torch.cat([one, other]), dim=0)) == len(torch.unique(one, dim=0))
        for one, other in zip(whole, part, strict=True)
    ]
    return torch.tensor(inside, device=whole.device)
