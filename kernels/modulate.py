"""Gated residual, normalisation and modulation of tokens on Triton.

A program takes one token, or several short ones. A token that fits a tile is read once and kept in
registers; a longer one is read again for each pass. The sums are taken in float32 in an order that
depends on the shape alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastdiff.kernels._common import EXACT, device_of, load_float, store_float

from fastdiff.ops._modulate_checks import Modulate, strides, tokens
from fastdiff.reference.modulate import NORMS

_TILE = 1024  # elements of a program with several tokens
_WIDEST = 8192  # channels that a program keeps
_NARROW = 2**31 - 2 * _WIDEST  # channels, with those of a tile behind them, that 32 bits number


@triton.jit
def _total(x, residual, gate, total, start, film, c, mask, STORE: tl.constexpr):
    """x + gate * residual of a tile; zero outside the mask."""
    t = load_float(x + start + c, mask)
    if residual is not None:
        h = load_float(residual + start + c, mask)
        if gate is not None:
            h = load_float(gate + film + c, mask) * h
        t = t + h
        if STORE:
            store_float(total + start + c, t, mask)
    return tl.where(mask, t, 0.0)


@triton.jit
def modulate_kernel(
    x,
    residual,
    scale,
    scale_sample,
    scale_token,
    shift,
    shift_sample,
    shift_token,
    gate,
    gate_sample,
    gate_token,
    weight,
    bias,
    eps,
    rows,
    length,
    channels,
    out,
    total,
    NORM: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """NORM: position in NORMS; WHOLE: a token is one tile of ROWS by BLOCK elements."""
    if WIDE:
        channels = channels.to(tl.int64)  # and with it what runs up to them
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    there = row < rows
    sample = row // length
    token = row % length
    start = row * channels
    g_at = sample * gate_sample + token * gate_token
    at = tl.arange(0, BLOCK)[None, :]
    mean = tl.zeros((ROWS, 1), tl.float32)
    rest = tl.zeros((ROWS, 1), tl.float32)
    one = tl.full((ROWS, 1), 1.0, tl.float32)
    share = tl.div_rn(tl.full((), 1.0, tl.float32), tl.full((), 1.0, tl.float32) * channels)
    rstd = one
    if WHOLE:
        mask = there & (at < channels)
        t = _total(x, residual, gate, total, start, g_at, at, mask, True)
        if NORM != 0 and out is not None:
            if NORM == 1:
                mean = (tl.sum(t, axis=1) * share)[:, None]
            d = tl.where(mask, t - mean, 0.0)
            if NORM == 1:
                # what the rounded mean leaves: one far above the deviation costs no digits
                rest = (tl.sum(d, axis=1) * share)[:, None]
            variance = (tl.sum(d * d, axis=1) * share)[:, None] - rest * rest
            # below zero by a rounding alone; a NaN must stay
            variance = tl.where(variance < 0.0, 0.0, variance)
            rstd = tl.div_rn(one, tl.sqrt_rn(variance + eps))
    elif NORM != 0 and out is not None:
        if NORM == 1:
            sums = tl.zeros((ROWS, BLOCK), tl.float32)
            for first in range(0, channels, BLOCK):
                c = first + at
                mask = there & (c < channels)
                sums += _total(x, residual, gate, total, start, g_at, c, mask, False)
            mean = (tl.sum(sums, axis=1) * share)[:, None]
        sums = tl.zeros((ROWS, BLOCK), tl.float32)
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in range(0, channels, BLOCK):
            c = first + at
            mask = there & (c < channels)
            d = _total(x, residual, gate, total, start, g_at, c, mask, False) - mean
            d = tl.where(mask, d, 0.0)
            sums += d
            squares += d * d
        if NORM == 1:
            rest = (tl.sum(sums, axis=1) * share)[:, None]
        variance = (tl.sum(squares, axis=1) * share)[:, None] - rest * rest
        variance = tl.where(variance < 0.0, 0.0, variance)
        rstd = tl.div_rn(one, tl.sqrt_rn(variance + eps))
    for first in range(0, BLOCK if WHOLE else channels, BLOCK):
        c = first + at
        mask = there & (c < channels)
        if not WHOLE:
            t = _total(x, residual, gate, total, start, g_at, c, mask, True)
        if out is not None:
            y = ((t - mean) - rest) * rstd
            if weight is not None:
                y = y * load_float(weight + c, c < channels)
            if bias is not None:
                y = y + load_float(bias + c, c < channels)
            if scale is not None:
                s_at = sample * scale_sample + token * scale_token
                y = y * (1.0 + load_float(scale + s_at + c, mask))
            if shift is not None:
                h_at = sample * shift_sample + token * shift_token
                y = y + load_float(shift + h_at + c, mask)
            store_float(out + start + c, y, mask)


def modulate(call: Modulate) -> None:
    """Fill ``call.out`` and ``call.total``."""
    x = call.x
    if x.numel() == 0:
        return
    samples, length, channels = tokens(x)
    rows = samples * length
    block = min(triton.next_power_of_2(channels), _WIDEST)
    together = min(max(1, _TILE // block), triton.next_power_of_2(rows))
    with device_of(x):
        modulate_kernel[(triton.cdiv(rows, together),)](
            x,
            call.residual,
            call.scale,
            *strides(call.scale),
            call.shift,
            *strides(call.shift),
            call.gate,
            *strides(call.gate),
            call.weight,
            call.bias,
            call.eps,
            rows,
            length,
            channels,
            call.out,
            call.total,
            NORM=NORMS.index(call.norm),
            WHOLE=channels <= block,
            WIDE=channels > _NARROW,
            ROWS=together,
            BLOCK=block,
            num_warps=4 if block <= 2048 else 8,
            **EXACT,
        )
