"""The factor of rescaled guidance on Triton: reads both model outputs once.

Float32 inside a tile, of differences from the first element of the sample, so that a mean costs no
digits; float64 over the tiles, in a fixed order and without atomics, so that two runs agree.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastdiff.kernels._common import (
    EXACT,
    WARPS,
    device_of,
    load_float,
    run_tile,
    tiles,
)

from fastdiff.ops.guidance_rescale import GuidanceRescale

_SUM_BLOCK = 1024


@triton.jit
def _guided(c, u, weight):
    return tl.where(weight == 1.0, c, u + weight * (c - u))


@triton.jit
def guidance_rescale_kernel(
    output,
    uncond,
    guidance,
    partial,
    size,
    count,
    output_stride,
    uncond_stride,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of the differences and of their squares, of both outputs, over one tile."""
    program = tl.program_id(0)
    sample = program // count
    tile = program % count
    weight = tl.load(guidance + sample)
    output += sample.to(tl.int64) * output_stride
    uncond += sample.to(tl.int64) * uncond_stride
    first = load_float(output, tile >= 0)
    base = _guided(first, load_float(uncond, tile >= 0), weight)
    offset, mask = run_tile(tile, size, WIDE, BLOCK)
    c = load_float(output + offset, mask)
    g = _guided(c, load_float(uncond + offset, mask), weight)
    c = tl.where(mask, c - first, 0.0)
    g = tl.where(mask, g - base, 0.0)
    to = partial + program.to(tl.int64) * 4
    tl.store(to, tl.sum(c))
    tl.store(to + 1, tl.sum(c * c))
    tl.store(to + 2, tl.sum(g))
    tl.store(to + 3, tl.sum(g * g))


@triton.jit
def _spread(partial, sample, count, size, PART: tl.constexpr, BLOCK: tl.constexpr):
    """Variance from the sums PART and PART + 1 of every tile."""
    at = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        mask = start + at < count
        here = partial + (sample.to(tl.int64) * count + start + at) * 4 + PART
        sums += tl.load(here, mask=mask, other=0.0).to(tl.float64)
        squares += tl.load(here + 1, mask=mask, other=0.0).to(tl.float64)
    n = tl.full((), 0.0, tl.float64) + size
    mean = tl.sum(sums) / n
    spread = tl.sum(squares) / n - mean * mean
    return tl.where(spread < 0.0, 0.0, spread)  # NaN stays NaN


@triton.jit
def sum_kernel(partial, phi, out, size, count, BLOCK: tl.constexpr):
    """The factor of one sample."""
    sample = tl.program_id(0)
    before = _spread(partial, sample, count, size, 0, BLOCK)
    after = _spread(partial, sample, count, size, 2, BLOCK)
    share = tl.load(phi + sample).to(tl.float64)
    constant = after == 0.0
    ratio = tl.sqrt(before) / tl.sqrt(tl.where(constant, 1.0, after))
    factor = tl.where(constant, 1.0, share * ratio + (1.0 - share))
    tl.store(out + sample, factor.to(tl.float32))


def guidance_rescale(call: GuidanceRescale) -> None:
    """Fill ``call.out``."""
    output, out = call.output, call.out
    if output.numel() == 0:
        out.fill_(1.0)
        return
    plan = tiles(output, torch.contiguous_format, by_logical_index=False)
    samples, size = output.shape[0], output[0].numel()
    partial = out.new_empty(samples * plan.count * 4)
    with device_of(output):
        guidance_rescale_kernel[(samples * plan.count,)](
            output,
            call.uncond,
            call.guidance,
            partial,
            size,
            plan.count,
            output.stride(0),
            call.uncond.stride(0),
            WIDE=plan.WIDE,
            BLOCK=plan.BLOCK,
            num_warps=WARPS,
            **EXACT,
        )
        sum_kernel[(samples,)](
            partial, call.phi, out, size, plan.count, BLOCK=_SUM_BLOCK, num_warps=4, **EXACT
        )
