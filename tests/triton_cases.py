"""Cases that run the Triton kernels in Triton's interpreter, on CPU tensors.

    TRITON_INTERPRET=1 python tests/triton_cases.py NAME...

prints a line of JSON for each case. The flag must stand before Triton is imported and changes every
kernel of the process, so test_triton.py runs this file in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import film_cases
import numpy as np
import torch
import triton
import triton.language as tl
import triton_add_noise
import triton_brownian
import triton_reparameterize
from bits import assert_same_bits
from fastdiff.kernels import _common
from fastdiff.kernels import add_noise as add_noise_module
from fastdiff.kernels import brownian as brownian_module
from fastdiff.kernels import film_norm as film_module
from fastdiff.kernels import noise as noise_module
from fastdiff.kernels import reparameterize as vae_module
from fastdiff.kernels import reverse_step as step_module
from interpreted import report
from tables import MIXED_ROWS, Inputs, mixed, random_inputs, random_table, walk

import fastdiff
from fastdiff import randn, use_backend
from fastdiff.ops import as_seeds, reverse_step
from fastdiff.ops._film_checks import FilmNorm
from fastdiff.reference.noise import normals
from fastdiff.table import Row, StepTable

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PLAIN, LAST, LAST_3D = torch.contiguous_format, torch.channels_last, torch.channels_last_3d
SEEDS = [1, 2**63 + 5, 2**64 - 1]
CASES: dict[str, Callable[[], None]] = {}


def case(run: Callable[[], None]) -> Callable[[], None]:
    CASES[run.__name__] = run
    return run


@contextmanager
def small_tiles(block: int, *, wide: bool = False) -> Iterator[None]:
    """Tiles of `block` elements, so that a small tensor has many; with 64-bit offsets if asked."""
    before, make = _common._INTERPRETER_BLOCK, _common.tiles
    _common._INTERPRETER_BLOCK = block

    def tiles(*args: Any, **keywords: Any) -> Any:
        return make(*args, **keywords)._replace(WIDE=wide)

    modules = (noise_module, add_noise_module, brownian_module, step_module, vae_module)
    for module in modules:
        module.tiles = tiles
    try:
        yield
    finally:
        _common._INTERPRETER_BLOCK = before
        for module in modules:
            module.tiles = make


# --- noise ----------------------------------------------------------------------------------


@triton.jit
def _words_kernel(words):
    c0, c1, c2, c3 = _common._philox4x32_10(
        tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3),
        tl.load(words + 4), tl.load(words + 5),
    )  # fmt: skip
    tl.store(words, c0)
    tl.store(words + 1, c1)
    tl.store(words + 2, c2)
    tl.store(words + 3, c3)


@case
def philox_known_answers() -> None:
    # Random123, examples/kat_vectors: counter, key, result
    for words, result in (
        ("00000000 00000000 00000000 00000000 00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ):  # fmt: skip
        given = torch.tensor([int(w, 16) for w in words.split()], dtype=torch.uint32)
        _words_kernel[(1,)](given, **_common.EXACT)
        assert given[:4].tolist() == [int(w, 16) for w in result.split()]


def _same_noise(size: tuple[int, ...], dtype: torch.dtype, fmt: torch.memory_format) -> None:
    shape = (len(SEEDS), *size)
    got = torch.empty(shape, dtype=dtype).contiguous(memory_format=fmt)
    expected = torch.empty_like(got)
    for backend, out in (("triton", got), ("reference", expected)):
        with use_backend(backend):
            randn(SEEDS, size, step=2**32 - 1, stream=3, out=out)
    assert_same_bits(got, expected, f"{size} {dtype} {fmt}")


@case
def noise_sizes() -> None:
    for n in (0, 1, 3, 4, 5, 127, 128, 129, 1025):  # around a block, a tile, and none of these
        _same_noise((n,), F32, PLAIN)
    for dtype in (BF16, F16):
        for n in (5, 1025):
            _same_noise((n,), dtype, PLAIN)
    with small_tiles(128):
        _same_noise((1025,), F32, PLAIN)
    with small_tiles(128, wide=True):
        _same_noise((1025,), F32, PLAIN)


@case
def noise_channels_last() -> None:
    # 35, 9 and 15 pixels are no multiple of 4, 64 and 4 are; 70 and 130 channels need two tiles
    for size, dtype in (
        ((3, 5, 7), F32), ((4, 8, 8), BF16), ((1, 3, 3), F32), ((70, 3, 5), F16), ((130, 2, 2), F32)
    ):  # fmt: skip
        _same_noise(size, dtype, LAST)
    _same_noise((3, 3, 5, 7), F32, LAST_3D)
    for wide in (False, True):
        with small_tiles(128, wide=wide):
            _same_noise((5, 7, 9), F32, LAST)


@case
def noise_2_24() -> None:
    with use_backend("triton"):
        got = randn([9, 2**40], (2**23,))
    assert_same_bits(got, randn([9, 2**40], (2**23,)))


@triton.jit
def _run_kernel(out, seed, step, stream, tile, BLOCK: tl.constexpr):
    z = _common.normal_run(tl.load(seed), stream, step, tl.load(tile), True, BLOCK)
    tl.store(out + tl.arange(0, BLOCK), z)


@case
def noise_beyond_32_bits() -> None:
    seeds = as_seeds([2**63 + 11])
    # the block passes 2^31 and 2^32 in these tiles, and is far beyond in the last
    for tile in (2**33 // 128 - 1, 2**34 // 128 - 1, 2**34 // 128, 2**37):
        got = torch.empty(128)
        at = torch.tensor([tile])
        _run_kernel[(1,)](got, seeds, 7, 1, at, BLOCK=128, **_common.EXACT)
        expected = normals(seeds.numpy().view(np.uint64), 128, 7, 1, first=tile * 128)
        assert_same_bits(got, torch.from_numpy(expected[0]), f"tile {tile}")


@case
def brownian_path() -> None:
    triton_brownian.run(small_tiles)


@case
def add_noise_targets() -> None:
    triton_add_noise.run(small_tiles)


# --- reverse step ---------------------------------------------------------------------------

WEIGHTS = torch.tensor([1.0, 3.0, 0.0])
BOUNDS = torch.tensor([0.5, -1.0, 2.0])


def _same_walk(table: StepTable, inputs: Inputs, **how: Any) -> None:
    with use_backend("triton"):
        got = walk(table, inputs, **how)
    with use_backend("cpu"):
        expected = walk(table, inputs, **how)
    for name in expected:
        assert_same_bits(got[name], expected[name], name)


def _walks(*settings: tuple[Any, ...]) -> None:
    for i, (shape, dtype, fmt, guidance, clip, how) in enumerate(settings):
        rng = np.random.default_rng(i)
        inputs = random_inputs(rng, shape, dtype, fmt, guidance, clip)
        _same_walk(random_table(rng), inputs, **how)


@case
def step_every_feature() -> None:
    _walks(
        ((2, 1025), F32, PLAIN, 1.0, None, {}),
        ((2, 1025), BF16, PLAIN, 2.5, 1.5, {"in_place": True}),
        ((3, 129), F16, PLAIN, WEIGHTS, BOUNDS, {}),
    )


@case
def step_channels_last() -> None:
    _walks(
        ((3, 5, 7, 9), F32, LAST, WEIGHTS, BOUNDS, {"in_place": True}),
        ((2, 8, 6, 6), BF16, LAST, 2.5, 1.5, {}),
        ((1, 3, 3, 5, 7), F16, LAST_3D, 1.0, None, {}),
    )


@case
def step_sum_starts_at_zero() -> None:
    # of terms that are all -0 the sum is +0: it does not start with the first of them
    table = StepTable("zeros", (Row(x={"x": 0.5, "m": 0.5}, time=0.0),))
    zeros = torch.full((2, 5), -0.0)
    for row in (0, torch.zeros(2, dtype=torch.int64)):
        with use_backend("triton"):
            got = reverse_step(zeros, zeros, table, row)
        assert_same_bits(got, torch.zeros(2, 5))


@case
def step_many_tiles() -> None:
    with small_tiles(128):
        _walks(((1, 400), F32, PLAIN, 2.5, None, {"rows": range(5)}))
    with small_tiles(128, wide=True):
        _walks(((1, 200), F32, PLAIN, 2.5, None, {"rows": range(5)}))
        _walks(((1, 5, 3, 11), F32, LAST, 2.5, 1.0, {"rows": range(3)}))


@case
def step_per_sample_rows() -> None:
    for i, (shape, dtype, fmt, guidance, clip) in enumerate(
        (
            ((3, 130), F32, PLAIN, 2.5, None),
            ((3, 5, 3, 7), BF16, LAST, WEIGHTS, BOUNDS),
            ((3, 64), F16, PLAIN, WEIGHTS, 0.5),
        )
    ):
        rng = np.random.default_rng(i)
        table = random_table(rng)
        inputs = random_inputs(rng, shape, dtype, fmt, guidance, clip)
        for rows in MIXED_ROWS:
            with use_backend("cpu"):
                expected = mixed(table, inputs, rows)
            with use_backend("triton"):
                got = mixed(table, inputs, rows)
            for name in expected:
                assert_same_bits(got[name], expected[name], f"{rows} {name}")


# --- reparameterization ---------------------------------------------------------------------


@case
def reparameterize_sizes() -> None:
    for size, dtype in (((1,), F32), ((3, 7, 3), BF16), ((129,), F16), ((0,), F32)):
        triton_reparameterize.same(size, dtype)


@case
def reparameterize_samples() -> None:
    bounded = {"samples": 3, "clamp": (-0.5, 0.25)}
    for size, dtype in (((1,), F32), ((2, 65), F32), ((128,), BF16), ((129,), F16), ((0,), F32)):
        triton_reparameterize.same(size, dtype, **bounded)
    triton_reparameterize.same((129,), F32, clamp=(-0.5, 0.25))
    for wide in (False, True):
        with small_tiles(128, wide=wide):
            triton_reparameterize.same((301,), F32, **bounded)


@case
def reparameterize_many_tiles() -> None:
    with small_tiles(128):
        triton_reparameterize.same((1000,), F32)
    with small_tiles(128, wide=True):
        triton_reparameterize.same((300,), F32)


# --- group normalisation and FiLM -------------------------------------------------------------


def _film(calls: dict[str, FilmNorm]) -> None:
    given = film_cases.CASES | film_cases.CHUNKS
    for name, call in calls.items():
        film_module.film_norm(call)
        try:
            film_cases.check(call, given[name].mean if name in given else 0.0)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@case
def film_norm_shapes() -> None:
    _film({name: film_cases.make(c) for name, c in film_cases.CASES.items()})


@case
def film_norm_many_tiles() -> None:
    # two tiles a program or more a program, where there are more than 8 programs
    block, programs = film_module._BLOCK, film_module._PROGRAMS
    film_module._BLOCK, film_module._PROGRAMS = 512, 8
    try:
        _film({name: film_cases.make(c) for name, c in film_cases.CHUNKS.items()})
        _film({str(fmt): film_cases.outlier(fmt) for fmt in (LAST, PLAIN)})
        call = film_cases.make(film_cases.CHUNKS["contiguous"])
        outs = []
        for _ in range(2):
            film_module.film_norm(call)
            outs.append(call.out.clone())
        assert_same_bits(*outs, "a second run")
        make = film_module.plan
        film_module.plan = lambda *given: make(*given)._replace(WIDE=True)
        try:
            _film({name: film_cases.make(c) for name, c in film_cases.CHUNKS.items()})
        finally:
            film_module.plan = make
    finally:
        film_module._BLOCK, film_module._PROGRAMS = block, programs


@case
def film_norm_not_finite() -> None:
    call = film_cases.not_finite()
    film_module.film_norm(call)
    film_cases.check_not_finite(call)
    _film({str(dtype): film_cases.silu_at_its_ends(dtype) for dtype in (F32, BF16, F16)})


@case
def film_norm_through_the_op() -> None:
    given = film_cases.make(film_cases.CASES["packs across groups"])
    with use_backend("triton"):
        got = film_cases.film_op.film_norm(*given[:9])
        empty = film_cases.film_op.film_norm(given.x[:0], 8)
    film_cases.check(given._replace(out=got))
    assert got.is_contiguous(memory_format=LAST) and empty.shape == (0, 80, 6, 6)


if __name__ == "__main__":
    assert fastdiff.backends.unavailable("triton") is None
    report(CASES)
