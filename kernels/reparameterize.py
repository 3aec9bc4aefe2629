"""Reparameterized sampling with its divergence on Triton, and the gradients of both.

Forward reads mu and logvar, writes z; backward reads them and grad_z, writes two gradients and
draws the noise again instead of loading it. z and the gradients follow csrc/step.h as bits. The
divergence is a sum: float32 inside a tile, float64 over the tiles, in a fixed order and without
atomics, so that two runs agree.
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
    normal_run,
    run_tile,
    signed,
    store_float,
    tiles,
)

from fastdiff.ops.reparameterize import Reparameterize, ReparameterizeBackward

_SUM_BLOCK = 1024


@triton.jit(do_not_specialize=["step", "stream"])
def reparameterize_kernel(
    mu,
    logvar,
    seeds,
    step,
    stream,
    z,
    partial,
    size,
    count,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """WHOLE: a sample is one tile, and ``partial`` is the divergence itself."""
    program = tl.program_id(0)
    sample = program // count
    tile = program % count
    start = sample.to(tl.int64) * size
    offset, mask = run_tile(tile, size, WIDE, BLOCK)
    m = load_float(mu + start + offset, mask)
    lv = load_float(logvar + start + offset, mask)
    eps = normal_run(tl.load(seeds + sample), stream, step, tile, WIDE, BLOCK)
    sd = exp(0.5 * lv)
    store_float(z + start + offset, m + sd * eps, mask)
    # sd^2 - 1 is exact where the variance is near 1, so a posterior at the prior costs no digits
    total = tl.sum(tl.where(mask, m * m + ((sd * sd - 1.0) - lv), 0.0))
    tl.store(partial + program, 0.5 * total if WHOLE else total)


@triton.jit
def sum_kernel(partial, kl, count, BLOCK: tl.constexpr):
    """Half the sum of the partial sums of one sample."""
    sample = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, count, BLOCK):
        mask = first + at < count
        part = tl.load(partial + sample.to(tl.int64) * count + first + at, mask=mask, other=0.0)
        total += part.to(tl.float64)
    tl.store(kl + sample, (0.5 * tl.sum(total)).to(tl.float32))


@triton.jit(do_not_specialize=["step", "stream"])
def reparameterize_backward_kernel(
    grad_z,
    grad_kl,
    mu,
    logvar,
    seeds,
    step,
    stream,
    grad_mu,
    grad_logvar,
    size,
    count,
    THROUGH_Z: tl.constexpr,
    THROUGH_KL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample = program // count
    tile = program % count
    start = sample.to(tl.int64) * size
    offset, mask = run_tile(tile, size, WIDE, BLOCK)
    m = load_float(mu + start + offset, mask)
    lv = load_float(logvar + start + offset, mask)
    # without a gradient through kl its weight is 0, and not left out: a NaN in mu must come through
    k = tl.load(grad_kl + sample) if THROUGH_KL else tl.full((), 0.0, tl.float32)
    sd = exp(0.5 * lv)
    if THROUGH_Z:
        g = load_float(grad_z + start + offset, mask)
        eps = normal_run(tl.load(seeds + sample), stream, step, tile, WIDE, BLOCK)
        to_mu = g + k * m
        to_logvar = 0.5 * (g * (sd * eps) + k * (sd * sd - 1.0))
    else:
        to_mu = k * m
        to_logvar = 0.5 * (k * (sd * sd - 1.0))
    store_float(grad_mu + start + offset, to_mu, mask)
    store_float(grad_logvar + start + offset, to_logvar, mask)


def reparameterize(call: Reparameterize) -> None:
    """Fill ``call.z`` and ``call.kl``."""
    mu, kl = call.mu, call.kl
    if mu.numel() == 0:
        kl.zero_()
        return
    plan = tiles(mu, torch.contiguous_format, by_logical_index=True)
    samples, whole = mu.shape[0], plan.count == 1
    partial = kl if whole else kl.new_empty(samples * plan.count)
    with device_of(mu):
        reparameterize_kernel[(samples * plan.count,)](
            mu,
            call.logvar,
            call.seeds,
            signed(call.step),
            signed(call.stream),
            call.z,
            partial,
            mu[0].numel(),
            plan.count,
            WHOLE=whole,
            WIDE=plan.WIDE,
            BLOCK=plan.BLOCK,
            num_warps=WARPS,
            **EXACT,
        )
        if not whole:
            sum_kernel[(samples,)](partial, kl, plan.count, BLOCK=_SUM_BLOCK, num_warps=4, **EXACT)


def reparameterize_backward(call: ReparameterizeBackward) -> None:
    """Fill ``call.grad_mu`` and ``call.grad_logvar``."""
    mu = call.mu
    if mu.numel() == 0:
        return
    plan = tiles(mu, torch.contiguous_format, by_logical_index=True)
    with device_of(mu):
        reparameterize_backward_kernel[(mu.shape[0] * plan.count,)](
            call.grad_z,
            call.grad_kl,
            mu,
            call.logvar,
            call.seeds,
            signed(call.step),
            signed(call.stream),
            call.grad_mu,
            call.grad_logvar,
            mu[0].numel(),
            plan.count,
            THROUGH_Z=call.grad_z is not None,
            THROUGH_KL=call.grad_kl is not None,
            WIDE=plan.WIDE,
            BLOCK=plan.BLOCK,
            num_warps=WARPS,
            **EXACT,
        )
