"""Pickling of purifiers, with all weights in one bytes object.

Worker processes receive each tensor as an open file, whose number is limited; bytes have no such limit.
Pickles contain the weights, so that later changes of weight files have no effect on them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Placeholder of a tensor stored in the bytes of a pickle."""

    number: int
    start: int
    end: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    parameter: bool
    requires_grad: bool


def packed(module: nn.Module) -> tuple[dict[str, Any], bytes | None]:
    """State of a module without its tensors, and their bytes; ``None`` if it has no tensors."""
    slots: dict[int, Any] = {}
    parts: list[bytes] = []
    start = 0
    for table in _tables(module):
        for value in table.values():
            if isinstance(value, Tensor) and id(value) not in slots:
                parts.append(_bytes(value))
                slots[id(value)] = _Slot(
                    len(parts),
                    start,
                    start := start + len(parts[-1]),
                    tuple(value.shape),
                    value.dtype,
                    str(value.device),
                    isinstance(value, nn.Parameter),
                    value.requires_grad,
                )
    # The memo makes the copy contain the slots in place of the tensors.
    return copy.deepcopy(vars(module), slots), b"".join(parts) if parts else None


def unpack_into(module: nn.Module, data: bytes) -> None:
    """Replaces the slots of `packed` by tensors."""
    made: dict[_Slot, Tensor] = {}
    for table in _tables(module):
        for name, value in table.items():
            if isinstance(value, _Slot):
                if value not in made:
                    made[value] = _tensor(value, data)
                table[name] = made[value]


def modules_in(value: Any, seen: set[int] | None = None) -> Iterator[nn.Module]:
    """All modules of a purifier, including modules in options, each once."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, (type, str, bytes, Tensor)):
        return
    seen.add(id(value))
    inner: Any = ()
    if isinstance(value, nn.Module):
        yield value
        inner = vars(value).values()
    elif dataclasses.is_dataclass(value):
        inner = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, (list, tuple)):
        inner = value
    for part in inner:
        yield from modules_in(part, seen)


def _tables(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Parameters and buffers of all modules by name."""
    for part in modules_in(module):
        yield part._parameters
        yield part._buffers


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _tensor(slot: _Slot, data: bytes) -> Tensor:
    raw = np.frombuffer(data, np.uint8, slot.end - slot.start, slot.start).copy()
    values = torch.from_numpy(raw).view(slot.dtype).view(slot.shape).to(slot.device)
    if slot.parameter:
        return nn.Parameter(values, slot.requires_grad)
    return values.requires_grad_(slot.requires_grad)
