"""Argument checks of `reparameterize`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastdiff.ops._checks import FLOATS
from fastdiff.ops.noise import as_seeds


def _check_counter(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"reparameterize: {name} must be an integer, got {type(value).__name__}")
    if not 0 <= value < 1 << 32:
        raise ValueError(f"reparameterize: {name} must lie in [0, 2**32), got {value}")
    return int(value)


def _check_tensors(mu: Any, logvar: Any) -> None:
    for name, t in (("mu", mu), ("logvar", logvar)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"reparameterize: {name} must be a tensor, got {type(t).__name__}")
    if mu.dtype not in FLOATS:
        raise TypeError(
            f"reparameterize: mu must be float32, bfloat16, float16 or float64, got {mu.dtype}"
        )
    if mu.dim() == 0:
        raise ValueError("reparameterize: mu must have a batch axis, got a tensor of shape ()")
    if logvar.shape != mu.shape:
        raise ValueError(
            f"reparameterize: logvar must have the shape of mu {tuple(mu.shape)}, "
            f"got {tuple(logvar.shape)}"
        )
    if logvar.dtype != mu.dtype:
        raise TypeError(
            f"reparameterize: logvar must have the dtype of mu {mu.dtype}, got {logvar.dtype}"
        )
    if logvar.device != mu.device:
        raise ValueError(
            f"reparameterize: logvar must be on the device of mu {mu.device}, got {logvar.device}"
        )


def _seeds_of(seeds: Any, mu: torch.Tensor) -> torch.Tensor:
    count = mu.shape[0]
    if type(seeds) is int and 0 <= seeds < (1 << 63) - count:
        # made where they are needed: no list, no copy to the device, and torch.compile follows
        return torch.arange(seeds, seeds + count, device=mu.device)
    # torch.compile cannot follow the uint64 of as_seeds; what that would refuse, it gets
    listed = torch.compiler.is_compiling() and isinstance(seeds, (list, tuple))
    if listed and all(type(s) is int and 0 <= s < 1 << 64 for s in seeds):
        seeds = torch.tensor([s - (s >> 63 << 64) for s in seeds], dtype=torch.int64)
    values = as_seeds(seeds, count, where="reparameterize")
    return values if values.device == mu.device else values.to(mu.device)


def check(
    mu: Any, logvar: Any, seeds: Any, step: Any, stream: Any
) -> tuple[torch.Tensor, int, int]:
    _check_tensors(mu, logvar)
    values = _seeds_of(seeds, mu)
    return values, _check_counter("step", step), _check_counter("stream", stream)
