"""Models in parts, one a process: FSDP2 (`torch.distributed.fsdp.fully_shard`; Zhao et al. 2023,
arXiv:2304.11277).

Each process keeps a slice of the first dimension of every weight, and with it of the gradient, of
the moments and of the average. The weights of a block are put together where it runs, and let go
behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.dit import DiT, DiTBlock

__all__ = ["cut", "like", "whole"]


def cut(model: nn.Module, device: torch.device) -> nn.Module:
    """Leave this process its part of every weight, on the device, in place; returns the model.

    No device holds more than a block whole. What has been cut before stays so.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if device.type != "cpu":
        torch.get_device_module(device).set_device(device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Parts that a forward pass calls as modules, one after the other."""
    for module in model.modules():
        if isinstance(module, DiT):
            yield module.modulation
        elif isinstance(module, DiTBlock):  # which has two methods and is not called itself
            yield from (module.qkv, module.proj, module.fc1, module.fc2)
        elif isinstance(module, nn.ModuleList):
            each = (m for m in module if not isinstance(m, DiTBlock))
            yield from (m for m in each if next(m.parameters(), None) is not None)


def whole(state: Any, keep: bool) -> Any:
    """Nested state with the parts of all processes put together, on the CPU.

    To be called in all of them; they hold one tensor whole at a time, those that do not keep it.

    Returns:
        The state; None unless `keep`.
    """
    found = _gathered(state, keep)
    return found if keep else None


def _gathered(state: Any, keep: bool) -> Any:
    from torch.distributed.tensor import DTensor

    if isinstance(state, dict):
        return {name: _gathered(value, keep) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_gathered(value, keep) for value in state)
    if isinstance(state, DTensor):
        tensor = state.full_tensor()
        return tensor.cpu() if keep else None
    return state


def like(own: Tensor, value: Tensor) -> Tensor:
    """A whole tensor of its shape as `own` is: this process's part of it, or all; its memory order
    and device."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(own, DTensor):
        return torch.empty_like(own).copy_(value)
    # every process has read the file: nothing travels
    value = value.contiguous().to(own.device)
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)
