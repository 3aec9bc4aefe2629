"""GroupNorm, FiLM, activation and residual on Triton: two reads and one write of x.

Statistics are split over space, so that a small batch fills a device too: every program adds up
its pixels channel by channel and writes sums of its own, one writer a slot and no atomics; one
small kernel merges them to the mean and the deviation of each group; the last one reads x again.
Channels need be no power of two, nor a group: nothing but the merge knows groups.

A sum is taken of differences to the mean of the first tile. So a mean far above the deviation does
not cancel (Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance"), and that
mean is off by no more than sqrt(tiles) deviations, whatever the data. For the same reason x is
normalised as (x - high) a + c, where the mean is high + low in float32 and low went into c.

No bits are promised of a mean, so mul and add may contract to fma, unlike in the other kernels.
"""

from __future__ import annotations

from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastdiff.kernels._common import WARPS, device_of, exp, load_float, store_float

from fastdiff.ops._film_checks import FilmNorm

_BLOCK = 2048  # elements of a tile: 16 a thread, two packs of 16 bytes in bfloat16
_PROGRAMS = 1024  # below this many programs a device of 132 multiprocessors is not full
_MAX_TILES = 32  # of one program; bounds what its first tile's mean may be off by
_MERGE = 256  # partial sums that the merge takes at a time
_FUSED: dict[str, Any] = {"enable_fp_fusion": True}
# Numbers that keep their type where they are 1, and no new compilation for each shape.
_NUMBERS = [
    "channel_packs", "pixel_packs", "across", "tiles", "chunks", "groups", "width", "pixels",
    "chunk_pixels", "scale_stride", "shift_stride",
]  # fmt: skip


class Tiles(NamedTuple):
    """How the kernels walk a sample; the fields in capitals are compile-time arguments."""

    across: int  # tiles side by side along the channels
    tiles: int  # tiles of one program, along the pixels
    chunks: int  # programs along the pixels
    LAST: bool
    WIDE: bool
    PACK_C: int  # powers of two that divide the channels and the pixels, known when compiling
    PACK_P: int
    BLOCK_C: int
    BLOCK_P: int

    @property
    def flags(self) -> dict[str, Any]:
        """The compile-time arguments."""
        return {name: value for name, value in self._asdict().items() if name.isupper()}


