"""What `film_norm` and `film` ask of their arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastdiff.ops._checks import (
    check_choice,
    check_eps,
    check_input,
    check_residual,
    check_tensor,
    one_dtype,
)
from fastdiff.ops._layout import memory_format
from fastdiff.ops._results import RESULTS
from fastdiff.reference.film_norm import ACTIVATIONS


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
    check_input(op, x)
    if x.dim() < 2:
        raise ValueError(f"{op}: x must have shape (N, C, *S), got {tuple(x.shape)}")
    n, c = x.shape[:2]
    if op != "film":
        if isinstance(groups, bool) or not isinstance(groups, int):
            raise TypeError(f"{op}: num_groups must be an int, got {type(groups).__name__}")
        if groups < 1 or c % groups:
            raise ValueError(f"{op}: num_groups must divide the {c} channels of x, got {groups}")
        check_eps(op, eps)
    for name, t in (("weight", weight), ("bias", bias)):
        check_tensor(op, name, t, x, (c,))
    for name, t in (("scale", scale), ("shift", shift)):
        check_tensor(op, name, t, x, (n, c))
    check_choice(op, "act", act, ACTIVATIONS)
    check_residual(op, residual, x)


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
    out = RESULTS.empty_like(x)
    weight, bias = one_dtype(weight, bias)
    scale, shift = one_dtype(scale, shift)
    return FilmNorm(
        x, groups, weight, bias, scale, shift, act, residual, float(eps), plus_one, out, fmt
    )
