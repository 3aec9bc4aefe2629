"""Dynamic thresholding: a quantile of each sample, and the sample limited and divided by it.

Saharia et al. 2022 (arXiv:2205.11487), section 2.3. The quantile is exact and by counting, not by a
sort, in C++ on the CPU. A GPU runs the reference, which is two selections by `torch.kthvalue` and a
few elementwise kernels; what a kernel of its own would gain there has not been measured.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from fastdiff.backends import Implementation, Op, choose
from fastdiff.ops import _native
from fastdiff.ops._checks import check_memory, is_finite
from fastdiff.ops._layout import check_written, memory_format
from fastdiff.ops._results import RESULTS
from fastdiff.reference import dynamic_threshold as reference


class Threshold(NamedTuple):
    """Checked arguments; backends fill ``s`` and, where it is given, ``out``."""

    x: torch.Tensor
    ratio: float
    max_value: float
    s: torch.Tensor
    out: torch.Tensor | None


def _reference(call: Threshold) -> None:
    if len(call.x) == 0:
        return
    if call.out is None:
        call.s.copy_(reference.quantile_abs(call.x, call.ratio))
        return
    out, s = reference.dynamic_threshold(call.x, call.ratio, call.max_value)
    call.s.copy_(s)
    call.out.copy_(out)


def _cpu(call: Threshold) -> None:
    x = call.x
    if len(x) == 0:
        return
    size = x.numel() // len(x)
    rank, weight = reference.position(size, call.ratio)
    limit, out = call.max_value, _native.address(call.out)
    where = (x.data_ptr(), len(x), size)
    _native.extension.dynamic_threshold(*where, rank, weight, limit, call.s.data_ptr(), out)


def _refuse_cpu(call: Threshold) -> str | None:
    x, out = call.x, call.out
    if x.device.type != "cpu":
        return f"x must be on the CPU, got {x.device}"
    if x.dtype != torch.float32:
        return f"x must be float32, got {x.dtype}"
    if memory_format(x) is None or (out is not None and memory_format(out) != memory_format(x)):
        return f"x and out must be contiguous or channels_last alike, got strides {x.stride()}"
    return None


OP = Op(
    "dynamic_threshold",
    {
        "cpu": Implementation(lambda: _cpu, _refuse_cpu),
        "reference": Implementation(lambda: _reference, lambda call: None),
    },
)


def _check(x: Any, ratio: Any, max_value: Any) -> None:
    if not isinstance(x, torch.Tensor) or x.dtype not in (torch.float32, torch.float64):
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"dynamic_threshold: x must be a float32 or float64 tensor, got {got}")
    check_memory("dynamic_threshold", "x", x)
    if x.dim() < 1 or (len(x) and x[0].numel() == 0):
        raise ValueError(
            f"dynamic_threshold: x must have samples with elements, got shape {tuple(x.shape)}"
        )
    check_numbers(ratio, max_value)


def check_numbers(ratio: Any, max_value: Any) -> None:
    """Raises where one of them breaks its rule."""
    for name, value in (("ratio", ratio), ("max_value", max_value)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(
                f"dynamic_threshold: {name} must be a number, got {type(value).__name__}"
            )
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"dynamic_threshold: ratio must lie in [0, 1], got {ratio}")
    if not (max_value == math.inf or (is_finite(max_value, torch.float64) and max_value >= 1.0)):
        raise ValueError(f"dynamic_threshold: max_value must be at least 1, got {max_value}")


def prepare(
    x: torch.Tensor,
    ratio: float = 0.995,
    *,
    max_value: float = math.inf,
    out: torch.Tensor | None = None,
) -> Threshold:
    """The arguments of `dynamic_threshold`, checked, with its outputs allocated."""
    _check(x, ratio, max_value)
    if out is None:
        out = RESULTS.empty_like(x)
        check_memory("dynamic_threshold", "out", out)  # a tracer may have made it
    elif not isinstance(out, torch.Tensor) or (out.shape, out.dtype, out.device) != (
        x.shape,
        x.dtype,
        x.device,
    ):
        raise ValueError("dynamic_threshold: out must have shape, dtype and device of x")
    else:
        check_written("dynamic_threshold", out, x=x)
    return Threshold(x.detach(), float(ratio), float(max_value), x.new_empty(len(x)), out)


def dynamic_threshold(
    x: torch.Tensor,
    ratio: float = 0.995,
    *,
    max_value: float = math.inf,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``clip(x, -s, s) / s`` with s the quantile of abs(x) of each sample, limited to
    [1, max_value].

    Saharia et al. 2022 (arXiv:2205.11487), section 2.3, for a prediction x of clean data in
    [-1, 1]. No gradient. A sample with a NaN becomes NaN.

    Args:
        x: (N, *S) float32, or float64 (reference backend only).
        ratio: of the quantile, in [0, 1]; between two elements it is interpolated linearly.
        max_value: upper bound of s; diffusers' ``sample_max_value``, whose default of 1 is plain
            clipping to [-1, 1].
        out: written and returned if given; may be ``x``.

    Returns:
        (N, *S) the thresholded samples, and (N,) their s.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
        BackendError: the forced backend cannot do it.
    """
    call = prepare(x, ratio, max_value=max_value, out=out)
    choose(OP, call)[1](call)
    assert call.out is not None  # as prepared
    return call.out, call.s


def quantile_abs(x: torch.Tensor, ratio: float) -> torch.Tensor:
    """(N,) quantile of abs(x) of each sample of (N, *S): exact, of any size, without a sort.

    Equal to ``torch.quantile(x.double().flatten(1).abs(), ratio, dim=1)`` rounded to x's dtype; in
    float32 torch.quantile itself rounds the rank too. Arguments and errors: as `dynamic_threshold`.
    """
    _check(x, ratio, math.inf)
    call = Threshold(x.detach(), float(ratio), math.inf, x.new_empty(len(x)), None)
    choose(OP, call)[1](call)
    return call.s
