"""The model calls of a row, eager or compiled."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff._guidance import RowGuidance
from fastdiff._state import Model

_names = itertools.count()


class Outputs(NamedTuple):
    """What the model gave at one row."""

    output: Tensor
    uncond: Tensor | None
    variance: Tensor | None


class Conditions(NamedTuple):
    """Keyword arguments of the model: of a conditional call, of an unconditional one, and of one
    call of both batches, empty where there is none."""

    cond: dict[str, Any]
    uncond: dict[str, Any]
    both: dict[str, Any]


def conditions(
    cond: Mapping[str, Any], uncond: Mapping[str, Any], n: int, device: torch.device, joined: bool
) -> Conditions:
    """The arguments on the device, checked; ``both`` only where one call takes both batches."""
    first, second = _on_device(cond, n, device), _on_device(uncond, n, device)
    both = {}
    if joined and cond.keys() == uncond.keys() and all(_fit(cond[k], uncond[k]) for k in cond):
        both = {
            k: torch.cat([v, second[k]]) if isinstance(v, Tensor) and v.dim() > 0 else v
            for k, v in first.items()
        }
    return Conditions(first, second, both)


def _fit(value: Any, other: Any) -> bool:
    """Whether one call can have both: batches to be joined, or one value for all."""
    if value is other:
        return True
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        # values are not compared: that would wait for the device
        alike = value.dtype == other.dtype and value.shape[1:] == other.shape[1:]
        return alike and value.dim() > 0 and other.dim() > 0
    plain = isinstance(value, (bool, int, float, str))  # others may not compare to a bool
    return plain and type(value) is type(other) and bool(value == other)


class Evaluation:
    """Calls the model at a row, once or twice.

    Args:
        model: the conditional one.
        guide_model: the unconditional one, None for the same.
        batched: one call of 2N samples where the model is the same and the conditions fit together.
        compiled: through ``torch.compile(fullgraph=True)``, one graph for each kind of call.

    Attributes:
        models: both, as given.
        joins: whether conditions that fit together make one call.
    """

    def __init__(
        self, model: Model, guide_model: Model | None, batched: bool, compiled: bool
    ) -> None:
        second = model if guide_model is None else guide_model
        self.models = (model,) if guide_model is None else (model, guide_model)
        # conditional alone, both in one batch, unconditional alone
        calls = (model, model, second)
        # each its own graph, so that no row waits for a compilation that another kind has had
        self._alone, self._both, self._second = map(_compiled, calls) if compiled else calls
        self.joins = guide_model is None and batched

    @staticmethod
    def count(n: int, guidance: RowGuidance, conditions: Conditions) -> int:
        """How many times a call of n samples takes."""
        return 2 * n if guidance.calls and conditions.both else n

    def __call__(
        self, x: Tensor, t: Tensor, conditions: Conditions, guidance: RowGuidance
    ) -> Outputs:
        """The outputs for x (N, *S) at times t (`count`,)."""
        n, other = len(x), None
        if not guidance.calls:
            output = _tensor(self._alone(x, t, **conditions.cond))
        elif conditions.both:
            output = _tensor(self._both(torch.cat([x, x]), t, **conditions.both))
            output, other = output[:n], output[n:]
        else:
            output = _tensor(self._alone(x, t, **conditions.cond))
            other = _tensor(self._second(x, t, **conditions.uncond))
        variance = None
        if has_variance(output, x):
            output, variance = output.chunk(2, dim=1)
        if other is not None and has_variance(other, x):
            other = other.chunk(2, dim=1)[0]
        return Outputs(output, other, variance)


def _compiled(model: Model) -> Model:
    """The model as one graph, with a cache of its own."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        return model(*args, **kwargs)

    # torch counts the graphs of a code object, refuses more than a few, and makes shapes dynamic
    # that differ from those of code of the same name: samplers and kinds of call share neither
    call.__code__ = call.__code__.replace(co_name=f"call_{next(_names)}")
    return torch.compile(call, fullgraph=True)


def _tensor(output: Any) -> Tensor:
    if not isinstance(output, Tensor):  # but a tuple, or what diffusers wraps it in
        raise TypeError(f"Sampler: model must return a tensor, got {type(output).__name__}")
    return output


def has_variance(output: Tensor, x: Tensor) -> bool:
    return x.dim() > 1 and output.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:])


def _on_device(kwargs: Mapping[str, Any], n: int, device: torch.device) -> dict[str, Any]:
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    for k, v in moved.items():
        if isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] != n:
            raise ValueError(
                f"Sampler: {k} must have one entry a sample ({n}), got {tuple(v.shape)}"
            )
    return moved
