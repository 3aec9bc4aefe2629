"""The noise stream in NumPy, readable: Philox words, and Box-Muller without a math library.

Every backend gives these bits. Only 32-bit integer operations, int to float conversions, float32
multiplications, additions and a correctly rounded square root; never a fused multiply-add.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_U32 = np.uint64(0xFFFFFFFF)


def philox(counter: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Philox4x32-10.

    Args:
        counter: (..., 4) uint64, each below 2**32: block low, block high, step, stream.
        seeds: uint64, broadcast against ``counter[..., 0]``: the key.

    Returns:
        (..., 4) uint64, each below 2**32.
    """
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = seeds & _U32, seeds >> np.uint64(32)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c2 = (p1 >> np.uint64(32)) ^ c1 ^ k0, (p0 >> np.uint64(32)) ^ c3 ^ k1
        c1, c3 = p1 & _U32, p0 & _U32
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _U32, (k1 + np.uint64(0xBB67AE85)) & _U32
    return np.stack([c0, c1, c2, c3], axis=-1)


_LOG = (-2.0, 1.0000064373016357, -0.6666942834854126, 0.4994245767593384, -0.3981376588344574,
        0.34486448764801025, -0.3236100375652313, 0.2016475796699524)  # fmt: skip
_SIN = (0.7853981852531433, -0.08074543625116348, 0.00249000103212893, -3.59504520019982e-05)
_COS = (1.0, -0.3084244132041931, 0.01585020124912262, -0.00031902003684081137)


def _polynomial(coefficients: Sequence[float], x: np.ndarray) -> np.ndarray:
    total = np.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = total * x + np.float32(c)
    return total


def box_muller(radius_word: np.ndarray, angle_word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two uint64 arrays of 32-bit words to two float32 arrays of unit normals.

    ``sqrt(-2 ln u)`` with ``u = ((a >> 1) + 1/2) / 2**31`` times the cosine and the sine of
    ``2 pi b / 2**32`` (Box and Muller 1958), in float32 without fused multiply-add.
    """
    u = (radius_word >> np.uint64(1)).astype(np.float32) + np.float32(0.5)
    t = u.view(np.int32) - np.int32(0x3F3504F3)
    exponent = t >> 23
    f = ((t & np.int32(0x7FFFFF)) + np.int32(0x3F3504F3)).view(np.float32) - np.float32(1.0)
    ln2_part = (31 - exponent).astype(np.float32) * np.float32(1.3862943649291992)
    radius = np.sqrt(ln2_part + f * _polynomial(_LOG, f))

    b = angle_word.astype(np.uint32)
    x = (b << np.uint32(2)).view(np.int32).astype(np.float32) * np.float32(2.0**-31)
    x2 = x * x
    sine, cosine = _polynomial(_SIN, x2) * x, _polynomial(_COS, x2)
    quadrant = (b + np.uint32(1 << 29)) >> np.uint32(30)
    swap = (quadrant & 1) == 1
    cos_sign = np.where(((quadrant + np.uint32(1)) & 2) == 2, np.float32(-1), np.float32(1))
    sin_sign = np.where((quadrant & 2) == 2, np.float32(-1), np.float32(1))
    return (
        radius * (np.where(swap, sine, cosine) * cos_sign),
        radius * (np.where(swap, cosine, sine) * sin_sign),
    )


def normals(seeds: np.ndarray, size: int, step: int, stream: int, first: int = 0) -> np.ndarray:
    """(len(seeds), size) float32 normals of elements first, first + 1, ...; the readable reference.

    Args:
        seeds: (n,) uint64.
    """
    blocks = np.arange(first // 4, (first + size + 3) // 4, dtype=np.uint64)
    counter = np.stack(
        [
            blocks & _U32,
            blocks >> np.uint64(32),
            np.full_like(blocks, step),
            np.full_like(blocks, stream),
        ],
        axis=-1,
    )
    words = philox(counter[None], np.asarray(seeds, dtype=np.uint64)[:, None])
    z0, z1 = box_muller(words[..., 0], words[..., 1])
    z2, z3 = box_muller(words[..., 2], words[..., 3])
    z = np.stack([z0, z1, z2, z3], axis=-1).reshape(len(words), 4 * len(blocks))
    return np.ascontiguousarray(z[:, first % 4 : first % 4 + size])
