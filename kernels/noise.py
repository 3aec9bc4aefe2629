"""Unit normals of a batch on Triton: writes each element once, reads nothing but the seeds."""

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
from fastdiff.ops.noise import Draw


@triton.jit(do_not_specialize=["step", "stream"])
def noise_kernel(
    out,
    seeds,
    step,
    stream,
    size,
    count,
    channels,
    pixels,
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
    to = out + sample.to(tl.int64) * size
    if CHANNELS_LAST:
        pixel, c, block, high = pixel_tile(tile, channels, pixels, SHIFTED, WIDE, BLOCK, BLOCK_C)
        z0, z1, z2, z3 = normal4(seed, stream, step, block, high)
        for k in tl.static_range(4):
            offset, mask = pixel_offset(pixel + k, c, channels, pixels)
            store_float(to + offset, z0 if k == 0 else z1 if k == 1 else z2 if k == 2 else z3, mask)
    else:
        offset, mask = run_tile(tile, size, WIDE, BLOCK)
        store_float(to + offset, normal_run(seed, stream, step, tile, WIDE, BLOCK), mask)


def noise(draw: Draw) -> None:
    """Fill ``draw.out``."""
    out = draw.out
    if out.numel() == 0:
        return
    fmt = memory_format(out)
    assert fmt is not None  # the op refuses other layouts
    plan = tiles(out, fmt, by_logical_index=True)
    with device_of(out):
        noise_kernel[(out.shape[0] * plan.count,)](
            out,
            draw.seeds,
            signed(draw.step),
            signed(draw.stream),
            out[0].numel(),
            plan.count,
            plan.channels,
            plan.pixels,
            **plan.flags,
            num_warps=WARPS,
            **EXACT,
        )
