"""One row of a StepTable on Triton: reads each present input once, writes each output once.

Accumulates in float32 in the order of csrc/step.h: bits, not tolerances. Terms that a row lacks are
compiled out where all samples share the row, and masked out (not read) where each has its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastdiff.kernels._common import (
    EXACT,
    WARPS,
    device_of,
    exp,
    load_float,
    normal4,
    normal_run,
    pixel_offset,
    pixel_tile,
    run_tile,
    store_float,
    tiles,
)

from fastdiff import table
from fastdiff.ops._presence import presence
from fastdiff.ops._step_checks import Step

_P: tl.constexpr = tl.constexpr(table.P)
_Q: tl.constexpr = tl.constexpr(table.Q)
_A: tl.constexpr = tl.constexpr(table.A)
_B: tl.constexpr = tl.constexpr(table.B)
_C_IN: tl.constexpr = tl.constexpr(table.C_IN)
_LV_SCALE: tl.constexpr = tl.constexpr(table.LV_SCALE)
_PUSH_X: tl.constexpr = tl.constexpr(table.PUSH_X)
_PUSH_D: tl.constexpr = tl.constexpr(table.PUSH_D)
_LV_SHIFT: tl.constexpr = tl.constexpr(table.LV_SHIFT)
_ROW_FLOATS: tl.constexpr = tl.constexpr(table.ROW_FLOATS)
_FLAGS: tl.constexpr = tl.constexpr(table.FLAGS)
_PUSH: tl.constexpr = tl.constexpr(table.PUSH)
_STREAM1: tl.constexpr = tl.constexpr(table.STREAM1)
_COUNTER1: tl.constexpr = tl.constexpr(table.COUNTER1)
_STREAM2: tl.constexpr = tl.constexpr(table.STREAM2)
_COUNTER2: tl.constexpr = tl.constexpr(table.COUNTER2)
_ROW_INTS: tl.constexpr = tl.constexpr(table.ROW_INTS)
_EVALUATES: tl.constexpr = tl.constexpr(table.EVALUATES)
_LEARNED: tl.constexpr = tl.constexpr(table.LEARNED_VARIANCE)

# Terms go by number, as FdTerm in csrc/step.h: the interpreter has no constexpr on the right of >>.
# 0 x, 1 y, 2 m, 3 d, 4 to 7 h0 to h3, 8 n1, 9 n2, 10 u


@triton.jit
def _only(mask, wanted):
    """The mask where the scalar is true, nothing elsewhere."""
    # in the interpreter `mask & wanted` is of 32 bits, and Triton 3.9 takes no such mask
    return tl.where(wanted, mask, tl.zeros_like(mask))


@triton.jit
def _uses(f, TERM: tl.constexpr):
    """Whether the row at `f` has the term, for rows that differ by sample."""
    # compared as bits: the interpreter cannot spread a float comparison over a tile
    a = tl.load(f + _A + TERM).to(tl.int32, bitcast=True)
    b = tl.load(f + _B + TERM).to(tl.int32, bitcast=True)
    return ((a | b) & 0x7FFFFFFF) != 0


@triton.jit
def _plus(total, coefficient, t, ROWS: tl.constexpr):
    if ROWS:
        # an absent term must change no bit, and what stands in for it may be NaN
        return tl.where(coefficient != 0.0, total + coefficient * t, total)
    return total + coefficient * t


@triton.jit
def _add(
    to_x, to_y, f, t, TERM: tl.constexpr, A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr
):
    if (A >> TERM) & 1:
        to_x = _plus(to_x, tl.load(f + _A + TERM), t, ROWS)
    if (B >> TERM) & 1:
        to_y = _plus(to_y, tl.load(f + _B + TERM), t, ROWS)
    return to_x, to_y


@triton.jit(do_not_specialize=["row"])
def reverse_step_kernel(
    x,
    output,
    uncond,
    variance,
    y,
    history,
    floats,
    ints,
    rows,
    row,
    seeds,
    guidance,
    scale,
    clip,
    out,
    model_input,
    size,
    count,
    channels,
    pixels,
    output_stride,
    uncond_stride,
    variance_stride,
    history_stride,
    ROWS: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    PUSH: tl.constexpr,
    PUSH_X: tl.constexpr,
    PUSH_D: tl.constexpr,
    GUIDED: tl.constexpr,
    SCALED: tl.constexpr,
    LEARNED: tl.constexpr,
    CLIP: tl.constexpr,
    EACH_GUIDANCE: tl.constexpr,
    EACH_CLIP: tl.constexpr,
    MODEL_INPUT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SHIFTED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    USED: tl.constexpr = A | B
    N1: tl.constexpr = (USED >> 8) & 1
    N2: tl.constexpr = (USED >> 9) & 1
    U: tl.constexpr = (USED >> 10) & 1
    CONVERTS: tl.constexpr = PUSH_D or ((USED >> 3) & 1) != 0
    READS_X: tl.constexpr = P or PUSH_X or ((USED >> 0) & 1) != 0
    READS_M: tl.constexpr = Q or ((USED >> 2) & 1) != 0

    program = tl.program_id(0)
    sample = program // count
    tile = program % count
    start = sample.to(tl.int64) * size
    one = tl.full((), 1, tl.int64)  # strides of 32 bits times a slot may need more
    index = tl.load(rows + sample) if ROWS else row
    f = floats + index * _ROW_FLOATS
    info = ints + index * _ROW_INTS

    # What this row reads and writes: known at compile time, or asked of the row.
    if ROWS:
        flags = tl.load(info + _FLAGS)
        evaluates = (flags & _EVALUATES) != 0
        learned = (flags & _LEARNED) != 0
        if B != 0:
            bits = tl.load(f + _B).to(tl.int32, bitcast=True)
            for k in tl.static_range(1, 11):
                bits = bits | tl.load(f + _B + k).to(tl.int32, bitcast=True)
            writes_y = (bits & 0x7FFFFFFF) != 0
    if GUIDED:
        weight = tl.load(guidance + sample) if EACH_GUIDANCE else tl.full((), guidance, tl.float32)
    if CLIP:
        bound = tl.load(clip + sample) if EACH_CLIP else tl.full((), clip, tl.float32)
    if SCALED:
        factor = tl.load(scale + sample)
    if PUSH:
        slot = tl.load(info + _PUSH)
        if ROWS:
            # (0, 1) pushes d itself, bit for bit; as bits: see _uses
            e = tl.load(f + _PUSH_X).to(tl.int32, bitcast=True)
            plain = ((e & 0x7FFFFFFF) == 0) & (
                tl.load(f + _PUSH_D).to(tl.int32, bitcast=True) == 0x3F800000
            )

    # Draws, one Philox call for four elements. Of two nested `if`, the outer one is the compiler's
    # and the inner one, where samples have their own rows, the kernel's.
    if N1 or N2:
        seed = tl.load(seeds + sample)
        if CHANNELS_LAST:
            pixel, c, block, high = pixel_tile(
                tile, channels, pixels, SHIFTED, WIDE, BLOCK, BLOCK_C
            )
            if ROWS:  # the branches below must not leave these undefined
                a0 = tl.zeros(block.shape, tl.float32)
                a1, a2, a3, b0, b1, b2, b3 = a0, a0, a0, a0, a0, a0, a0
            if N1:  # noqa: SIM102
                if _uses(f, 8) if ROWS else True:
                    a0, a1, a2, a3 = normal4(
                        seed, tl.load(info + _STREAM1), tl.load(info + _COUNTER1), block, high
                    )
            if N2:  # noqa: SIM102
                if _uses(f, 9) if ROWS else True:
                    b0, b1, b2, b3 = normal4(
                        seed, tl.load(info + _STREAM2), tl.load(info + _COUNTER2), block, high
                    )
        else:
            if ROWS:
                a0 = tl.zeros((BLOCK,), tl.float32)
                b0 = a0
            if N1:  # noqa: SIM102
                if _uses(f, 8) if ROWS else True:
                    a0 = normal_run(
                        seed, tl.load(info + _STREAM1), tl.load(info + _COUNTER1), tile, WIDE, BLOCK
                    )
            if N2:  # noqa: SIM102
                if _uses(f, 9) if ROWS else True:
                    b0 = normal_run(
                        seed, tl.load(info + _STREAM2), tl.load(info + _COUNTER2), tile, WIDE, BLOCK
                    )

    for k in tl.static_range(4 if CHANNELS_LAST else 1):
        if CHANNELS_LAST:
            offset, mask = pixel_offset(pixel + k, c, channels, pixels)
        else:
            offset, mask = run_tile(tile, size, WIDE, BLOCK)

        # Loads first, so that they are under way together.
        if READS_X:
            tx = tl.load(x + start + offset, mask=mask)
        if READS_M:
            on = _only(mask, evaluates) if ROWS else mask
            m = load_float(output + sample.to(tl.int64) * output_stride + offset, on)
        if GUIDED or U:
            on = _only(mask, evaluates) if ROWS else mask
            if ROWS:
                wanted = _uses(f, 10)
                if GUIDED:
                    wanted = wanted | (weight.to(tl.int32, bitcast=True) != 0x3F800000)
                on = _only(on, wanted)
            u = load_float(uncond + sample.to(tl.int64) * uncond_stride + offset, on)
        if LEARNED:
            on = _only(mask, learned & _uses(f, 8)) if ROWS else mask
            v = load_float(variance + sample.to(tl.int64) * variance_stride + offset, on)
        if (USED >> 1) & 1:
            on = _only(mask, _uses(f, 1)) if ROWS else mask
            ty = tl.load(y + start + offset, mask=on)
        if (USED >> 4) & 1:
            on = _only(mask, _uses(f, 4)) if ROWS else mask
            h0 = tl.load(history + start + offset, mask=on)
        if (USED >> 5) & 1:
            on = _only(mask, _uses(f, 5)) if ROWS else mask
            h1 = tl.load(history + one * history_stride + start + offset, mask=on)
        if (USED >> 6) & 1:
            on = _only(mask, _uses(f, 6)) if ROWS else mask
            h2 = tl.load(history + 2 * one * history_stride + start + offset, mask=on)
        if (USED >> 7) & 1:
            on = _only(mask, _uses(f, 7)) if ROWS else mask
            h3 = tl.load(history + 3 * one * history_stride + start + offset, mask=on)

        zero = tl.zeros(offset.shape, tl.float32)
        if GUIDED:
            # weight 1 gives the conditional output itself, as it has alone
            m = tl.where(weight == 1.0, m, u + weight * (m - u))
        if SCALED:
            m = factor * m
        if CONVERTS:
            d = zero
            if P:
                d = _plus(d, tl.load(f + _P), tx, ROWS)
            if Q:
                d = _plus(d, tl.load(f + _Q), m, ROWS)
            if CLIP:
                clipped = tl.where(d < -bound, -bound, tl.where(d > bound, bound, d))
                d = tl.where(bound >= 0.0, clipped, d)
        if N1:
            n1 = a0 if k == 0 else a1 if k == 1 else a2 if k == 2 else a3
            if LEARNED:
                scaled = exp(tl.load(f + _LV_SCALE) * v + tl.load(f + _LV_SHIFT)) * n1
                n1 = tl.where(learned, scaled, n1) if ROWS else scaled
        if N2:
            n2 = b0 if k == 0 else b1 if k == 1 else b2 if k == 2 else b3

        to_x, to_y = zero, zero
        if (USED >> 0) & 1:
            to_x, to_y = _add(to_x, to_y, f, tx, 0, A, B, ROWS)
        if (USED >> 1) & 1:
            to_x, to_y = _add(to_x, to_y, f, ty, 1, A, B, ROWS)
        if (USED >> 2) & 1:
            to_x, to_y = _add(to_x, to_y, f, m, 2, A, B, ROWS)
        if (USED >> 3) & 1:
            to_x, to_y = _add(to_x, to_y, f, d, 3, A, B, ROWS)
        if (USED >> 4) & 1:
            to_x, to_y = _add(to_x, to_y, f, h0, 4, A, B, ROWS)
        if (USED >> 5) & 1:
            to_x, to_y = _add(to_x, to_y, f, h1, 5, A, B, ROWS)
        if (USED >> 6) & 1:
            to_x, to_y = _add(to_x, to_y, f, h2, 6, A, B, ROWS)
        if (USED >> 7) & 1:
            to_x, to_y = _add(to_x, to_y, f, h3, 7, A, B, ROWS)
        if N1:
            to_x, to_y = _add(to_x, to_y, f, n1, 8, A, B, ROWS)
        if N2:
            to_x, to_y = _add(to_x, to_y, f, n2, 9, A, B, ROWS)
        if U:
            to_x, to_y = _add(to_x, to_y, f, u, 10, A, B, ROWS)

        tl.store(out + start + offset, to_x, mask=mask)
        if B != 0:
            tl.store(y + start + offset, to_y, mask=_only(mask, writes_y) if ROWS else mask)
        if PUSH:
            if PUSH == 1:
                pushed = d
            else:
                pushed = zero
                if PUSH_X:
                    pushed = _plus(pushed, tl.load(f + _PUSH_X), tx, ROWS)
                if PUSH_D:
                    pushed = _plus(pushed, tl.load(f + _PUSH_D), d, ROWS)
                if ROWS:
                    pushed = tl.where(plain, d, pushed)
            on = _only(mask, slot >= 0) if ROWS else mask
            to = tl.maximum(slot, 0).to(tl.int64) * history_stride
            tl.store(history + to + start + offset, pushed, mask=on)
        if MODEL_INPUT:
            store_float(model_input + start + offset, tl.load(f + _C_IN) * to_x, mask)


def reverse_step(step: Step) -> None:
    """Write ``out``, ``y``, ``history`` and ``model_input`` of the step."""
    x = step.x
    if x.numel() == 0:
        return
    flags = presence(step)
    plan = tiles(x, step.format, by_logical_index=flags.draws)
    guidance = step.guidance if isinstance(step.guidance, torch.Tensor) else float(step.guidance)
    clip = float(step.clip) if isinstance(step.clip, (int, float)) else step.clip
    with device_of(x):
        reverse_step_kernel[(x.shape[0] * plan.count,)](
            x,
            step.output,
            step.uncond,
            step.variance,
            step.y,
            step.history,
            step.packed.floats,
            step.packed.ints,
            step.rows,
            step.row,
            step.seeds,
            guidance if flags.guided else None,
            step.scale,
            clip if flags.clip else None,
            step.out,
            step.model_input,
            x[0].numel(),
            plan.count,
            plan.channels,
            plan.pixels,
            0 if step.output is None else step.output.stride(0),
            0 if step.uncond is None else step.uncond.stride(0),
            0 if step.variance is None else step.variance.stride(0),
            0 if step.history is None else step.history.stride(0),
            ROWS=step.rows is not None,
            A=flags.a,
            B=flags.b,
            P=flags.p,
            Q=flags.q,
            PUSH=flags.push,
            PUSH_X=flags.push_x,
            PUSH_D=flags.push_d,
            GUIDED=flags.guided,
            SCALED=flags.scaled,
            LEARNED=flags.learned,
            CLIP=flags.clip,
            EACH_GUIDANCE=isinstance(guidance, torch.Tensor),
            EACH_CLIP=isinstance(clip, torch.Tensor),
            MODEL_INPUT=step.model_input is not None,
            **plan.flags,
            num_warps=WARPS,
            **EXACT,
        )
