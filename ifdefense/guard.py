"""Isolates our networks from the caller's PyTorch settings: purifiers compute inside `isolated`.

Among the settings per thread, autocast is disabled for all device types, inference mode is disabled, and the
default device is the CPU; the gradient mode is kept. The precision of float32 products is a setting of the
process: it is "highest" while any thread is in a block. The default dtype, also a setting of the process, is
not changed, as our code always specifies dtypes.
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
    """Context with `normal_modes` and full-precision products. May be entered by several threads."""
    with normal_modes(), _exact_products():
        yield


@contextlib.contextmanager
def normal_modes() -> Iterator[None]:
    """Context in which the caller's autocast, inference mode and default device have no effect.

    May be nested. Tensors created in inference mode must be cloned before use, see `normal`.
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
    """Decorator: runs a function in `isolated`, or unchanged while `torch.compile` traces its caller.

    The function raises a RuntimeError in `torch.export`, `torch.onnx` and `torch.jit.trace`: an exported
    graph would hold the neighbours and the surface of one cloud for all.
    """

    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        with isolated():
            return function(*args, **kwargs)

    @functools.wraps(function)
    def entry(*args: P.args, **kwargs: P.kwargs) -> R:
        if _exporting():
            raise RuntimeError(
                "purifiers cannot be exported or traced, as parts of them are not PyTorch: export the "
                "classifier alone, and purify clouds before it"
            )
        if torch.compiler.is_compiling():  # asked first, as `disable` imports the compiler
            return torch.compiler.disable(plain)(*args, **kwargs)  # type: ignore[no-any-return]
        return plain(*args, **kwargs)

    return entry


def _exporting() -> bool:
    """Whether a graph is being recorded that outlives the call."""
    exporting = getattr(torch.compiler, "is_exporting", None)  # since PyTorch 2.7
    return bool(torch._C._get_tracing_state()) or (exporting is not None and exporting())


def loading(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of functions that load a network: `guarded`, frozen, in evaluation mode.

    Tensors are float32 regardless of the default dtype, and new layers do not use the caller's generator.
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
    """Returns the tensor, or a clone of an inference tensor, which cannot be part of a graph."""
    return values.clone() if values.is_inference() else values


def autocast_kinds() -> list[str]:
    """Device types with autocast enabled."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = _KINDS if accelerator is None or accelerator.type in _KINDS else (*_KINDS, accelerator.type)
    return [kind for kind in kinds if _has_autocast(kind) and torch.is_autocast_enabled(kind)]


@functools.cache
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Full-precision float32 products, until the last thread leaves."""
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
    """Objects with a precision setting: first general ones, then those that inherit from them."""
    backends: Any = torch.backends
    if not hasattr(backends, "fp32_precision"):
        return [_MatmulPrecision()]
    found = [backends, backends.mkldnn.matmul, backends.mkldnn.conv]
    if torch.cuda.is_initialized():
        found += [backends.cudnn, backends.cuda.matmul, backends.cudnn.conv]
    return found
