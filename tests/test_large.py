"""Tensors of more than 2^31 elements, by addresses alone: one piece of memory, mapped many times.

A view of 8 GiB is backed by 32 MiB, so every index is real and a 32-bit one would leave the map
and crash, or land in the wrong place; the memory is that of a small test. Noise beyond 2^34
elements is in test_headers.py.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

import numpy as np
import pytest
import torch
from bits import assert_same_bits

from fastdiff import use_backend
from fastdiff.ops import _native, reverse_step
from fastdiff.table import Row, StepTable

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs memfd_create"),
    pytest.mark.skipif(_native.extension is None, reason=str(_native.missing)),
]

PERIOD = 2**23  # elements of real memory
SIZE = 2**31 + 3 * PERIOD
_MAP_FIXED, _MAP_NORESERVE, _MAP_POPULATE = 0x10, 0x4000, 0x8000


class Repeated:
    """``size`` elements of which number i and number i + PERIOD are the same memory."""

    def __init__(self, dtype: torch.dtype, size: int = SIZE) -> None:
        width = dtype.itemsize
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int,
            ctypes.c_long,
        ]  # fmt: skip
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        period, total = PERIOD * width, size * width
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        base = libc.mmap(None, total, 0, private, -1, 0)
        if base in (None, ctypes.c_void_p(-1).value):
            pytest.skip(f"cannot reserve {total} bytes of addresses")
        file = os.memfd_create("fastdiff-test")
        os.ftruncate(file, period)
        access = mmap.PROT_READ | mmap.PROT_WRITE
        # page tables filled at once are cheaper than a fault a page
        shared = mmap.MAP_SHARED | _MAP_FIXED | _MAP_POPULATE
        for at in range(0, total, period):
            got = libc.mmap(base + at, period, access, shared, file, 0)
            assert got == base + at
        os.close(file)
        self._unmap = lambda: libc.munmap(base, total)
        kind = {4: np.float32, 2: np.int16}[width]
        pointer = ctypes.cast(base, ctypes.POINTER(np.ctypeslib.as_ctypes_type(kind)))
        flat = torch.from_numpy(np.ctypeslib.as_array(pointer, (size,)))
        self.tensor = flat if width == 4 else flat.view(dtype)

    def __enter__(self) -> torch.Tensor:
        return self.tensor

    def __exit__(self, *_: object) -> None:
        del self.tensor
        self._unmap()


# an offset beyond 2^31 inside one sample, and by the number of samples
@pytest.mark.parametrize("samples", (1, SIZE // PERIOD))
def test_step(samples: int) -> None:
    """x' = 2m over x, which is not read: the same for every repetition."""
    table = StepTable("t", (Row(x={"m": 2.0}, time=0.0),))
    with Repeated(torch.float32) as x, Repeated(torch.bfloat16) as m, use_backend("cpu"):
        real = torch.arange(PERIOD) % 251  # exact in bfloat16
        x[:PERIOD], m[:PERIOD] = -1.0, real.bfloat16()
        shape = (samples, SIZE // samples)
        reverse_step(x.view(shape), m.view(shape), table, 0, out=x.view(shape))
        assert_same_bits(x[-PERIOD:], 2.0 * real)
