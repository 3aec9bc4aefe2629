"""What the Triton kernels share: the noise stream, the polynomial exp, loads, stores and tiles.

The same float32 operations in the same order as csrc/normal.h, csrc/half.h and csrc/step.h.
Launch every kernel with ``EXACT``: without it the compiler contracts mul and add into fma, and the
promise of equal bits is void.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastdiff.ops._layout import channels as channels_of

# Launch options of every kernel: bits over speed.
EXACT: dict[str, Any] = {"enable_fp_fusion": False}

# Elements a program works on; the interpreter pays for each program, not for each element.
BLOCK = 1024
WARPS = 4
_INTERPRETER_BLOCK = 1 << 18

# The interpreter does not round float32 to bfloat16 to nearest even, so there it is done by hand.
INTERPRET: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


class Tiles(NamedTuple):
    """How a kernel walks one sample; the fields in capitals are compile-time arguments."""

    count: int  # tiles a sample
    channels: int  # channels and pixels of a channels_last sample, else 0
    pixels: int
    CHANNELS_LAST: bool
    SHIFTED: bool
    WIDE: bool
    BLOCK: int
    BLOCK_C: int

    @property
    def flags(self) -> dict[str, Any]:
        """The compile-time arguments."""
        return {name: value for name, value in self._asdict().items() if name.isupper()}


def tiles(t: torch.Tensor, fmt: torch.memory_format, *, by_logical_index: bool) -> Tiles:
    """Tiles of a batch, which must have elements.

    Args:
        by_logical_index: the kernel draws noise, so that in channels_last it needs the logical
            index of an element; else memory order is as good.
    """
    size = t[0].numel()
    most = _INTERPRETER_BLOCK if INTERPRET.value else BLOCK
    block = min(max(triton.next_power_of_2(size), 128), most)
    wide = size > 2**31 - 2**21  # room for the last tile and its masked part in 32 bits
    channels = channels_of(t, fmt) if by_logical_index else 0
    if channels == 0:
        return Tiles(triton.cdiv(size, block), 0, 0, False, False, wide, block, 1)
    pixels = size // channels
    shifted = pixels % 4 != 0
    block_c = min(triton.next_power_of_2(channels), 64)
    quads = triton.cdiv(pixels + (3 if shifted else 0), 4)
    block_q = max(1, min(block // 4 // block_c, triton.next_power_of_2(quads)))
    count = triton.cdiv(quads, block_q) * triton.cdiv(channels, block_c)
    block = 4 * block_q * block_c
    return Tiles(count, channels, pixels, True, shifted, wide, block, block_c)


def signed(value: int) -> int:
    """The int32 with the bits of a counter in [0, 2**32), so that no value changes its type."""
    return value - (1 << 32) if value >= 1 << 31 else value


def device_of(t: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """The device of the tensor as the current one, on which Triton launches."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


# --- noise ----------------------------------------------------------------------------------


