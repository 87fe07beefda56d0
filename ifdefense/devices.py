"""Differences between devices: float64, synchronisation, and random number generators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def device_of_weights(module: nn.Module) -> torch.device:
    """Device of a module: that of its first parameter, the CPU if it has none."""
    weight = next(module.parameters(), None)
    return torch.device("cpu") if weight is None else weight.device


def has_float64(device: torch.device) -> bool:
    """Whether a device supports float64; MPS does not."""
    if device.type in ("cpu", "cuda"):
        return True
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except TypeError:
        return False
    return True


def in_float64(values: Tensor) -> Tensor:
    """Converts values to float64, on the CPU if their device does not support it; differentiable."""
    return (values if has_float64(values.device) else values.cpu()).double()


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies tensors ``(N_i, ...)`` to the CPU at once, detached.

    Code that reads single values or takes many small steps is faster there, as the GPU is synchronised only
    once.
    """
    parts = [tensor.detach() for tensor in tensors]
    if len({part.device for part in parts}) > 1 or parts[0].device.type == "cpu":
        return [part.cpu() for part in parts]
    return list(torch.cat(parts).cpu().split([len(part) for part in parts]))


def on_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies tensors ``(N_i, ...)`` from the CPU to a device at once."""
    if device.type == "cpu":
        return list(tensors)
    return list(torch.cat(list(tensors)).to(device).split([len(part) for part in tensors]))


def synchronise(device: torch.device | None = None) -> None:
    """Waits until an accelerator has finished its work.

    Args:
        device: by default the current accelerator, if any; a no-op on a CPU.
    """
    if device is None and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)


def random_state(device: torch.device) -> Tensor | None:
    """State of an accelerator's generator, used by dropout; ``None`` for a CPU."""
    if device.type == "cpu":
        return None
    state: Tensor = torch.get_device_module(device).get_rng_state(*_index(device))
    return state


def restore_random_state(device: torch.device, state: Tensor | None) -> None:
    """Restores a `random_state`; ``None`` is a no-op."""
    if state is not None and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state, *_index(device))


def _index(device: torch.device) -> tuple[torch.device, ...]:
    """Device arguments of accelerator functions; empty for MPS, whose functions take none."""
    return () if device.type == "mps" else (device,)
