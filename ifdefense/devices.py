"""What devices differ in: float64, waiting for results, and generators of random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def device_of_weights(module: nn.Module) -> torch.device:
    """Where a module computes: the device of its first parameter, the CPU if it has none."""
    weight = next(module.parameters(), None)
    return torch.device("cpu") if weight is None else weight.device


def has_float64(device: torch.device) -> bool:
    """Whether a device has float64; MPS has not."""
    if device.type in ("cpu", "cuda"):
        return True
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except TypeError:
        return False
    return True


def in_float64(values: Tensor) -> Tensor:
    """Values in float64: on their device if it has that, else on the CPU; differentiable."""
    return (values if has_float64(values.device) else values.cpu()).double()


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The values of tensors ``(N_i, ...)`` on the CPU, without their graphs, and by one copy.

    What reads single values, or takes many small steps, is faster there: a GPU is waited for once.
    """
    parts = [tensor.detach() for tensor in tensors]
    if len({part.device for part in parts}) > 1 or parts[0].device.type == "cpu":
        return [part.cpu() for part in parts]
    return list(torch.cat(parts).cpu().split([len(part) for part in parts]))


def on_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors ``(N_i, ...)`` of the CPU on a device, by one copy."""
    if device.type == "cpu":
        return list(tensors)
    return list(torch.cat(list(tensors)).to(device).split([len(part) for part in tensors]))


def synchronise(device: torch.device | None = None) -> None:
    """Waits until an accelerator has done what was asked of it.

    Args:
        device: nothing is waited for on a CPU; by default the current accelerator, if there is one.
    """
    if device is None and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)


def random_state(device: torch.device) -> Tensor | None:
    """The state of the generator of an accelerator, from which dropout draws; ``None`` for a CPU."""
    if device.type == "cpu":
        return None
    state: Tensor = torch.get_device_module(device).get_rng_state(*_index(device))
    return state


def restore_random_state(device: torch.device, state: Tensor | None) -> None:
    """Continues from a `random_state`; ``None`` changes nothing."""
    if state is not None and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state, *_index(device))


def _index(device: torch.device) -> tuple[torch.device, ...]:
    """The argument that tells devices of a kind apart; of MPS there is one, whose functions take none."""
    return () if device.type == "mps" else (device,)
