"""What `film_norm` and `film` ask of their arguments."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fastdiff.ops._layout import memory_format
from fastdiff.reference.film_norm import ACTIVATIONS

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class FilmNorm(NamedTuple):
    """Checked arguments; backends fill ``out``.

    x, residual and out share one shape (N, C, *S), one memory order (``format``) and one dtype;
    weight and bias are contiguous (C,) of one dtype; scale and shift are (N, C) of one dtype whose
    last axis has stride 1. ``groups`` is 0 without a normalisation.
    """

    x: torch.Tensor
    groups: int
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    scale: torch.Tensor | None
    shift: torch.Tensor | None
    act: str | None
    residual: torch.Tensor | None
    eps: float
    plus_one: bool
    out: torch.Tensor
    format: torch.memory_format


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


def check_tensor(op: str, name: str, t: object, x: torch.Tensor, shape: tuple[int, ...]) -> None:
    """A floating-point tensor of that shape on the device of x."""
    if not isinstance(t, torch.Tensor) or t.dtype not in _DTYPES:
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {_kind(t)}")
    if tuple(t.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(t.shape)}")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} must be on the device of x {x.device}, got {t.device}")


def check(
    op: str,
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    act: str | None,
    residual: torch.Tensor | None,
    eps: float,
) -> None:
    if not isinstance(x, torch.Tensor) or x.dtype not in _DTYPES:
        raise TypeError(
            f"{op}: x must be a float32, bfloat16, float16 or float64 tensor, got {_kind(x)}"
        )
    if x.dim() < 2:
        raise ValueError(f"{op}: x must have shape (N, C, *S), got {tuple(x.shape)}")
    n, c = x.shape[:2]
    if op != "film":
        if isinstance(groups, bool) or not isinstance(groups, int):
            raise TypeError(f"{op}: num_groups must be an int, got {type(groups).__name__}")
        if groups < 1 or c % groups:
            raise ValueError(f"{op}: num_groups must divide the {c} channels of x, got {groups}")
        if isinstance(eps, bool) or not isinstance(eps, (int, float)):
            raise TypeError(f"{op}: eps must be a number, got {type(eps).__name__}")
        if not (math.isfinite(eps) and eps >= 0):
            raise ValueError(f"{op}: eps must be finite and not negative, got {eps}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            check_tensor(op, name, t, x, (c,))
    for name, t in (("scale", scale), ("shift", shift)):
        if t is not None:
            check_tensor(op, name, t, x, (n, c))
    if act not in ACTIVATIONS:
        names = ", ".join(repr(a) for a in ACTIVATIONS)
        raise ValueError(f"{op}: act must be one of {names}, got {act!r}")
    if residual is not None:
        check_tensor(op, "residual", residual, x, tuple(x.shape))
        if residual.dtype != x.dtype:
            raise TypeError(
                f"{op}: residual must have the dtype of x {x.dtype}, got {residual.dtype}"
            )


def _pair(
    a: torch.Tensor | None, b: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Both in one dtype that holds either, entries of a row side by side."""
    dtypes = {t.dtype for t in (a, b) if t is not None}
    if len(dtypes) == 2:
        wide = torch.promote_types(*dtypes)
        a, b = (t if t is None else t.to(wide) for t in (a, b))
    return tuple(t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (a, b))  # type: ignore[return-value]


def arrange(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    act: str | None,
    residual: torch.Tensor | None,
    eps: float,
    plus_one: bool,
) -> FilmNorm:
    """The call that backends get: one memory order, pairs of one dtype, the result allocated."""
    fmt = memory_format(x)
    if fmt is None:
        fmt = torch.contiguous_format
        x = x.contiguous()
    if residual is not None:
        residual = residual.contiguous(memory_format=fmt)
    out = torch.empty_like(x)
    pairs = (*_pair(weight, bias), *_pair(scale, shift))
    return FilmNorm(x, groups, *pairs, act, residual, float(eps), plus_one, out, fmt)
