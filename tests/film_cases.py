"""Calls of `film_norm` that every GPU kernel is held against, by whatever runs it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from budget import assert_within_budget

from fastdiff.ops._film_checks import FilmNorm
from fastdiff.ops._film_launches import Chip
from fastdiff.reference.film_norm import film_norm as reference

# importlib: `fastdiff.ops.film_norm` may be the function, which hides the module
film_op = importlib.import_module("fastdiff.ops.film_norm")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PLAIN, LAST, LAST_3D = torch.contiguous_format, torch.channels_last, torch.channels_last_3d


class Case(NamedTuple):
    """Shape of x, groups, dtypes of x, weight and bias, scale and shift, and what is absent."""

    shape: tuple[int, ...]
    groups: int
    fmt: torch.memory_format = PLAIN
    dtype: torch.dtype = F32
    params: torch.dtype = F32
    film: torch.dtype = F32
    without: tuple[str, ...] = ()
    mean: float = 0.0
    plus_one: bool = True


# name, which says why: case
CASES = {
    "packs across groups": Case((2, 80, 6, 6), 8, LAST),
    "packs across groups bf16": Case((2, 80, 6, 6), 8, LAST, BF16, BF16, BF16),
    "pixels of no pack": Case((1, 80, 5, 7), 8, PLAIN, F16, F32, F16),
    "pixels of whole packs": Case((3, 80, 4, 8), 8, PLAIN, BF16, F16, F32),
    "no packs": Case((3, 10, 5, 7), 5, LAST, F32, BF16, F16),
    "no packs bf16": Case((1, 10, 5, 7), 5, LAST, BF16, F32, BF16),
    "no packs contiguous": Case((3, 10, 5, 7), 5),
    "packs of 8 bytes": Case((2, 12, 3, 5), 3, LAST, F16),
    "one pixel": Case((3, 24, 1, 1), 4, LAST, F16),
    "no space": Case((3, 24), 4),
    "one channel a group": Case((2, 16, 5, 5), 16, LAST),
    "one group": Case((1, 16, 9, 9), 1, LAST, BF16),
    "a group wider than a block": Case((1, 1031, 2, 2), 1, LAST),
    "groups wider than a block": Case((1, 602, 3, 3), 2, LAST, BF16, BF16, BF16),
    "primes": Case((1, 7, 13, 11), 7, LAST, F32, F16, BF16),
    "five axes": Case((1, 6, 3, 5, 7), 3, LAST_3D),
    "one element a group": Case((2, 5), 5),
    "mean far above deviation": Case((1, 16, 40, 40), 2, LAST, mean=1000.0),
    "mean far above deviation contiguous": Case((1, 16, 40, 40), 2, mean=1000.0),
    "without weight": Case((1, 16, 5, 5), 4, LAST, BF16, without=("weight",)),
    "without bias": Case((1, 16, 5, 5), 4, LAST, BF16, without=("bias",)),
    "without scale": Case((1, 16, 5, 5), 4, LAST, BF16, without=("scale",)),
    "without shift": Case((1, 16, 5, 5), 4, LAST, BF16, without=("shift",)),
    "without act": Case((1, 16, 5, 5), 4, LAST, BF16, without=("act",)),
    "without residual": Case((1, 16, 5, 5), 4, LAST, BF16, without=("residual",)),
    "norm alone": Case(
        (2, 16, 5, 5), 4, without=("weight", "bias", "scale", "shift", "act", "residual")
    ),
    "film": Case((3, 10, 5, 7), 0, LAST, F32, F32, BF16, without=("weight", "bias")),
    "film contiguous": Case(
        (2, 24, 4, 8), 0, PLAIN, BF16, F32, F32, without=("weight", "bias", "act"), plus_one=False
    ),
    "film without scale": Case(
        (2, 24, 4, 8), 0, LAST, F16, without=("weight", "bias", "scale", "residual")
    ),
}


# large enough for many chunks of pixels
CHUNKS = {
    "channels_last": Case((2, 40, 20, 20), 4, LAST, BF16, BF16, BF16),
    "contiguous": Case((1, 4, 10000), 2, PLAIN),
    "mean far above deviation": Case((1, 16, 40, 40), 2, LAST, mean=1000.0),
}


def make(case: Case) -> FilmNorm:
    """The call of a case; scale and shift are halves of one tensor, as a layer gives them."""
    generator = torch.Generator().manual_seed(0)

    def normal(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    n, c = case.shape[:2]
    x, residual = (
        t.to(case.dtype).contiguous(memory_format=case.fmt)
        for t in (normal(case.shape) + case.mean, normal(case.shape))
    )
    weight, bias = (normal((c,)).to(case.params) for _ in range(2))
    scale, shift = normal((n, 2 * c)).to(case.film).chunk(2, dim=1)
    given: dict[str, Any] = {
        "weight": weight,
        "bias": bias,
        "scale": scale,
        "shift": shift,
        "act": "silu",
        "residual": residual,
    }
    given |= dict.fromkeys(case.without)
    call = film_op.arrange(x, case.groups, **given, eps=1e-5, plus_one=case.plus_one)
    call.out.fill_(float("nan"))
    return call


# --- shapes of the field, compiled for devices that are not here ----------------------------------

# multiprocessors, bytes of shared memory for a block, clusters: A100, H200, B200
CHIPS = {
    "sm_80": Chip(108, 166912, False),
    "sm_90a": Chip(132, 232448, True),
    "sm_100": Chip(148, 232448, True),
}


def _unet(shape: tuple[int, ...], fmt: torch.memory_format, dtype: torch.dtype) -> FilmNorm:
    n, c = shape[:2]
    x = torch.empty(shape, dtype=dtype).contiguous(memory_format=fmt)
    rows = torch.empty(n, 2 * c, dtype=dtype).chunk(2, dim=1)
    weight = torch.empty(c, dtype=dtype)
    return film_op.arrange(x, 32, weight, weight, *rows, "silu", x, 1e-5, True)


def _film_alone() -> FilmNorm:
    x = torch.empty(16, 320, 32, 32, dtype=BF16).contiguous(memory_format=LAST)
    rows = torch.empty(16, 640, dtype=BF16).chunk(2, dim=1)
    return film_op.arrange(x, 0, None, None, *rows, None, None, 0.0, True)


COMPILED: dict[str, Callable[[], FilmNorm]] = {
    "bf16 channels_last": lambda: _unet((16, 640, 32, 32), LAST, BF16),
    "f32 channels_last": lambda: _unet((16, 640, 16, 16), LAST, F32),
    "bf16": lambda: _unet((16, 640, 32, 32), PLAIN, BF16),
    "f32": lambda: _unet((16, 640, 16, 16), PLAIN, F32),
    # a cluster of four on sm_90 and above, two reads on sm_80
    "bf16 channels_last large": lambda: _unet((16, 320, 64, 64), LAST, BF16),
    # two reads
    "bf16 channels_last huge": lambda: _unet((1, 128, 512, 512), LAST, BF16),
    "f32 huge": lambda: _unet((1, 128, 512, 512), PLAIN, F32),
    "film bf16 channels_last": _film_alone,
}


# --- checks -----------------------------------------------------------------------------------


def silu_at_its_ends(dtype: torch.dtype) -> FilmNorm:
    """Where exp overflows, and beyond."""
    call = make(
        Case((1, 8), 0, PLAIN, dtype, without=("weight", "bias", "scale", "shift", "residual"))
    )
    ends = [-float("inf"), -1e4, -104.0, -88.5, -87.0, 88.5, 1e4, float("inf")]
    call.x.copy_(torch.tensor(ends).view(1, 8))
    return call


def not_finite() -> FilmNorm:
    """A NaN in the first group, an infinity in the third."""
    call = make(Case((1, 8, 6, 6), 4, LAST))
    call.x[0, 0, 1, 1] = float("nan")
    call.x[0, 5, 2, 2] = float("inf")
    return call


def check_not_finite(call: FilmNorm) -> None:
    check(call)
    lost = call.out.isnan().flatten(2)[0]
    assert lost.all(1).tolist() == lost.any(1).tolist() == [True, True, False, False] * 2


def outlier(fmt: torch.memory_format) -> FilmNorm:
    """One value far off, among the first: the pivot of its chunk is no mean of the rest."""
    call = make(Case((1, 8, 40, 40), 2, fmt))
    call.x[0, 0, 0, 0] = 1e4
    return call


def _on(call: FilmNorm, move: Callable[[torch.Tensor], torch.Tensor]) -> FilmNorm:
    return FilmNorm(*(move(v) if isinstance(v, torch.Tensor) else v for v in call))


def on_device(call: FilmNorm) -> FilmNorm:
    """The same call on a CUDA device; scale and shift stay halves of rows twice as wide."""

    def move(t: torch.Tensor) -> torch.Tensor:
        moved = t.cuda()
        if t.dim() == 2 and t.stride(0) > t.shape[1]:
            wide = torch.cat((moved, torch.full_like(moved, float("nan"))), dim=1)
            moved = wide[:, : t.shape[1]]
        return moved

    return _on(call, move)


def check(call: FilmNorm, shift: float = 0.0) -> None:
    """``call.out`` against the reference in float64 on the same inputs.

    Args:
        shift: what the budget takes off x before it asks the reference for its error.
    """
    call = _on(call, lambda t: t.cpu())
    # a shift of x changes nothing but the rounding: a kernel must not feel a mean far from 0 (in
    # float32, that is, where the subtraction is exact)
    same = reference(call.x - shift, *call[1:10])
    exact = reference(*_on(call, lambda t: t.double())[:10])
    # exp is the square of a root of 2 ulp, then the sum, the quotient and the residual are rounded
    assert_within_budget(call.out, same, exact, ulps=6)
