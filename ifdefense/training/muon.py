"""Muon: momentum SGD with orthogonalised updates.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024
(https://kellerjordan.github.io/posts/muon/). ``torch.optim.Muon`` takes two-dimensional parameters only; an
Occupancy Network under its published names has convolutions of width 1 as well, ``(out, in, 1)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Published coefficients of the quintic iteration: five steps give singular values in about [0.7, 1.2]."""


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Approximates the nearest matrix with all singular values one, ``U Vᵀ``, of ``(m, n)``.

    Newton–Schulz iteration ``X ← a X + (b A + c A²) X`` with ``A = X Xᵀ``.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.T if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised Nesterov momentum of weight matrices.

    Args:
        params: weights ``(out, in, …)``; further dimensions count as inputs.
        lr: length of a step; the update of a square matrix has spectral norm of about this.
        momentum: of the gradients.
        weight_decay: decoupled; each step scales a weight by ``1 - lr * weight_decay``. Weights before a
            batch norm are otherwise unbounded, and steps change the direction of large weights less.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; ``closure`` is not used."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                velocity = state["momentum"].mul_(group["momentum"]).add_(parameter.grad)
                ahead = parameter.grad + group["momentum"] * velocity
                update = orthogonalise(ahead.flatten(1)).view_as(parameter)
                gain = max(1.0, parameter.shape[0] / ahead[0].numel()) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * gain)


def split_parameters(
    network: nn.Module, outermost: Iterable[nn.Module]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Hidden weight matrices, for Muon, and all other parameters.

    Args:
        network: the network.
        outermost: its first and last layers, whose matrices count as others.
    """
    edge = {id(parameter) for module in outermost for parameter in module.parameters()}
    hidden = [p for p in network.parameters() if p.ndim >= 2 and id(p) not in edge]
    chosen = {id(p) for p in hidden}
    return hidden, [p for p in network.parameters() if id(p) not in chosen]
