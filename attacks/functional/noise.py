"""Random starts."""

from __future__ import annotations

import torch
from torch import Tensor


def shared_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise of shape ``like.shape[1:]``, shared by all examples of a batch.

    Examples:
        >>> shared_noise(points, torch.Generator().manual_seed(0)).shape
        torch.Size([64, 3])
    """
    return torch.randn(like.shape[1:], generator=generator, dtype=like.dtype).to(like.device)
