"""The case of `add_noise` for Triton's interpreter: triton_cases.py runs it among its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from bits import assert_same_bits

from fastdiff import randn, use_backend
from fastdiff.ops import add_noise
from fastdiff.reference.diffusion import PREDICTIONS

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PLAIN, LAST, LAST_3D = torch.contiguous_format, torch.channels_last, torch.channels_last_3d
SEEDS = [1, 2**63 + 5, 2**64 - 1]


def _same(size: tuple[int, ...], dtype: torch.dtype, fmt: torch.memory_format, target: str) -> None:
    x0 = randn([8, 9, 10], size).to(dtype).contiguous(memory_format=fmt)
    given = (x0, SEEDS, torch.tensor([0.9, 0.0, 0.3]), torch.tensor([0.1, 1.0, 0.7]))
    results = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            results.append(add_noise(*given, target=target, step=2**32 - 1, stream=2**32 - 1))
    for got, expected in zip(*results, strict=True):
        assert_same_bits(got, expected, f"{size} {dtype} {fmt} {target}")


def run(small_tiles: Callable[[int], AbstractContextManager[None]]) -> None:
    for target in PREDICTIONS:
        for n in (0, 1, 5, 129, 1025):
            _same((n,), F32, PLAIN, target)
        _same((129,), BF16, PLAIN, target)
        for fmt, size in ((LAST, (3, 5, 7)), (LAST, (8, 6, 6)), (LAST_3D, (2, 3, 4, 5))):
            _same(size, F32, fmt, target)
    with small_tiles(128):
        _same((1000,), F16, PLAIN, "v_prediction")
        _same((9, 8, 8), BF16, LAST, "v_prediction")