@triton.jit
def _philox4x32_10(c0, c1, c2, c3, k0, k1):
    for _ in tl.static_range(10):
        # 32-bit halves, not one 64-bit product: the tile then keeps the layout of its loads.
        # Wrapping is meant: no overflow check, which the debug mode would add.
        n0 = tl.umulhi(c2, 0xCD9E8D57) ^ c1 ^ k0
        n2 = tl.umulhi(c0, 0xD2511F53) ^ c3 ^ k1
        c1 = tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c3 = tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        c0 = n0
        c2 = n2
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _radius(word):
    u = (word >> 1).to(tl.int32, bitcast=True).to(tl.float32) + 0.5
    t = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = t >> 23
    f = ((t & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    q = 0.2016475796699524 * f + -0.3236100375652313
    q = q * f + 0.34486448764801025
    q = q * f + -0.3981376588344574
    q = q * f + 0.4994245767593384
    q = q * f + -0.6666942834854126
    q = q * f + 1.0000064373016357
    q = q * f + -2.0
    return tl.sqrt_rn((31 - e).to(tl.float32) * 1.3862943649291992 + f * q)


@triton.jit
def _unit_circle(word):
    x = (word << 2).to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10
    x2 = x * x
    s = -3.59504520019982e-05 * x2 + 0.00249000103212893
    s = s * x2 + -0.08074543625116348
    s = s * x2 + 0.7853981852531433
    s = s * x
    c = -0.00031902003684081137 * x2 + 0.01585020124912262
    c = c * x2 + -0.3084244132041931
    c = c * x2 + 1.0
    near = tl.add(word, 0x20000000, sanitize_overflow=False)
    swap = (near & 0x40000000) != 0
    cos_sign = tl.add(near, 0x40000000, sanitize_overflow=False) & 0x80000000
    sin_sign = near & 0x80000000
    cosine = tl.where(swap, s, c).to(tl.uint32, bitcast=True) ^ cos_sign
    sine = tl.where(swap, c, s).to(tl.uint32, bitcast=True) ^ sin_sign
    return cosine.to(tl.float32, bitcast=True), sine.to(tl.float32, bitcast=True)


@triton.jit
def normal4(seed, stream, step, low, high):
    """Four normals of each block: seed an int64 scalar, the others 32-bit words."""
    c0, c1, c2, c3 = _philox4x32_10(
        low.to(tl.uint32),
        high.to(tl.uint32),
        step.to(tl.uint32),
        stream.to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    cos0, sin0 = _unit_circle(c1)
    cos1, sin1 = _unit_circle(c3)
    r0 = _radius(c0)
    r1 = _radius(c2)
    return r0 * cos0, r0 * sin0, r1 * cos1, r1 * sin1


@triton.jit
def normal_run(seed, stream, step, tile, WIDE: tl.constexpr, BLOCK: tl.constexpr, first=0):
    """BLOCK normals of consecutive elements of one sample, from block `first` and element
    tile * BLOCK after it on."""
    quad = tl.arange(0, BLOCK // 4)
    if WIDE:
        block = tile.to(tl.int64) * (BLOCK // 4) + quad + first
        high = block >> 32
    else:
        block = tile * (BLOCK // 4) + quad + first
        high = tile * 0
    z0, z1, z2, z3 = normal4(seed, stream, step, block, high)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


# --- tiles ----------------------------------------------------------------------------------


@triton.jit
def run_tile(tile, size, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets and mask of a tile of consecutive elements."""
    at = tl.arange(0, BLOCK)
    offset = tile.to(tl.int64) * BLOCK + at if WIDE else tile * BLOCK + at
    return offset, offset < size


@triton.jit
def pixel_tile(
    tile,
    channels,
    pixels,
    SHIFTED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of channels by quads of pixels of a channels_last sample.

    Element 4 * block of the noise may be any pixel of its channel: where the number of pixels is
    no multiple of 4, a channel starts `shift` elements into a block. So quad q of a channel holds
    the pixels 4 q - shift .. 4 q - shift + 3, and one Philox call serves all four.

    Returns:
        first pixel of the quad, channel, and the two words of the block.
    """
    BLOCK_Q: tl.constexpr = BLOCK // (4 * BLOCK_C)
    across = tl.cdiv(channels, BLOCK_C)
    down = tile // across
    side = tile % across
    if WIDE:  # before the products: lanes beyond the last channel must not come round
        down = down.to(tl.int64)
        side = side.to(tl.int64)
    q = down * BLOCK_Q + tl.arange(0, BLOCK_Q)[:, None]
    c = side * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    first = c * pixels
    block = (first >> 2) + q
    # every logical index is below 2^31 where the tile is not wide, so the product cannot reach
    # the high word; lanes beyond the last channel may wrap, and are masked
    high = block >> 32 if WIDE else tile * 0
    pixel = 4 * q - (first & 3) if SHIFTED else 4 * q + 0 * c
    return pixel, c, block, high


@triton.jit
def pixel_offset(pixel, c, channels, pixels):
    """Offset and mask of one pixel of every quad."""
    return pixel * channels + c, (pixel >= 0) & (pixel < pixels) & (c < channels)


# --- elements -------------------------------------------------------------------------------


@triton.jit
def load_float(pointer, mask):
    """Elements as float32; what the mask leaves out is undefined."""
    t = tl.load(pointer, mask=mask)
    if t.dtype == tl.bfloat16:
        t = (t.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return t.to(tl.float32)


@triton.jit
def store_float(pointer, value, mask):
    """Store float32 in the element type of the pointer, rounded to nearest even."""
    kind: tl.constexpr = pointer.dtype.element_ty
    if kind == tl.bfloat16 and INTERPRET:
        u = value.to(tl.uint32, bitcast=True)
        rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        bits = tl.where((u & 0x7FFFFFFF) > 0x7F800000, (u >> 16) | 0x40, rounded)
        tl.store(pointer, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointer, value.to(kind), mask=mask)


@triton.jit
def exp(x):
    """exp(x) to 2 ulp by mul and add; saturates at exp(-86) and exp(88), NaN passes through."""
    c = tl.where(x < -86.0, -86.0, tl.where(x > 88.0, 88.0, x))
    shifted = c * 1.4426950216293335 + 12582912.0
    k = shifted - 12582912.0
    r = (c - k * 0.693359375) - k * -2.12194440e-4
    q = 0.0013814539415761828 * r + 0.00836874544620514
    q = q * r + 0.04166838899254799
    q = q * r + 0.1666652113199234
    q = q * r + 0.4999999403953552
    poly = (q * (r * r) + r) + 1.0
    # bits - 0x4B400000 + 127, modulo 2^32
    power = tl.add(shifted.to(tl.uint32, bitcast=True), 0xB4C0007F, sanitize_overflow=False)
    scale = power << 23
    return poly * scale.to(tl.float32, bitcast=True)
