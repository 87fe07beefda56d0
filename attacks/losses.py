"""Losses of an attacker, to be *minimised*: ``(B, C)`` logits and ``(B,)`` classes to ``(B,)``.

In an untargeted attack the classes are the true ones, to be left; in a targeted one they are the targets, to
be reached.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, classes: Tensor, targeted: bool) -> Tensor:
    """Cross-entropy towards the target, or minus the cross-entropy of the true class."""
    loss = F.cross_entropy(logits, classes, reduction="none")
    return loss if targeted else -loss


def hinge(logits: Tensor, classes: Tensor, targeted: bool, kappa: float = 0.0) -> Tensor:
    """How far the logits are from the goal with a margin, ``max(worse - better + kappa, 0)``.

    Carlini & Wagner, 2017, `arXiv:1608.04644 <https://arxiv.org/abs/1608.04644>`_, f6.

    Args:
        logits: ``(B, C)``.
        classes: ``(B,)`` targets, or true classes.
        targeted: whether the class must win, or must lose.
        kappa: margin in logits.
    """
    own = logits.gather(1, classes.unsqueeze(1)).squeeze(1)
    is_own = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, classes.unsqueeze(1), True)
    other = logits.masked_fill(is_own, -torch.inf).amax(1)
    return ((other - own if targeted else own - other) + kappa).clamp_min(0)
