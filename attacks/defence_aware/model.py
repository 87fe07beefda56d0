"""Defended classifiers with gradients through the defence: BPDA and EOT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attacks.oracle import Model, Stochastic
from attacks.settings import NonNegativeInt, PositiveInt, check_settings
from ifdefense.arguments import MAX_SEED, integer
from ifdefense.geometry.points import gather, knn
from ifdefense.provenance import ByCode
from ifdefense.purifiers.defended import Defended

Gradient = Literal["nearest", "identity", "exact"]


class PurifierLike(Protocol):
    """Interface of a purifier, such as `ifdefense.Purifier` or `FunctionPurifier`."""

    @property
    def deterministic(self) -> bool:
        """Whether the result does not depend on the seed."""

    @property
    def differentiable(self) -> bool:
        """Whether the result is differentiable in the points."""

    @property
    def normalise(self) -> bool:
        """Whether purified clouds are normalised to the unit sphere before classification."""

    def __call__(self, points: Tensor, num_points: int | None = None, seed: int = 0) -> Tensor:
        """Purified clouds ``(B, M, 3)``; ``num_points`` is M, by default N."""


class FunctionPurifier(ByCode, nn.Module):
    """Wraps a function as a purifier.

    Args:
        function: ``(points (B, N, 3), num_points, seed)`` to ``(B, M, 3)``, in the same frame.
        deterministic: whether the seed has no effect.
        differentiable: whether the result is differentiable in the points.
        normalise: whether purified clouds are normalised before classification.

    Examples:
        >>> rounded = attacks.FunctionPurifier(lambda points, num_points, seed: points.round(decimals=1),
        ...     deterministic=True)
        >>> attack, model = attacks.adaptive(attacks.FGM("linf"), classifier, rounded)
        >>> attack(model, points, labels).points.shape
        torch.Size([2, 64, 3])
    """

    def __init__(
        self,
        function: Callable[[Tensor, int | None, int], Tensor],
        *,
        deterministic: bool,
        differentiable: bool = False,
        normalise: bool = False,
    ) -> None:
        super().__init__()
        self.function = function
        self.deterministic = deterministic
        self.differentiable = differentiable
        self.normalise = normalise

    def forward(self, points: Tensor, num_points: int | None = None, seed: int = 0) -> Tensor:
        """Calls the function."""
        return self.function(points, num_points, seed)


class BPDA(ByCode, nn.Module):
    """A purifier with an approximate gradient: real forward pass, differentiable backward pass.

    Backward pass differentiable approximation, Athalye et al., 2018, section 4.1,
    `arXiv:1802.00420 <https://arxiv.org/abs/1802.00420>`_.

    Args:
        purifier: the real purifier.
        gradient: ``"nearest"`` passes the gradient of a purified point to the nearest input point, which is
            exact for a purifier that selects points; ``"identity"`` passes it to the input point of the same
            index; ``"exact"`` differentiates the purifier. By default ``"exact"`` if the purifier is
            differentiable, else ``"nearest"``.

    Raises:
        TypeError: if the purifier does not declare its properties.
        ValueError: for an unknown gradient, or ``"exact"`` of a purifier that is not differentiable.

    Examples:
        >>> purifier = attacks.BPDA(ifdefense.load("onet-mesh"))  # not differentiable itself
        >>> given = points.clone().requires_grad_()
        >>> purifier(given, 32).requires_grad
        True
    """

    def __init__(self, purifier: PurifierLike, gradient: Gradient | None = None) -> None:
        super().__init__()
        missing = [
            name for name in ("deterministic", "differentiable", "normalise") if not hasattr(purifier, name)
        ]
        if missing:
            raise TypeError(
                f"the purifier has no attribute {missing[0]!r}; wrap a function in FunctionPurifier"
            )
        if gradient is None:
            gradient = "exact" if purifier.differentiable else "nearest"
        if gradient not in get_args(Gradient):
            raise ValueError(f"unknown gradient {gradient!r}; there are: {', '.join(get_args(Gradient))}")
        if gradient == "exact" and not purifier.differentiable:
            raise ValueError('gradient="exact" needs a differentiable purifier')
        self.purifier = purifier
        self.gradient = gradient
        self.deterministic = purifier.deterministic
        self.normalise = purifier.normalise

    def forward(self, points: Tensor, num_points: int | None = None, seed: int = 0, **axis: str) -> Tensor:
        """Purified clouds ``(B, M, 3)``, equal to those of the purifier; arguments are passed on.

        Raises:
            ValueError: if the purifier returns a wrong shape or, with ``"exact"``, passes no gradient.
        """

        def purify(given: Tensor) -> Tensor:
            return self._purified(given, num_points, seed, **axis)

        if not (torch.is_grad_enabled() and points.requires_grad):
            return purify(points)
        if self.gradient == "exact":
            exact: Tensor = _Exact.apply(points, purify)  # type: ignore[no-untyped-call]
            return exact
        with torch.no_grad():
            purified = purify(points.detach())
        if self.gradient == "identity":
            if purified.shape != points.shape:
                raise ValueError(
                    f'gradient="identity" needs as many points as the input: got {tuple(purified.shape)} '
                    f"for {tuple(points.shape)}"
                )
            source = points
        else:
            source = gather(points, knn(purified, points.detach(), 1)[1].squeeze(2))
        return purified + (source - source.detach())  # adds exactly 0

    def _purified(self, points: Tensor, num_points: int | None, seed: int, **axis: str) -> Tensor:
        purified = self.purifier(points, num_points, seed, **axis)
        if purified.ndim != 3 or len(purified) != len(points) or purified.shape[2] != 3:
            raise ValueError(
                f"the purifier must return clouds of shape ({len(points)}, M, 3), "
                f"it returned {tuple(purified.shape)}"
            )
        return purified.to(points)


class _Exact(torch.autograd.Function):
    """Exact gradient of a purifier; raises an error if it vanishes, because of a detached step."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, purify: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            ctx.points = points.detach().requires_grad_()
            ctx.purified = purify(ctx.points)
        if not ctx.purified.requires_grad:
            raise ValueError("the purifier passes no gradient, though it is declared differentiable")
        purified: Tensor = ctx.purified.detach()
        return purified

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        (gradient,) = torch.autograd.grad(ctx.purified, ctx.points, grad, allow_unused=True)
        lost = grad.flatten(1).any(1)
        if gradient is not None:
            lost = lost & ~gradient.flatten(1).any(1)
        if lost.any():
            example = int(lost.nonzero()[0])
            raise ValueError(f"the purifier passes no gradient for example {example}: a step is detached")
        return gradient, None


