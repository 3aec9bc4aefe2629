"""Argument checks of `reparameterize`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastdiff.ops._checks import FLOATS, check_counter, check_dense
from fastdiff.ops.noise import seeds_of


def _check_tensors(mu: Any, logvar: Any) -> None:
    for name, t in (("mu", mu), ("logvar", logvar)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"reparameterize: {name} must be a tensor, got {type(t).__name__}")
        check_dense("reparameterize", name, t)
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


def _check_clamp(clamp: Any) -> tuple[float, float] | None:
    if clamp is None:
        return None
    numbers = isinstance(clamp, (tuple, list)) and len(clamp) == 2
    if not numbers or not all(isinstance(b, (int, float)) for b in clamp):
        raise TypeError(f"reparameterize: clamp must be two numbers, got {clamp!r}")
    try:
        low, high = map(float, clamp)
    except OverflowError:
        raise ValueError(f"reparameterize: clamp must fit float64, got {clamp}") from None
    if not low <= high:
        raise ValueError(f"reparameterize: clamp must be low <= high, got {clamp}")
    return low, high


def _check_samples(samples: Any) -> int | None:
    if samples is None:
        return None
    if isinstance(samples, bool) or not isinstance(samples, (int, np.integer)):
        raise TypeError(f"reparameterize: samples must be an integer, got {type(samples).__name__}")
    if samples < 1:
        raise ValueError(f"reparameterize: samples must be >= 1, got {samples}")
    return int(samples)


def check(
    mu: Any, logvar: Any, seeds: Any, step: Any, stream: Any, clamp: Any, samples: Any
) -> tuple[torch.Tensor, int, int, tuple[float, float] | None, int | None]:
    _check_tensors(mu, logvar)
    values = seeds_of("reparameterize", seeds, mu)
    counters = (("step", step), ("stream", stream))
    step, stream = (check_counter("reparameterize", *counter) for counter in counters)
    return values, step, stream, _check_clamp(clamp), _check_samples(samples)
