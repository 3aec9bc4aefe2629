"""The forward process and its training target on Triton: one pass, the noise in registers."""

from __future__ import annotations

import triton
import triton.language as tl
from fastdiff.kernels._common import (
    EXACT,
    WARPS,
    device_of,
    load_float,
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
from fastdiff.ops.add_noise import AddNoise


@triton.jit
def _mix(x0, x, target, offset, mask, alpha, sigma, eps, TARGET: tl.constexpr):
    clean = load_float(x0 + offset, mask)
    store_float(x + offset, alpha * clean + sigma * eps, mask)
    if TARGET == "epsilon":
        store_float(target + offset, eps, mask)
    elif TARGET == "v_prediction":
        store_float(target + offset, alpha * eps - sigma * clean, mask)
    elif TARGET == "flow":
        store_float(target + offset, eps - clean, mask)


@triton.jit(do_not_specialize=["step", "stream"])
def add_noise_kernel(
    x0,
    alpha,
    sigma,
    seeds,
    step,
    stream,
    x,
    target,
    size,
    count,
    channels,
    pixels,
    TARGET: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SHIFTED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """TARGET: "sample" writes none, and ``target`` is None."""
    program = tl.program_id(0)
    sample = program // count
    tile = program % count
    seed = tl.load(seeds + sample)
    a = tl.load(alpha + sample)
    s = tl.load(sigma + sample)
    start = sample.to(tl.int64) * size
    if CHANNELS_LAST:
        pixel, c, block, high = pixel_tile(tile, channels, pixels, SHIFTED, WIDE, BLOCK, BLOCK_C)
        z0, z1, z2, z3 = normal4(seed, stream, step, block, high)
        for k in tl.static_range(4):
            offset, mask = pixel_offset(pixel + k, c, channels, pixels)
            eps = z0 if k == 0 else z1 if k == 1 else z2 if k == 2 else z3
            _mix(x0, x, target, start + offset, mask, a, s, eps, TARGET)
    else:
        offset, mask = run_tile(tile, size, WIDE, BLOCK)
        eps = normal_run(seed, stream, step, tile, WIDE, BLOCK)
        _mix(x0, x, target, start + offset, mask, a, s, eps, TARGET)


def add_noise(call: AddNoise) -> None:
    """Fill ``call.x`` and ``call.wanted``."""
    x = call.x
    if x.numel() == 0:
        return
    fmt = memory_format(x)
    assert fmt is not None  # the op makes no other
    plan = tiles(x, fmt, by_logical_index=True)
    with device_of(x):
        add_noise_kernel[(x.shape[0] * plan.count,)](
            call.x0,
            call.alpha,
            call.sigma,
            call.seeds,
            signed(call.step),
            signed(call.stream),
            x,
            call.wanted,
            x[0].numel(),
            plan.count,
            plan.channels,
            plan.pixels,
            TARGET=call.target,
            **plan.flags,
            num_warps=WARPS,
            **EXACT,
        )