@dataclass(frozen=True)
class EOT:
    """Expectation over transformation: gradients are averaged over random draws of the purifier.

    Athalye et al., 2018, section 4.2, `arXiv:1802.00420 <https://arxiv.org/abs/1802.00420>`_. The draws
    differ from those of the defence, which are unknown to the attacker. To model an attacker who knows the
    seed, use
    ``EOT(samples=1, first=seed, fresh=False)``. All clouds of a batch share the draws.

    Attributes:
        samples: draws per gradient.
        first: first seed.
        fresh: whether to use new draws for every gradient.

    Examples:
        >>> model = attacks.DefenceAware(classifier, ifdefense.load("srs"), eot=attacks.EOT(samples=2))
        >>> model(points).shape
        torch.Size([2, 4])
    """

    samples: PositiveInt = 8
    first: NonNegativeInt = 1
    fresh: bool = True

    def __post_init__(self) -> None:
        check_settings(self)

    def seeds(self, query: int) -> range:
        """Seeds of a query, counted from 0."""
        start = self.first + (query * self.samples if self.fresh else 0)
        return range(start, start + self.samples)


class DefenceAware(Defended, Stochastic):
    """A defended classifier with gradients through the defence, as a model for attacks.

    If gradients are needed, they pass the purifier by `BPDA`, and the logits are means over the draws of
    `EOT`; otherwise the logits are those of the real defence. Attacks evaluate their result without
    gradients, so the reported success is that on the real defence::

        attacks.PGD()(attacks.DefenceAware(classifier, purifier), clouds, labels)

    Args:
        classifier: ``(B, M, 3)`` clouds to ``(B, C)`` logits.
        purifier: the defence; wrap functions in `FunctionPurifier`.
        gradient: ``"exact"``, ``"nearest"`` or ``"identity"``, see `BPDA`; by default ``"exact"`` if the
            purifier is differentiable, else ``"nearest"``.
        eot: draws per gradient; by default 8, or 1 if the purifier is deterministic.
        num_points: points of a purified cloud; by default as many as in the input.
        normalise: whether purified clouds are normalised to the unit sphere; by default as declared by the
            purifier.
        seed: seed of the real defence.
        up: up axis of the points, see `ifdefense.Defended`.

    Raises:
        TypeError, ValueError: as `BPDA`, or for an argument out of range.

    Examples:
        >>> model = attacks.DefenceAware(classifier, ifdefense.load("sor"))
        >>> result = attacks.PGD("linf", iterations=2)(model, points, labels)
        >>> result.points.shape
        torch.Size([2, 64, 3])
    """

    def __init__(
        self,
        classifier: Model,
        purifier: PurifierLike,
        *,
        gradient: Gradient | None = None,
        eot: EOT | None = None,
        num_points: int | None = None,
        normalise: bool | None = None,
        seed: int = 0,
        up: str | None = None,
    ) -> None:
        super().__init__(
            classifier,
            BPDA(purifier, gradient),
            num_points=num_points,
            normalise=normalise,
            seed=integer("seed", seed, 0, MAX_SEED),
            up=up,
        )
        self.eot = eot if eot is not None else EOT(samples=1) if purifier.deterministic else EOT()
        self._gradients = 0

    def restart(self) -> None:
        """Restarts the draws of `EOT`."""
        self._gradients = 0

    def seeds(self, points: Any = None) -> list[int]:
        """Next draws of `EOT` if a gradient is needed, else the seed of the defence."""
        if not (torch.is_grad_enabled() and isinstance(points, Tensor) and points.requires_grad):
            return super().seeds(points)
        self._gradients += 1
        return list(self.eot.seeds(self._gradients - 1))
