"""What every network asks of its arguments, and of its configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


def require_tensors(op: str, **given: object) -> None:
    """Numbers and lists are none, though a time or a label is easily thought of as one."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {value!r}")


def require_batch(op: str, x: Tensor, t: Tensor, shape: Sequence[int]) -> None:
    """`x` must be a floating point batch of tensors of the shape, `t` one number a sample."""
    require_tensors(op, x=x, t=t)
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be floating point, got {x.dtype}")
    if x.ndim != 1 + len(shape) or tuple(x.shape[1:]) != tuple(shape):
        rule = f"(N, {', '.join(map(str, shape))})"
        raise ValueError(f"{op}: x must have shape {rule}, got {tuple(x.shape)}")
    if tuple(t.shape) != (x.shape[0],):
        raise ValueError(f"{op}: t must have shape ({x.shape[0]},), got {tuple(t.shape)}")


def require_labels(op: str, label: Tensor, t: Tensor, low: int, high: int) -> None:
    """`label` must be int64 in [low, high], one a sample."""
    require_tensors(op, label=label)
    if label.dtype != torch.int64:
        raise TypeError(f"{op}: label must be int64, got {label.dtype}")
    if label.shape != t.shape:
        raise ValueError(f"{op}: label must have shape {tuple(t.shape)}, got {tuple(label.shape)}")
    # elsewhere the check would wait for the device at every step
    if label.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = label[(label < low) | (label > high)]
        if len(wrong):
            raise ValueError(f"{op}: label must lie in [{low}, {high}], got {wrong.tolist()}")


class Config:
    """Of the dataclasses that describe an architecture: to a JSON-able dict, and back."""

    def to_config(self) -> dict[str, Any]:
        """The fields as a JSON-able dict; `from_config` inverts it."""
        values = asdict(self)  # type: ignore[call-overload]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build from a dict as `to_config` gives; ValueError names any unknown key."""
        unknown = sorted(set(config) - {f.name for f in fields(cls)})  # type: ignore[arg-type]
        if unknown:
            raise ValueError(f"{cls.__name__}: config must hold known keys only, got {unknown}")
        return cls(**config)
