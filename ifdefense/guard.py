"""The caller's settings of PyTorch, kept away from our networks: purifiers compute inside `isolated`.

Of the settings of a thread, autocast is off for every kind of device, inference mode is left, and new tensors
are on the CPU where nothing else is said; the gradient mode stays the caller's. The precision of float32
products can only be set for the whole process: it is "highest" while any thread is in a block. The default
dtype, another setting of the process, is not touched: our code names its dtypes.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_KINDS = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla")
_EXACT = ("none", "ieee")
_lock = threading.Lock()
_depth = 0
_replaced: list[tuple[Any, str]] = []


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Inside the block, `normal_modes`, and products are exact. May be entered by several threads."""
    with normal_modes(), _exact_products():
        yield


@contextlib.contextmanager
def normal_modes() -> Iterator[None]:
    """Inside the block, the caller's autocast, inference mode and default device have no effect.

    May be nested. Tensors made in inference mode have to be cloned before they are used, see `normal`.
    """
    gradients = torch.is_grad_enabled()
    with contextlib.ExitStack() as stack:
        for kind in autocast_kinds():
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(gradients))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def guarded(function: Callable[P, R]) -> Callable[P, R]:
    """A function that runs inside `isolated`, and as it is where `torch.compile` traces its caller."""

    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        with isolated():
            return function(*args, **kwargs)

    @functools.wraps(function)
    def entry(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():  # asked first, as `disable` imports the compiler
            return torch.compiler.disable(plain)(*args, **kwargs)  # type: ignore[no-any-return]
        return plain(*args, **kwargs)

    return entry


def loading(function: Callable[P, R]) -> Callable[P, R]:
    """A function that loads a network: `guarded`, frozen, in evaluation mode, and without draws.

    Its tensors are float32 whatever the default is, and new layers draw nothing from the caller's generator.
    """

    @guarded
    @functools.wraps(function)
    def entry(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.random.fork_rng(devices=[]):
            network: Any = function(*args, **kwargs)
        network.float().eval().requires_grad_(False)
        return network  # type: ignore[no-any-return]

    return entry


def normal(values: Tensor) -> Tensor:
    """The tensor, or a copy of one that was made in inference mode, which no graph takes."""
    return values.clone() if values.is_inference() else values


def autocast_kinds() -> list[str]:
    """Kinds of devices for which autocast is on."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = _KINDS if accelerator is None or accelerator.type in _KINDS else (*_KINDS, accelerator.type)
    return [kind for kind in kinds if _has_autocast(kind) and torch.is_autocast_enabled(kind)]


@functools.cache
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Float32 products in float32, until the last thread leaves."""
    global _depth
    with _lock:
        _depth += 1
        for owner in _precisions():
            if owner.fp32_precision not in _EXACT:
                _replaced.append((owner, owner.fp32_precision))
                owner.fp32_precision = "ieee"
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            while _depth == 0 and _replaced:
                owner, value = _replaced.pop()
                owner.fp32_precision = value


class _MatmulPrecision:
    """`torch.set_float32_matmul_precision` as an attribute, for PyTorch before 2.9."""

    @property
    def fp32_precision(self) -> str:
        value = torch.get_float32_matmul_precision()
        return "ieee" if value == "highest" else value

    @fp32_precision.setter
    def fp32_precision(self, value: str) -> None:
        torch.set_float32_matmul_precision("highest" if value == "ieee" else value)


def _precisions() -> list[Any]:
    """Where precisions are set: from the general ones, which others inherit, to those of one operation."""
    backends: Any = torch.backends
    if not hasattr(backends, "fp32_precision"):
        return [_MatmulPrecision()]
    found = [backends, backends.mkldnn.matmul, backends.mkldnn.conv]
    if torch.cuda.is_initialized():
        found += [backends.cudnn, backends.cuda.matmul, backends.cudnn.conv]
    return found
