"""Increments of a Brownian path on Triton: a weighted sum of normals, and x + scale * sum."""

from __future__ import annotations

import triton
import triton.language as tl
from fastdiff.kernels._common import (
    EXACT,
    WARPS,
    device_of,
    normal4,
    normal_run,
    pixel_offset,
    pixel_tile,
    run_tile,
    signed,
    store_float,
    tiles,
)

from fastdiff.ops._layout import memory_format
from fastdiff.ops.brownian import Increment


@triton.jit
def _finish(x, start, offset, mask, scale, total, ADD: tl.constexpr):
    if ADD:
        return tl.load(x + start + offset, mask=mask) + scale * total
    return total


@triton.jit(do_not_specialize=["draws", "stream"])
def brownian_kernel(
    out,
    x,
    seeds,
    counters,
    weights,
    draws,
    stream,
    scale,
    size,
    count,
    channels,
    pixels,
    ADD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SHIFTED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    sample = program // count
    tile = program % count
    seed = tl.load(seeds + sample)
    start = sample.to(tl.int64) * size
    if CHANNELS_LAST:
        pixel, c, block, high = pixel_tile(tile, channels, pixels, SHIFTED, WIDE, BLOCK, BLOCK_C)
        s0 = tl.zeros(block.shape, tl.float32)
        s1, s2, s3 = s0, s0, s0
        for k in range(draws):
            z0, z1, z2, z3 = normal4(seed, stream, tl.load(counters + k), block, high)
            weight = tl.load(weights + k)
            s0 = s0 + weight * z0
            s1 = s1 + weight * z1
            s2 = s2 + weight * z2
            s3 = s3 + weight * z3
        for j in tl.static_range(4):
            offset, mask = pixel_offset(pixel + j, c, channels, pixels)
            total = s0 if j == 0 else s1 if j == 1 else s2 if j == 2 else s3
            value = _finish(x, start, offset, mask, scale, total, ADD)
            store_float(out + start + offset, value, mask)
    else:
        total = tl.zeros((BLOCK,), tl.float32)
        for k in range(draws):
            z = normal_run(seed, stream, tl.load(counters + k), tile, WIDE, BLOCK)
            total = total + tl.load(weights + k) * z
        offset, mask = run_tile(tile, size, WIDE, BLOCK)
        value = _finish(x, start, offset, mask, scale, total, ADD)
        store_float(out + start + offset, value, mask)


def brownian(call: Increment) -> None:
    """Fill ``call.out``."""
    out = call.out
    if out.numel() == 0:
        return
    fmt = memory_format(out)
    assert fmt is not None  # the op refuses other layouts
    plan = tiles(out, fmt, by_logical_index=True)
    with device_of(out):
        brownian_kernel[(out.shape[0] * plan.count,)](
            out,
            call.x,
            call.seeds,
            call.counters,
            call.weights,
            len(call.counters),
            signed(call.stream),
            float(call.scale),
            out[0].numel(),
            plan.count,
            plan.channels,
            plan.pixels,
            ADD=call.x is not None,
            **plan.flags,
            num_warps=WARPS,
            **EXACT,
        )
