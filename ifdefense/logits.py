"""Calls classifiers and extracts their logits; all calls of classifiers go through `classify`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ifdefense.guard import autocast_kinds, normal_modes

_LOG = logging.getLogger(__name__)


def classify(model: Callable[[Any], Any], clouds: Any) -> Tensor:
    """Calls a classifier and extracts the logits from its output.

    Inputs are converted to the dtype and device of the module's weights; gradients have those of the clouds.
    If the attribute ``places_clouds`` of the module is true, inputs are passed unchanged.

    Args:
        model: returns ``(B, C)`` logits; or a tuple or list with the logits first, such as ``(log_probs,
            features)``; or a mapping or an object with an entry or attribute ``logits``.
        clouds: ``(B, N, 3)``, or a batch of PyTorch Geometric, which is passed unchanged.

    Returns:
        ``(B, C)`` in the dtype and on the device of the model.

    Raises:
        ValueError: if the output contains no logits of that shape.

    Examples:
        >>> logits = classify(lambda clouds: {"logits": classifier(clouds)}, points)
        >>> logits.shape
        torch.Size([2, 4])
    """
    try:
        if getattr(model, "places_clouds", False):
            returned = model(clouds)
        else:
            given = placed(model, clouds) if isinstance(clouds, Tensor) else clouds
            with _as_called():
                returned = model(given)
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(clouds, Tensor) and not getattr(error, "__notes__", None):
            error.add_note(
                f"The classifier was called with clouds (B, N, 3) = {tuple(clouds.shape)}. If it takes "
                "(B, 3, N), wrap it in a module whose forward transposes: self.net(points.transpose(1, 2))."
            )
        raise
    count = len(clouds) if isinstance(clouds, Tensor) else getattr(clouds, "num_graphs", None)
    logits, where = _found(returned)
    if (
        not isinstance(logits, Tensor)
        or logits.ndim != 2
        or count not in (None, len(logits))
        or not logits.is_floating_point()
    ):
        shape = f"({'B' if count is None else count}, C)"
        raise ValueError(
            f"the model must return logits of shape {shape}, it returned {_described(returned)}; they may be "
            "alone, first in a tuple or list, or named 'logits'"
        )
    if where:
        _LOG.debug("the model returned a %s; %s is taken for the logits", type(returned).__name__, where)
    return logits


def placed(model: object, values: Tensor) -> Tensor:
    """Converts values to the dtype and device of a module's first floating-point weight, if any."""
    if isinstance(model, nn.Module):
        for weight in model.parameters():
            if weight.is_floating_point():
                return values.to(weight)
    return values


def _found(returned: Any) -> tuple[Any, str]:
    """Candidate for the logits, and its position in the output, if it is not the output itself."""
    if isinstance(returned, Tensor):
        return returned, ""
    if isinstance(returned, Mapping):
        return returned.get("logits"), "the entry 'logits'"
    if hasattr(returned, "logits"):
        return returned.logits, "the attribute 'logits'"
    if isinstance(returned, tuple | list) and returned:
        return returned[0], "the first element"
    return None, ""


def _described(value: Any, *, inside: bool = False) -> str:
    """Describes the output of a model, for error messages."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)}" + ("" if value.is_floating_point() else f" {value.dtype}")
    name = type(value).__name__
    if inside:
        return name
    parts = []
    if isinstance(value, Mapping):
        parts = [f"{key!r}: {_described(each, inside=True)}" for key, each in value.items()]
    elif isinstance(value, tuple | list):
        parts = [_described(each, inside=True) for each in value]
    return f"a {name} of {', '.join(parts)}" if parts else f"a {name}"


class _State(NamedTuple):
    """The part of torch's state that applies to models only.

    Attributes:
        autocast: dtype per type of device for which autocast is on.
        device: default device of new tensors.
    """

    autocast: dict[str, torch.dtype]
    device: torch.device

    @classmethod
    def now(cls) -> _State:
        autocast = {kind: torch.get_autocast_dtype(kind) for kind in autocast_kinds()}
        return cls(autocast, torch.get_default_device())


_CALLER: ContextVar[_State | None] = ContextVar("_CALLER", default=None)
_CPU = torch.device("cpu")


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Context in `normal_modes`, except for autocast and device in models called by `classify`.

    Autocast is meant for the caller's networks, not for distances and updates, which would lose precision.
    """
    token = _CALLER.set(_State.now())
    try:
        with normal_modes():
            yield
    finally:
        _CALLER.reset(token)


@contextlib.contextmanager
def _as_called() -> Iterator[None]:
    """Context with the state saved by `apart`, if any."""
    caller = _CALLER.get()
    with contextlib.ExitStack() as stack:
        if caller is not None:
            for kind, dtype in caller.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            if caller.device != _CPU:
                stack.enter_context(caller.device)
        yield


@contextlib.contextmanager
def frozen(model: object) -> Iterator[None]:
    """Context in which a module is in evaluation mode with frozen parameters.

    Examples:
        >>> with frozen(classifier):
        ...     any(weight.requires_grad for weight in classifier.parameters())
        False
    """
    if not isinstance(model, nn.Module):
        yield
        return
    training = [module for module in model.modules() if module.training]
    # requires_grad of inference tensors cannot be restored outside of inference mode.
    trainable = [
        weight for weight in model.parameters() if weight.requires_grad and not weight.is_inference()
    ]
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