def plan(n: int, c: int, pixels: int, last: bool) -> Tiles:
    """Tiles of a batch of n samples, which must have elements."""
    if last:
        # the fewest lanes beyond the last channel; among equals the longest run of bytes
        widths = [min(triton.next_power_of_2(c), w) for w in (128, 64, 32)]
        block_c = min(widths, key=lambda w: (-(-c // w) * w, -w))
        block_p = min(triton.next_power_of_2(pixels), _BLOCK // block_c)
    else:
        block_p = min(triton.next_power_of_2(pixels), _BLOCK // 4)
        block_c = min(triton.next_power_of_2(c), _BLOCK // block_p)
    across, down = -(-c // block_c), -(-pixels // block_p)
    tiles = max(1, min(n * across * down // _PROGRAMS, _MAX_TILES, down))
    # room for the masked part of the last tile in 32 bits; a chunk has three sums a channel
    wide = c * max(pixels, 3) > 2**31 - 2**21
    chunks = -(-down // tiles)
    packs = gcd(c, 16), gcd(pixels, 16)
    return Tiles(across, tiles, chunks, last, wide, *packs, block_c, block_p)


# --- tiles ----------------------------------------------------------------------------------


@triton.jit
def _place(across, chunks):
    """Sample, chunk of pixels and tile of channels of this program."""
    program = tl.program_id(0)
    block = program % across
    rest = program // across
    return rest // chunks, rest % chunks, block


@triton.jit
def _whole(packs, WIDE: tl.constexpr, PACK: tl.constexpr):
    """The number of channels, or of pixels, that are so many packs."""
    return packs.to(tl.int64) * PACK if WIDE else packs * PACK


@triton.jit
def _channels_of(block, WIDE: tl.constexpr, BLOCK_C: tl.constexpr):
    """The channels of a tile."""
    return (block.to(tl.int64) if WIDE else block) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _begin(chunk, tiles, WIDE: tl.constexpr, BLOCK_P: tl.constexpr):
    """First pixel of a chunk."""
    return chunk.to(tl.int64) * (tiles * BLOCK_P) if WIDE else chunk * (tiles * BLOCK_P)


@triton.jit
def _spread(t, LAST: tl.constexpr):
    """A value a channel, over a tile."""
    return t[None, :] if LAST else t[:, None]


@triton.jit
def _tile(
    first,
    block,
    channel_packs,
    pixel_packs,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    PACK_C: tl.constexpr,
    PACK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Offsets and mask of the tile that starts at pixel `first`."""
    channels = _whole(channel_packs, WIDE, PACK_C)
    c = _channels_of(block, WIDE, BLOCK_C)
    p = first + tl.arange(0, BLOCK_P)
    pixels = _whole(pixel_packs, WIDE, PACK_P)
    if LAST:
        offset = p[:, None] * channels + c[None, :]
        mask = (p < pixels)[:, None] & (c < channels)[None, :]
    else:
        offset = c[:, None] * pixels + p[None, :]
        mask = (c < channels)[:, None] & (p < pixels)[None, :]
    return offset, mask


# --- statistics -----------------------------------------------------------------------------


@triton.jit(do_not_specialize=_NUMBERS)
def statistics_kernel(
    x,
    partial,
    channel_packs,
    pixel_packs,
    across,
    tiles,
    chunks,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    PACK_C: tl.constexpr,
    PACK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Of each channel of a chunk of pixels: the pivot, and the sums of x - pivot and its square."""
    sample, chunk, block = _place(across, chunks)
    channels = _whole(channel_packs, WIDE, PACK_C)
    pixels = _whole(pixel_packs, WIDE, PACK_P)
    size = channels.to(tl.int64) * pixels
    begin = _begin(chunk, tiles, WIDE, BLOCK_P)
    x += sample.to(tl.int64) * size
    AXIS: tl.constexpr = 0 if LAST else 1
    offset, mask = _tile(
        begin, block, channel_packs, pixel_packs, LAST, WIDE, PACK_C, PACK_P, BLOCK_C, BLOCK_P
    )
    value = tl.where(mask, load_float(x + offset, mask), 0.0)
    count = tl.minimum(pixels - begin, BLOCK_P).to(tl.float32)
    pivot = tl.sum(value, AXIS) / count
    d = tl.where(mask, value - _spread(pivot, LAST), 0.0)
    first = d
    second = d * d
    for i in range(1, tiles):
        offset, mask = _tile(
            begin + i * BLOCK_P, block, channel_packs, pixel_packs,
            LAST, WIDE, PACK_C, PACK_P, BLOCK_C, BLOCK_P,
        )  # fmt: skip
        d = tl.where(mask, load_float(x + offset, mask) - _spread(pivot, LAST), 0.0)
        first += d
        second += d * d
    c = _channels_of(block, WIDE, BLOCK_C)
    at = partial + (sample * chunks + chunk).to(tl.int64) * (3 * channels) + c
    inside = c < channels
    tl.store(at, pivot, mask=inside)
    tl.store(at + channels, tl.sum(first, AXIS), mask=inside)
    tl.store(at + 2 * channels, tl.sum(second, AXIS), mask=inside)


@triton.jit(do_not_specialize=_NUMBERS)
def merge_kernel(
    partial,
    moments,
    groups,
    width,
    pixels,
    chunk_pixels,
    chunks,
    eps,
    WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean (in two parts) and 1 / sqrt(variance + eps) of one group, merged in float64."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
        groups = groups.to(tl.int64)
    sample = program // groups
    channels = groups * width
    base = partial + sample.to(tl.int64) * chunks * (3 * channels) + (program % groups) * width
    origin = tl.load(base).to(tl.float64)
    s1 = tl.zeros((BLOCK_K, BLOCK_C), tl.float64)
    s2 = tl.zeros((BLOCK_K, BLOCK_C), tl.float64)
    for first_k in range(0, chunks, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)
        count = tl.minimum(pixels - k.to(tl.int64) * chunk_pixels, chunk_pixels)
        n = count.to(tl.float64)[:, None]
        for first_c in range(0, width, BLOCK_C):
            c = first_c + tl.arange(0, BLOCK_C)
            mask = (k < chunks)[:, None] & (c < width)[None, :]
            at = base + k.to(tl.int64)[:, None] * (3 * channels) + c[None, :]
            t = tl.load(at, mask=mask, other=0.0).to(tl.float64) - origin
            a = tl.load(at + channels, mask=mask, other=0.0).to(tl.float64)
            b = tl.load(at + 2 * channels, mask=mask, other=0.0).to(tl.float64)
            s1 += tl.where(mask, n * t + a, 0.0)
            s2 += tl.where(mask, n * (t * t) + 2.0 * (t * a) + b, 0.0)
    total = (pixels * width.to(tl.int64)).to(tl.float64)
    off = tl.sum(s1) / total
    mean = origin + off
    high = mean.to(tl.float32)
    # a NaN must stay one, so no maximum: a rounded variance below 0 is one of nearly equal numbers
    variance = tl.sum(s2) / total - off * off
    variance = tl.where(variance < 0.0, 0.0, variance).to(tl.float32)
    tl.store(moments + 3 * program, high)
    tl.store(moments + 3 * program + 1, (mean - high.to(tl.float64)).to(tl.float32))
    tl.store(moments + 3 * program + 2, tl.div_rn(1.0, tl.sqrt_rn(variance + eps)))


# --- application ----------------------------------------------------------------------------


@triton.jit
def _silu(z, APPROXIMATE: tl.constexpr):
    """z / (1 + exp(-z)): NaN at -inf and -0 far below, as PyTorch has it.

    APPROXIMATE: by the device's own exp2 and reciprocal square root, off by some 2^-21 of the
    result, which is nothing before a result of 16 bits.
    """
    if APPROXIMATE:
        root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * z))
        silu = z * (root * root)
    else:
        root = exp(-0.5 * z)  # exp saturates at exp(88), its square overflows as exp does
        silu = tl.div_rn(z, 1.0 + root * root)
    return silu


@triton.jit(do_not_specialize=_NUMBERS)
def apply_kernel(
    x,
    moments,
    weight,
    bias,
    scale,
    shift,
    residual,
    out,
    scale_stride,
    shift_stride,
    channel_packs,
    pixel_packs,
    width,
    across,
    tiles,
    chunks,
    PLUS_ONE: tl.constexpr,
    SILU: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    PACK_C: tl.constexpr,
    PACK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    sample, chunk, block = _place(across, chunks)
    sample = sample.to(tl.int64)
    channels = _whole(channel_packs, WIDE, PACK_C)
    c = _channels_of(block, WIDE, BLOCK_C)
    inside = c < channels
    high = tl.zeros((BLOCK_C,), tl.float32)
    low = high
    a = high + 1.0
    b = high
    if moments is not None:
        at = moments + 3 * (sample * (channels // width) + c // width)
        high = tl.load(at, mask=inside)
        low = tl.load(at + 1, mask=inside)
        a = tl.load(at + 2, mask=inside)
    if weight is not None:
        a *= load_float(weight + c, inside)
    if bias is not None:
        b = load_float(bias + c, inside)
    if scale is not None:
        s = load_float(scale + sample * scale_stride + c, inside)
        if PLUS_ONE:
            s += 1.0
        a *= s
        b *= s
    if shift is not None:
        b += load_float(shift + sample * shift_stride + c, inside)
    b -= low * a
    start = sample * (channels.to(tl.int64) * _whole(pixel_packs, WIDE, PACK_P))
    begin = _begin(chunk, tiles, WIDE, BLOCK_P)
    for i in range(tiles):
        offset, mask = _tile(
            begin + i * BLOCK_P, block, channel_packs, pixel_packs,
            LAST, WIDE, PACK_C, PACK_P, BLOCK_C, BLOCK_P,
        )  # fmt: skip
        z = load_float(x + start + offset, mask)
        if moments is not None:
            z -= _spread(high, LAST)
        z = z * _spread(a, LAST) + _spread(b, LAST)
        if SILU:
            z = _silu(z, x.dtype.element_ty != tl.float32)
        if residual is not None:
            z += load_float(residual + start + offset, mask)
        store_float(out + start + offset, z, mask)


def _stride(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def film_norm(call: FilmNorm) -> None:
    """Fill ``call.out``."""
    x = call.x
    if x.numel() == 0:
        return
    n, c = x.shape[:2]
    pixels = x[0, 0].numel()
    how = plan(n, c, pixels, call.format != torch.contiguous_format)
    packs = c // how.PACK_C, pixels // how.PACK_P
    walk = how.across, how.tiles, how.chunks
    grid = (n * how.across * how.chunks,)
    moments, width = None, c
    with device_of(x):
        if call.groups:
            width = c // call.groups
            partial = x.new_empty(n * how.chunks * 3 * c, dtype=torch.float32)
            moments = x.new_empty(n * call.groups * 3, dtype=torch.float32)
            statistics_kernel[grid](
                x, partial, *packs, *walk, **how.flags, num_warps=WARPS, **_FUSED
            )
            block_c = min(triton.next_power_of_2(width), 64)
            block_k = min(triton.next_power_of_2(how.chunks), _MERGE // block_c)
            merge_kernel[(n * call.groups,)](
                partial,
                moments,
                call.groups,
                width,
                pixels,
                how.tiles * how.BLOCK_P,
                how.chunks,
                call.eps,
                WIDE=how.WIDE or 3 * n * call.groups >= 2**31,
                BLOCK_K=block_k,
                BLOCK_C=block_c,
                num_warps=max(1, min(WARPS, block_c * block_k // 64)),
                **_FUSED,
            )
        apply_kernel[grid](
            x,
            moments,
            call.weight,
            call.bias,
            call.scale,
            call.shift,
            call.residual,
            call.out,
            _stride(call.scale),
            _stride(call.shift),
            *packs,
            width,
            *walk,
            PLUS_ONE=call.plus_one,
            SILU=call.act == "silu",
            **how.flags,
            num_warps=WARPS,
            **_FUSED,
        )
