"""The C++ headers alone, compiled here: what the Python ops cannot reach.

Counters that need more than 2^34 elements, every 16-bit float, and the exponential on a grid.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from bits import assert_same_bits

from fastdiff.reference.noise import box_muller, normals, philox
from fastdiff.reference.reverse_step import polynomial_exp

ROOT = Path(__file__).resolve().parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

SOURCE = """
#include "cpu/fill_normal.h"
#include "half.h"
#include "step.h"
#define API extern "C" __attribute__((visibility("default")))
API void words(uint32_t* c, uint32_t k0, uint32_t k1) {
  fd_philox4x32_10(c[0], c[1], c[2], c[3], k0, k1);
}
API void normal4(uint64_t seed, uint32_t stream, uint32_t step, uint64_t block, float* z) {
  fd_normal4(seed, stream, step, block, z[0], z[1], z[2], z[3]);
}
API void fill(uint64_t seed, uint32_t stream, uint32_t step, int64_t first, int64_t n, float* z) {
  fd::FD_ISA::fill_normal(seed, stream, step, first, n, z);
}
API void fill_last(uint64_t seed, uint32_t stream, uint32_t step, int64_t first, int64_t n,
                   int64_t channels, int64_t pixels, float* z) {
  fd::FD_ISA::fill_normal_channels_last(seed, stream, step, first, n, channels, pixels, z);
}
API void widen(const uint16_t* h, float* bf16, float* f16, int64_t n) {
  for (int64_t i = 0; i < n; ++i) bf16[i] = fd_from_bf16(h[i]), f16[i] = fd_from_f16(h[i]);
}
API void narrow(const float* x, uint16_t* bf16, uint16_t* f16, int64_t n) {
  for (int64_t i = 0; i < n; ++i) bf16[i] = fd_to_bf16(x[i]), f16[i] = fd_to_f16(x[i]);
}
API void exponential(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = fd_exp(x[i]);
}
"""

# the instruction flags of each set in CMakeLists.txt, and the flag that /proc/cpuinfo shows for it
SETS = {
    "portable": ([], None),
    "avx2": (["-mavx2", "-mfma"], "avx2"),
    "avx512": (
        [
            "-mavx512f",
            "-mavx512bw",
            "-mavx512dq",
            "-mavx512vl",
            "-mfma",
            "-mprefer-vector-width=512",
        ],
        "avx512bw",
    ),
}


def _cpu_has(flag: str | None) -> bool:
    if flag is None:
        return True
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        return flag in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@pytest.fixture(scope="module", params=SETS)
def headers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    """The headers as a shared library for one instruction set."""
    flags, needed = SETS[request.param]
    if not _cpu_has(needed):
        pytest.skip(f"this CPU has no {needed}")
    folder = tmp_path_factory.mktemp("headers")
    (folder / "headers.cpp").write_text(SOURCE)
    library = folder / "headers.so"
    subprocess.run(
        [
            str(COMPILER), "-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", *flags,
            "-w", "-DFD_ISA=probe", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}",
            str(folder / "headers.cpp"), "-o", str(library),
        ],
        check=True,
    )  # fmt: skip
    found = ctypes.CDLL(str(library))
    u32, u64, i64, pointer = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int64, ctypes.c_void_p
    for name, types in {
        "words": [pointer, u32, u32],
        "normal4": [u64, u32, u32, u64, pointer],
        "fill": [u64, u32, u32, i64, i64, pointer],
        "fill_last": [u64, u32, u32, i64, i64, i64, i64, pointer],
        "widen": [pointer, pointer, pointer, i64],
        "narrow": [pointer, pointer, pointer, i64],
        "exponential": [pointer, pointer, i64],
    }.items():
        function = getattr(found, name)
        function.argtypes, function.restype = types, None
    return found


# Random123, examples/kat_vectors, as in test_noise.py
KNOWN = {
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000",
              "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
             "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
           "d16cfe09 94fdcceb 5001e420 24126ea1"),
}  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN.values(), ids=KNOWN)
def test_published_words(headers: ctypes.CDLL, counter: str, key: str, result: str) -> None:
    c = np.array([int(w, 16) for w in counter.split()], np.uint32)
    k0, k1 = (int(w, 16) for w in key.split())
    low, high, step, stream = (int(w) for w in c)
    z = np.empty(4, np.float32)
    headers.normal4(k0 | k1 << 32, stream, step, low | high << 32, z.ctypes.data)
    headers.words(c.ctypes.data, k0, k1)
    assert c.tolist() == [int(w, 16) for w in result.split()]
    # the same words make the normals, in this order
    w = c.astype(np.uint64)
    pairs = box_muller(w[0::2], w[1::2])
    assert z.tolist() == np.stack(pairs, 1).ravel().tolist()


# where the low word of the block passes 2^32: at the first element, in the middle of a batch, at
# its end; then far from it, and at the largest index that an int64 count allows
FIRSTS = (2**34, 2**34 - 4, 2**34 - 70, 2**34 - 1025, 2**36 - 3001, 2**40 + 3, 2**62 + 5)


@pytest.mark.parametrize("first", FIRSTS)
@pytest.mark.parametrize("n", (1, 64, 5000), ids=lambda n: f"n{n}")
def test_elements_beyond_32_bits(headers: ctypes.CDLL, first: int, n: int) -> None:
    seed, step, stream = 2**63 + 11, 2**32 - 1, 3
    got = np.empty(n, np.float32)
    headers.fill(seed, stream, step, first, n, got.ctypes.data)
    expected = normals(np.array([seed], np.uint64), n, step, stream, first=first)[0]
    assert_same_bits(torch.from_numpy(got), torch.from_numpy(expected))


def test_channels_last_beyond_32_bits(headers: ctypes.CDLL) -> None:
    """Three planes of more than 2^33 pixels: memory position p*C + c is element c*pixels + p."""
    channels, pixels, first, n = 3, 2**33 + 12345, 3 * (2**33 - 700) + 1, 2000
    got = np.empty(n, np.float32)
    headers.fill_last(5, 1, 2, first, n, channels, pixels, got.ctypes.data)
    at = np.arange(first, first + n)
    element = (at % channels) * pixels + at // channels
    expected = np.empty(n, np.float32)
    seeds = np.array([5], np.uint64)
    for c in range(channels):
        mine = at % channels == c
        start, count = int(element[mine][0]), int(mine.sum())
        expected[mine] = normals(seeds, count, 2, 1, first=start)[0]
    assert_same_bits(torch.from_numpy(got), torch.from_numpy(expected))


def test_every_16_bit_float_widens_as_in_torch(headers: ctypes.CDLL) -> None:
    half = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    bf16, f16 = np.empty(2**16, np.float32), np.empty(2**16, np.float32)
    headers.widen(half.ctypes.data, bf16.ctypes.data, f16.ctypes.data, half.size)
    as_torch = torch.from_numpy(half.view(np.int16))
    assert_same_bits(torch.from_numpy(bf16), as_torch.view(torch.bfloat16).float())
    assert_same_bits(torch.from_numpy(f16), as_torch.view(torch.float16).float())


def test_rounding_to_16_bits_is_that_of_torch(headers: ctypes.CDLL) -> None:
    """Every 16-bit number, the ties between neighbours, both sides of the ties, random bits."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    f16_ties = torch.arange(2**16).to(torch.int16).view(torch.float16).float().numpy()
    f16_ties = f16_ties[np.isfinite(f16_ties)].view(np.uint32)[:, None]
    bits = np.concatenate(
        [
            (upper[:, None] | lower).ravel(),
            (f16_ties + np.array([0x0FFF, 0x1000, 0x1001, 0x3000], np.uint32)).ravel(),
            np.random.default_rng(0).integers(0, 2**32, 2**20, np.uint32),
        ]
    )
    x = np.ascontiguousarray(bits).view(np.float32)
    bf16, f16 = np.empty(x.size, np.uint16), np.empty(x.size, np.uint16)
    headers.narrow(x.ctypes.data, bf16.ctypes.data, f16.ctypes.data, x.size)
    for got, kind in ((bf16, torch.bfloat16), (f16, torch.float16)):
        mine = torch.from_numpy(got.view(np.int16)).view(kind)
        assert_same_bits(mine, torch.from_numpy(x).to(kind), str(kind))


