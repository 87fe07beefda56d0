"""Gradients of a surrogate, for models whose own gradients mislead."""

from __future__ import annotations

import torch
from torch import Tensor

from attacks.oracle import Model, Stochastic
from ifdefense.logits import classify


class SurrogateGradient(Stochastic):
    """The logits of a model with the gradient of another one, or with a mix of both.

    Backward pass differentiable approximation, Athalye et al., 2018, section 4.1,
    `arXiv:1802.00420 <https://arxiv.org/abs/1802.00420>`_, of a whole model: losses are those of the model,
    with its draws, and only the derivative of the logits in the points is that of the surrogate. For a
    defence that passes no gradient, or one that differs from draw to draw, the surrogate is the same
    classifier behind a simpler defence. Without gradients it is the model::

        through = attacks.DefenceAware(classifier, ifdefense.load("onet-mesh"))
        smooth = attacks.DefenceAware(classifier, ifdefense.load("sor-smooth"))
        attacks.APGD("linf")(attacks.SurrogateGradient(through, smooth), points, labels)

    Args:
        model: model under attack, such as a `DefenceAware`.
        surrogate: differentiable, with the same classes.
        share: share of the surrogate in the gradient, in (0, 1]; the rest is the gradient of the model.

    Raises:
        ValueError: if the share is out of range; in a call, if the classes differ or a gradient is missing.

    Examples:
        >>> rounded = attacks.FunctionPurifier(lambda points, num_points, seed: points.round(decimals=1),
        ...     deterministic=True)
        >>> model = attacks.DefenceAware(classifier, rounded)
        >>> attack = attacks.PGD("linf", iterations=2)
        >>> attack(attacks.SurrogateGradient(model, classifier), points, labels).points.shape
        torch.Size([2, 64, 3])
    """

    def __init__(self, model: Model, surrogate: Model, share: float = 1.0) -> None:
        super().__init__()
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(f"share must be a number in (0, 1], got {share!r}")
        self.model, self.surrogate, self.share = model, surrogate, share

    def restart(self) -> None:
        """Nothing, as it has no draws of its own; those of its parts restart by themselves."""

    def forward(self, points: Tensor) -> Tensor:
        """``(B, C)`` logits of the model.

        Raises:
            ValueError: if the surrogate has other classes or passes no gradient.
        """
        own = classify(self.model, points)
        if not (torch.is_grad_enabled() and points.requires_grad):
            return own
        other = classify(self.surrogate, points).to(own)
        if other.shape != own.shape:
            raise ValueError(
                f"the surrogate returned logits of shape {tuple(other.shape)}, the model {tuple(own.shape)}"
            )
        if not other.requires_grad:
            raise ValueError("the surrogate gives no gradient: its logits do not depend on the points")
        mixed = other if self.share == 1 else self.share * other + (1 - self.share) * own
        return own.detach() + (mixed - mixed.detach())  # adds exactly 0
