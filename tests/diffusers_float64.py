"""diffusers' schedulers and pipelines in float64, on the noise of a run in float32."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Float32Draws(TorchFunctionMode):
    """A run in float64 on the noise of the run in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if func is torch.randn and named.get("dtype") == torch.float64:
            return func(*args, **{**named, "dtype": torch.float32}).double()
        return func(*args, **named)


def in_float64(scheduler: Any) -> Any:
    """The scheduler, its tables in float64 from now on."""

    def cast() -> None:
        for name, value in vars(scheduler).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                vars(scheduler)[name] = value.double()

    original = scheduler.set_timesteps

    @functools.wraps(original)  # pipelines look its parameters up
    def set_timesteps(*args: Any, **named: Any) -> None:
        original(*args, **named)
        cast()

    scheduler.set_timesteps = set_timesteps
    cast()
    return scheduler


def pipe_in_float64(pipe: Any) -> Any:
    """The pipeline, its weights and the tables of its scheduler in float64 from now on."""
    in_float64(pipe.scheduler)
    return pipe.to(torch.float64)
