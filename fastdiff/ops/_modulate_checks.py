"""What `modulate` and `gated_residual` ask of their arguments."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fastdiff.reference.modulate import NORMS

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Modulate(NamedTuple):
    """Checked arguments; backends fill ``out`` and ``total`` where they are wanted.

    x, residual, out and total share one shape (N, L, C) or (N, C) and one dtype and are contiguous;
    weight and bias are contiguous (C,) of one dtype; scale, shift and gate have one dtype, each
    (N, C) or (N, L, C) with a last axis of stride 1. ``out`` is None where only x + gate * residual
    is wanted, ``total`` (that sum) is None without a residual.
    """

    x: torch.Tensor
    scale: torch.Tensor | None
    shift: torch.Tensor | None
    norm: str | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    gate: torch.Tensor | None
    eps: float
    out: torch.Tensor | None
    total: torch.Tensor | None


def tokens(x: torch.Tensor) -> tuple[int, int, int]:
    """N, L and C of (N, L, C), or of (N, C) with one token a sample."""
    return x.shape[0], x.shape[1] if x.dim() == 3 else 1, x.shape[-1]


def strides(t: torch.Tensor | None) -> tuple[int, int]:
    """Elements between two samples and between two tokens of scale, shift or gate."""
    if t is None:
        return 0, 0
    return t.stride(0), t.stride(1) if t.dim() == 3 else 0


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


def _check_tensor(
    op: str, name: str, t: object, x: torch.Tensor, shapes: tuple[tuple[int, ...], ...]
) -> None:
    """A floating-point tensor of one of these shapes on the device of x."""
    if not isinstance(t, torch.Tensor) or t.dtype not in _DTYPES:
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {_kind(t)}")
    if tuple(t.shape) not in shapes:
        rule = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(f"{op}: {name} must have shape {rule}, got {tuple(t.shape)}")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} must be on the device of x {x.device}, got {t.device}")


def check(
    op: str,
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    norm: str | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
    eps: float,
) -> None:
    if not isinstance(x, torch.Tensor) or x.dtype not in _DTYPES:
        raise TypeError(
            f"{op}: x must be a float32, bfloat16, float16 or float64 tensor, got {_kind(x)}"
        )
    if x.dim() not in (2, 3):
        raise ValueError(f"{op}: x must have shape (N, L, C) or (N, C), got {tuple(x.shape)}")
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: x must have at least one channel, got {tuple(x.shape)}")
    if norm not in NORMS:
        names = ", ".join(repr(n) for n in NORMS)
        raise ValueError(f"{op}: norm must be one of {names}, got {norm!r}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a number, got {type(eps).__name__}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"{op}: eps must be finite and not negative, got {eps}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            if norm is None:
                raise ValueError(f"{op}: {name} must be None without a norm, got {_kind(t)}")
            _check_tensor(op, name, t, x, (tuple(x.shape[-1:]),))
    each = ((x.shape[0], x.shape[-1]), tuple(x.shape))
    for name, t in (("scale", scale), ("shift", shift), ("gate", gate)):
        if t is not None:
            _check_tensor(op, name, t, x, each)
    if residual is not None:
        _check_tensor(op, "residual", residual, x, (tuple(x.shape),))
        if residual.dtype != x.dtype:
            raise TypeError(
                f"{op}: residual must have the dtype of x {x.dtype}, got {residual.dtype}"
            )
    elif gate is not None:
        raise ValueError(f"{op}: gate must be None without a residual, got {_kind(gate)}")


def _one_dtype(*group: torch.Tensor | None) -> list[torch.Tensor | None]:
    """All in one dtype that holds each, the channels of a token side by side."""
    found = [t.dtype for t in group if t is not None]
    wide = found[0] if found else torch.float32
    for dtype in found[1:]:
        wide = torch.promote_types(wide, dtype)
    converted = (t if t is None else t.to(wide) for t in group)
    return [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in converted]


def arrange(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    norm: str | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
    eps: float,
    modulated: bool,
) -> Modulate:
    """The call that backends get: contiguous tokens, groups of one dtype, the results allocated."""
    x = x.contiguous()
    scale, shift, gate = _one_dtype(scale, shift, gate)
    weight, bias = _one_dtype(weight, bias)
    out = torch.empty_like(x) if modulated else None
    total = None
    if residual is not None:
        residual = residual.contiguous()
        total = torch.empty_like(x)
    return Modulate(x, scale, shift, norm, weight, bias, residual, gate, float(eps), out, total)
