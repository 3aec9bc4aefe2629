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
    Tiles,
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


@triton.jit
def _clamp(x, low, high):
    """As `fd_clamp` of csrc/step.h: NaN passes through."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit(do_not_specialize=["step", "stream"])
def reparameterize_kernel(
    mu,
    logvar,
    seeds,
    step,
    stream,
    low,
    high,
    draws,
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
    lv = _clamp(load_float(logvar + start + offset, mask), low, high)
    sd = exp(0.5 * lv)
    seed = tl.load(seeds + sample)
    to = z + start * draws
    first = tl.zeros((), tl.int64) if WIDE else tl.zeros((), tl.int32)
    for _ in range(draws):
        eps = normal_run(seed, stream, step, tile, WIDE, BLOCK, first)
        store_float(to + offset, m + sd * eps, mask)
        to += size
        first += tl.cdiv(size, 4)
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
    low,
    high,
    draws,
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
    sd = exp(0.5 * _clamp(lv, low, high))
    to_mu = k * m
    to_logvar = k * (sd * sd - 1.0)
    if THROUGH_Z:
        seed = tl.load(seeds + sample)
        given = grad_z + start * draws
        first = tl.zeros((), tl.int64) if WIDE else tl.zeros((), tl.int32)
        total = tl.zeros((BLOCK,), tl.float32)
        weighted = total
        for j in range(draws):
            g = load_float(given + offset, mask)
            eps = normal_run(seed, stream, step, tile, WIDE, BLOCK, first)
            # not 0 + g, which would turn -0 into 0
            total = tl.where(j == 0, g, total + g)
            weighted = tl.where(j == 0, g * (sd * eps), weighted + g * (sd * eps))
            given += size
            first += tl.cdiv(size, 4)
        to_mu = total + to_mu
        to_logvar = weighted + to_logvar
    to_logvar = tl.where((lv < low) | (lv > high), 0.0, 0.5 * to_logvar)
    store_float(grad_mu + start + offset, to_mu, mask)
    store_float(grad_logvar + start + offset, to_logvar, mask)


def _plan(mu: torch.Tensor, draws: int) -> Tiles:
    plan = tiles(mu, torch.contiguous_format, by_logical_index=True)
    # the draws of a sample count their blocks on
    return plan._replace(WIDE=plan.WIDE or draws * (mu[0].numel() + 4) >= 2**31)


def reparameterize(call: Reparameterize) -> None:
    """Fill ``call.z`` and ``call.kl``."""
    mu, kl = call.mu, call.kl
    if mu.numel() == 0:
        kl.zero_()
        return
    plan = _plan(mu, call.draws)
    samples, whole = mu.shape[0], plan.count == 1
    partial = kl if whole else kl.new_empty(samples * plan.count)
    with device_of(mu):
        reparameterize_kernel[(samples * plan.count,)](
            mu,
            call.logvar,
            call.seeds,
            signed(call.step),
            signed(call.stream),
            call.low,
            call.high,
            call.draws,
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
    plan = _plan(mu, call.draws)
    with device_of(mu):
        reparameterize_backward_kernel[(mu.shape[0] * plan.count,)](
            call.grad_z,
            call.grad_kl,
            mu,
            call.logvar,
            call.seeds,
            signed(call.step),
            signed(call.stream),
            call.low,
            call.high,
            call.draws,
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
