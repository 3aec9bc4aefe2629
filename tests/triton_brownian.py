"""The case of `brownian` for Triton's interpreter: triton_cases.py runs it among its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from bits import assert_same_bits

from fastdiff import use_backend
from fastdiff.ops import brownian

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PLAIN, LAST, LAST_3D = torch.contiguous_format, torch.channels_last, torch.channels_last_3d
SEEDS = [1, 2**63 + 5, 2**64 - 1]


def _same(size: tuple[int, ...], dtype: torch.dtype, fmt: torch.memory_format, add: bool) -> None:
    shape = (len(SEEDS), *size)
    x = torch.linspace(-1, 1, 3 * math.prod(size)).view(shape).contiguous(memory_format=fmt)
    more = {"add_to": x, "scale": 0.7} if add else {}
    got = torch.empty_like(x, dtype=dtype)
    expected = torch.empty_like(got)
    for backend, out in (("triton", got), ("reference", expected)):
        with use_backend(backend):
            brownian(SEEDS, size, 0.3, 0.4, depth=5, stream=2**32 - 1, out=out, **more)
    assert_same_bits(got, expected, f"{size} {dtype} {fmt} {add}")


def run(small_tiles: Callable[[int], AbstractContextManager[None]]) -> None:
    for n in (1, 5, 129, 1025):
        _same((n,), F32, PLAIN, False)
        _same((n,), F32, PLAIN, True)
    _same((129,), BF16, PLAIN, False)
    for fmt, size in ((LAST, (3, 5, 7)), (LAST, (8, 6, 6)), (LAST_3D, (2, 3, 4, 5))):
        _same(size, F32, fmt, True)
    with small_tiles(128):
        _same((1000,), F16, PLAIN, False)
        _same((9, 8, 8), BF16, LAST, False)
