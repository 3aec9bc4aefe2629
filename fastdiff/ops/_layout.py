"""Memory order of a batch: the layouts that kernels walk without a copy."""

from __future__ import annotations

import torch

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(x: torch.Tensor) -> torch.memory_format | None:
    """Contiguous, channels_last (4-D, 5-D), or None for any other order."""
    if x.is_contiguous():
        return torch.contiguous_format
    last = _CHANNELS_LAST.get(x.dim())
    if last is not None and x.is_contiguous(memory_format=last):
        return last
    return None


def channels(x: torch.Tensor, fmt: torch.memory_format) -> int:
    """Channels where they are the fastest axis, 0 where memory order is logical order."""
    return 0 if fmt == torch.contiguous_format else x.shape[1]
