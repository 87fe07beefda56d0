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


def margin(logits: Tensor, classes: Tensor, targeted: bool) -> Tensor:
    """Logits that are missing to the goal; negative once it is reached.

    Args:
        logits: ``(B, C)``.
        classes: ``(B,)`` targets, or true classes.
        targeted: whether the class must win, or must lose.
    """
    own = logits.gather(1, classes.unsqueeze(1)).squeeze(1)
    is_own = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, classes.unsqueeze(1), True)
    other = logits.masked_fill(is_own, -torch.inf).amax(1)
    return other - own if targeted else own - other


def hinge(logits: Tensor, classes: Tensor, targeted: bool, kappa: float = 0.0) -> Tensor:
    """How far the logits are from the goal with a margin, ``max(worse - better + kappa, 0)``.

    Carlini & Wagner, 2017, `arXiv:1608.04644 <https://arxiv.org/abs/1608.04644>`_, f6.

    Args:
        logits: ``(B, C)``.
        classes: ``(B,)`` targets, or true classes.
        targeted: whether the class must win, or must lose.
        kappa: margin in logits.
    """
    return (margin(logits, classes, targeted) + kappa).clamp_min(0)


def dlr(logits: Tensor, classes: Tensor, targeted: bool) -> Tensor:
    """Difference of logits ratio: the margin, which does not change when the logits are shifted or scaled.

    Croce & Hein, 2020, `arXiv:2003.01690 <https://arxiv.org/abs/2003.01690>`_. With the logits in descending
    order ``z1 >= z2 >= ...``, equation (6) divides the `margin` by ``z1 - z3``, and the targeted form of
    equation (7) by ``z1 - (z3 + z4) / 2``. A confident classifier, whose cross-entropy has vanishing
    gradients, is no harder for it.

    Differs from equation (7) in that the target is compared with the best other class, not with the true one:
    there, any wrong class counts as success; here, the target has to be predicted.

    Args:
        logits: ``(B, C)``.
        classes: ``(B,)`` targets, or true classes.
        targeted: whether the class must win, or must lose.

    Raises:
        ValueError: if there are fewer than 3 classes, or than 4 in the targeted form: the ratio would be
            constant.
    """
    least = 4 if targeted else 3
    if logits.shape[1] < least:
        form = "targeted DLR loss" if targeted else "DLR loss"
        raise ValueError(f"the {form} needs at least {least} classes, the model has {logits.shape[1]}")
    top = logits.topk(least, dim=1).values
    low = (top[:, 2] + top[:, 3]) / 2 if targeted else top[:, 2]
    return margin(logits, classes, targeted) / (top[:, 0] - low + 1e-12)
