"""Random starts."""

from __future__ import annotations

import torch
from torch import Tensor


def shared_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise of shape ``like.shape[1:]``, shared by all examples of a batch."""
    return torch.randn(like.shape[1:], generator=generator, dtype=like.dtype).to(like.device)
