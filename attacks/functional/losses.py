"""Losses that an attacker *minimises*: ``(B, C)`` logits and ``(B,)`` classes to ``(B,)``.

The classes are the targets if ``targeted``, otherwise the true classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, classes: Tensor, targeted: bool) -> Tensor:
    """Cross-entropy of the target, or minus that of the true class.

    Examples:
        >>> cross_entropy(classifier(points), labels, targeted=False).shape
        torch.Size([2])
    """
    loss = F.cross_entropy(logits, classes, reduction="none")
    return loss if targeted else -loss


def margin(logits: Tensor, classes: Tensor, targeted: bool) -> Tensor:
    """Gap of logits to the goal, negative once it is reached.

    Examples:
        >>> margin(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([0]), targeted=False)
        tensor([2.])
    """
    own = logits.gather(1, classes.unsqueeze(1)).squeeze(1)
    is_own = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, classes.unsqueeze(1), True)
    other = logits.masked_fill(is_own, -torch.inf).amax(1)
    return other - own if targeted else own - other


def hinge(logits: Tensor, classes: Tensor, targeted: bool, kappa: float = 0.0) -> Tensor:
    """``max(margin + kappa, 0)`` with the confidence ``kappa`` in logits.

    Carlini & Wagner, 2017, `arXiv:1608.04644 <https://arxiv.org/abs/1608.04644>`_, f6.

    Examples:
        >>> hinge(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([1]), targeted=True)
        tensor([2.])
    """
    return (margin(logits, classes, targeted) + kappa).clamp_min(0)


def dlr(logits: Tensor, classes: Tensor, targeted: bool) -> Tensor:
    """Difference of logits ratio: the `margin`, invariant to shift and scale of the logits.

    Croce & Hein, 2020, `arXiv:2003.01690 <https://arxiv.org/abs/2003.01690>`_. With sorted logits
    ``z1 >= z2 >= ...``, equation (6) divides the margin by ``z1 - z3``, the targeted equation (7) by
    ``z1 - (z3 + z4) / 2``. Differs from (7) in that the target competes with the best other class, not with
    the true one, since here the target must be predicted.

    Raises:
        ValueError: if there are fewer than 3 classes, or 4 if targeted: the ratio would be constant.

    Examples:
        >>> dlr(classifier(points), labels, targeted=False).shape
        torch.Size([2])
    """
    least = 4 if targeted else 3
    if logits.shape[1] < least:
        form = "targeted DLR loss" if targeted else "DLR loss"
        raise ValueError(f"the {form} needs at least {least} classes, the model has {logits.shape[1]}")
    top = logits.topk(least, dim=1).values
    low = (top[:, 2] + top[:, 3]) / 2 if targeted else top[:, 2]
    return margin(logits, classes, targeted) / (top[:, 0] - low + 1e-12)
