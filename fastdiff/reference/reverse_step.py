"""One row of a solver's table in plain PyTorch: the definition of the arithmetic.

The order of the float32 operations is the contract: kernels give the same bits.
"""

from __future__ import annotations

import numpy as np
import torch

from fastdiff.reference.noise import normals
from fastdiff.table import (
    COUNTER1,
    EVALUATES,
    FLAGS,
    LEARNED_VARIANCE,
    LV_SCALE,
    LV_SHIFT,
    PUSH,
    PUSH_D,
    PUSH_X,
    STREAM1,
    TERMS,
    A,
    B,
    P,
    Q,
)


def guide(cond: torch.Tensor, uncond: torch.Tensor, weight: torch.Tensor | float) -> torch.Tensor:
    """Classifier-free guidance, ``u + w (c - u)`` (Ho and Salimans 2022); weight 1 is c itself."""
    guided = uncond + weight * (cond - uncond)
    if isinstance(weight, torch.Tensor):
        return torch.where(weight == 1, cond, guided)
    return cond if weight == 1 else guided


def polynomial_exp(x: torch.Tensor) -> torch.Tensor:
    """exp in float32 by multiplications and additions, the same bits as ``fd_exp`` in step.h.

    Saturates at exp(-86) and exp(88); NaN passes through. Other dtypes: ``torch.exp``.
    """
    if x.dtype != torch.float32:
        return torch.exp(x.clamp(-86.0, 88.0))
    c = x.clamp(-86.0, 88.0)
    shifted = c * 1.4426950216293335 + 12582912.0
    k = shifted - 12582912.0
    r = (c - k * 0.693359375) - k * -2.12194440e-4
    q = torch.full_like(r, 0.0013814539415761828)
    for coefficient in (
        0.00836874544620514,
        0.04166838899254799,
        0.1666652113199234,
        0.4999999403953552,
    ):
        q = q * r + coefficient
    scale = ((shifted.view(torch.int32) - (0x4B400000 - 127)) << 23).view(torch.float32)
    return ((q * (r * r) + r) + 1.0) * scale


def _combine(
    coefficients: np.ndarray, terms: dict[str, torch.Tensor], like: torch.Tensor
) -> torch.Tensor:
    total = torch.zeros_like(like)
    for name, c in zip(TERMS, coefficients.tolist(), strict=True):
        if c != 0.0:
            total = total + c * terms[name]
    return total


def reference_row(
    row: np.ndarray,
    info: np.ndarray,
    x: torch.Tensor,
    *,
    output: torch.Tensor | None,
    uncond: torch.Tensor | None,
    variance: torch.Tensor | None,
    y: torch.Tensor | None,
    history: list[torch.Tensor],
    seeds: np.ndarray,
    guidance: torch.Tensor | float,
    scale: torch.Tensor | float | None = None,
    clip: torch.Tensor | float | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """One row in plain PyTorch, the definition of the arithmetic: x', y' and what is pushed.

    Differentiable; float32 for the bits of the kernels, float64 for an accurate answer.
    """
    terms: dict[str, torch.Tensor] = {"x": x}
    if y is not None:
        terms["y"] = y
    for k, slot in enumerate(history):
        terms[f"h{k}"] = slot
    if info[FLAGS] & EVALUATES:
        assert output is not None  # `_check` asked for it
        m = output.to(x.dtype)
        if uncond is not None:
            terms["u"] = uncond.to(x.dtype)
            m = guide(m, terms["u"], guidance)
        if scale is not None:
            m = scale * m
        terms["m"] = m
        d = torch.zeros_like(x)
        for c, t in ((row[P], x), (row[Q], m)):
            if c != 0.0:
                d = d + float(c) * t
        if clip is not None:
            d = torch.where(d < -clip, -clip, torch.where(d > clip, clip, d))
        terms["d"] = d
    for k in (0, 1):
        name = f"n{k + 1}"
        if row[A + TERMS.index(name)] != 0.0 or row[B + TERMS.index(name)] != 0.0:
            stream, counter = (int(i) for i in info[STREAM1 + 2 * k : COUNTER1 + 2 * k + 1])
            drawn = normals(seeds, x[0].numel(), counter, stream)
            n = torch.from_numpy(drawn).view(x.shape).to(x.device, x.dtype)
            if k == 0 and info[FLAGS] & LEARNED_VARIANCE:
                assert variance is not None  # `_check` asked for it
                v = variance.to(x.dtype)
                n = polynomial_exp(float(row[LV_SCALE]) * v + float(row[LV_SHIFT])) * n
            terms[name] = n
    n_terms = len(TERMS)
    new_x = _combine(row[A : A + n_terms], terms, x)
    new_y = _combine(row[B : B + n_terms], terms, x) if row[B : B + n_terms].any() else None
    pushed = None
    if info[PUSH] >= 0:
        pushed = terms["d"]
        e, f = float(row[PUSH_X]), float(row[PUSH_D])
        if (e, f) != (0.0, 1.0):
            pushed = torch.zeros_like(x)
            for c, t in ((e, x), (f, terms["d"])):
                if c != 0.0:
                    pushed = pushed + c * t
    return new_x, new_y, pushed
