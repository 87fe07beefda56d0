"""Access to the model under attack: checked outputs, counted queries, gradients."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ifdefense.logits import classify
from ifdefense.provenance import ByCode

Model = Callable[[Tensor], Any]
"""``(B, N, 3)`` points to ``(B, C)`` logits, as `ifdefense.logits.classify` takes them."""

Rows = Tensor | slice
"""Indices of examples in a batch."""


class Stochastic(ByCode, nn.Module, ABC):
    """A model with random draws; every attack on it starts from the same draws."""

    @abstractmethod
    def restart(self) -> None:
        """Starts the sequence of draws again."""


class Oracle:
    """Access to the model under attack: checks its output, counts queries, evaluates the goal.

    Args:
        model: model under attack.
        labels: ``(B,)`` true classes.
        targets: ``(B,)`` classes to aim at, or ``None``.

    Examples:
        >>> oracle = attacks.Oracle(classifier, labels, None)
        >>> oracle.reached(oracle.logits(points)), oracle.queries
        (tensor([False, False]), tensor([1, 1]))
    """

    def __init__(self, model: Model, labels: Tensor, targets: Tensor | None) -> None:
        self._model = model
        self.labels = labels
        self.targeted = targets is not None
        self.classes = labels if targets is None else targets
        """``(B,)`` targets in a targeted attack, true classes otherwise."""
        self._goal = self.classes if self.targeted else None
        self._largest = int(max(labels.max(), self.classes.max()))
        self.queries = torch.zeros_like(labels)
        self._blind = False
        for module in model.modules() if isinstance(model, nn.Module) else ():
            if isinstance(module, Stochastic):
                module.restart()
            self._blind |= any(weight.is_inference() for weight in module.parameters(recurse=False))

    def part(self, rows: Tensor) -> Oracle:
        """An oracle of the examples ``rows`` alone, with its own count of queries."""
        return Oracle(self._model, self.labels[rows], self.classes[rows] if self.targeted else None)

    def towards(self, classes: Tensor) -> Oracle:
        """The same access, whose losses aim at ``(B,)`` classes; the goal and the counts remain."""
        other = copy.copy(self)
        other.classes, other.targeted = classes, True
        return other

    def logits(self, points: Tensor, rows: Rows = slice(None)) -> Tensor:
        """``(b, C)`` logits of clouds ``(b, N, 3)`` that belong to the examples ``rows``.

        The result has the dtype and the device of the points.

        Raises:
            ValueError: if the logits have a wrong shape, are not finite, or lack a class of the batch.
        """
        # A copy, because models may modify their input in place.
        logits = classify(self._model, points.clone()).to(points)
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

    def reached(self, logits: Tensor, rows: Rows = slice(None)) -> Tensor:
        """``(b,)`` whether the goal is reached."""
        predicted = logits.argmax(1)
        return predicted != self.labels[rows] if self._goal is None else predicted == self._goal[rows]

    def gradient(
        self,
        points: Tensor,
        loss: Callable[[Tensor, Tensor, bool], Tensor],
        rows: Rows = slice(None),
    ) -> tuple[Tensor, Tensor]:
        """``(b, C)`` logits and the ``(b, N, 3)`` gradient of the loss of each example.

        Raises:
            ValueError: as `logits`, or if the logits do not depend differentiably on the points.
        """
        if self._blind:
            raise ValueError(
                "the model gives no gradient: its weights were made in inference mode; load or copy them "
                "outside of torch.inference_mode()"
            )
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