def test_exponential_keeps_its_stated_error(headers: ctypes.CDLL) -> None:
    """2 ulp of exp in [-86, 88], saturation beyond, NaN passes, and the bits of the reference."""
    grid = np.linspace(-86, 88, 2**20, dtype=np.float32)
    ends = np.array([-np.inf, -1e30, -87, -86, -0.0, 0, 1e-30, 88, 89, np.inf, np.nan], np.float32)
    x = np.concatenate([grid, ends])
    y = np.empty_like(x)
    headers.exponential(x.ctypes.data, y.ctypes.data, x.size)
    assert_same_bits(torch.from_numpy(y), polynomial_exp(torch.from_numpy(x)))
    exact = np.exp(np.clip(x.astype(np.float64), -86, 88))
    inside = ~np.isnan(x)
    ulps = np.abs(y - exact)[inside] / np.spacing(exact[inside].astype(np.float32))
    assert ulps.max() <= 2
    assert np.isnan(y[-1])


def test_reference_words_agree_on_random_counters(headers: ctypes.CDLL) -> None:
    rng = np.random.default_rng(1)
    counters = rng.integers(0, 2**32, (200, 4), np.uint64)
    keys = rng.integers(0, 2**64 - 1, 200, np.uint64)
    for counter, key, expected in zip(counters, keys, philox(counters, keys), strict=True):
        c = counter.astype(np.uint32)
        headers.words(c.ctypes.data, int(key) & 0xFFFFFFFF, int(key) >> 32)
        assert c.tolist() == expected.tolist()


KERNELS = sorted(p for p in (ROOT / "csrc" / "cpu").glob("*.cpp"))


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.parametrize("source", KERNELS, ids=lambda p: p.name)
def test_no_symbol_is_shared_between_instruction_sets(source: Path, tmp_path: Path) -> None:
    """A weak function of the standard library, compiled for AVX-512, would run on any CPU.

    The linker keeps one definition of it for all sets. Without optimisation nothing is inlined, so
    every such function shows.
    """
    target = tmp_path / "kernel.o"
    flags = ["-std=c++17", "-O0", "-fPIC", f"-I{ROOT / 'csrc'}", "-DFD_ISA=probe"]
    subprocess.run([str(COMPILER), *flags, "-c", str(source), "-o", str(target)], check=True)
    listed = subprocess.run(["nm", "-C", str(target)], capture_output=True, text=True, check=True)
    # "address type name", or "type name" for what is not defined here
    kinds = [line.split() for line in listed.stdout.splitlines()]
    weak = [words for words in kinds if set(words[:2]) & {"W", "V", "u"}]
    assert [words for words in weak if "__gxx_personality" not in words[-1]] == []
