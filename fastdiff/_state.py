"""The memory of a run: the state's layout, its history slots, what a model says of itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Model = Callable[..., Tensor]


def first_parameter(model: Model) -> Tensor | None:
    """The parameter whose dtype and device are taken for the model's; None for a function."""
    if not isinstance(model, torch.nn.Module):
        return None
    return next((p for p in model.parameters() if p.is_floating_point()), None)


def layout(model: Model) -> torch.memory_format:
    """channels_last where the model's convolutions are, so that neither the model nor the step
    copies the other's tensors into its own order."""
    if isinstance(model, torch.nn.Module):
        for p in model.parameters():
            last = p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)
            # a kernel of one pixel, or of one channel, lies in both orders
            if p.dim() == 4 and last != p.is_contiguous():
                return torch.channels_last if last else torch.contiguous_format
    return torch.contiguous_format


def history_slots(depth: int, x: Tensor) -> Tensor | None:
    """History slots, each in the memory order of x."""
    if depth == 0:
        return None
    if x.is_contiguous():
        return torch.empty((depth, *x.shape), dtype=x.dtype, device=x.device)
    return torch.stack([torch.empty_like(x)] * depth)
