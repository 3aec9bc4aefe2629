"""What `modulate` and `gated_residual` ask of their arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastdiff.ops._checks import (
    check_choice,
    check_eps,
    check_input,
    check_residual,
    check_tensor,
    kind,
    one_dtype,
)
from fastdiff.ops._results import RESULTS
from fastdiff.reference.modulate import NORMS


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
    check_input(op, x)
    if x.dim() not in (2, 3):
        raise ValueError(f"{op}: x must have shape (N, L, C) or (N, C), got {tuple(x.shape)}")
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: x must have at least one channel, got {tuple(x.shape)}")
    check_choice(op, "norm", norm, NORMS)
    check_eps(op, eps)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and norm is None:
            raise ValueError(f"{op}: {name} must be None without a norm, got {kind(t)}")
        check_tensor(op, name, t, x, tuple(x.shape[-1:]))
    each = ((x.shape[0], x.shape[-1]), tuple(x.shape))
    for name, t in (("scale", scale), ("shift", shift), ("gate", gate)):
        check_tensor(op, name, t, x, *each)
    check_residual(op, residual, x)
    if residual is None and gate is not None:
        raise ValueError(f"{op}: gate must be None without a residual, got {kind(gate)}")


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
    scale, shift, gate = one_dtype(scale, shift, gate)
    weight, bias = one_dtype(weight, bias)
    out = RESULTS.empty_like(x) if modulated else None
    total = None
    if residual is not None:
        residual = residual.contiguous()
        total = RESULTS.empty_like(x)
    return Modulate(x, scale, shift, norm, weight, bias, residual, gate, float(eps), out, total)
