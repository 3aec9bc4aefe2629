"""The noise stream: published vectors, the same bits everywhere, and statistics.

The stream is deterministic, so the statistical tests cannot flake: they fail when the stream is
changed for the worse. Their confidence is stated per test.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from scipy import special, stats
from tables import Guard

import fastdiff
from fastdiff.ops import Stream, as_seeds, randn
from fastdiff.reference.noise import box_muller, normals, philox

# Random123, examples/kat_vectors, philox4x32 10: counter, key, result. All zero and all one catch
# a wrong round count and sign extension, the digits of pi a swapped word.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def _words(text: str) -> np.ndarray:
    return np.array([int(w, 16) for w in text.split()], dtype=np.uint64)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN, ids=["zeros", "ones", "pi"])
def test_reference_philox_gives_the_published_words(counter: str, key: str, result: str) -> None:
    low, high = _words(key)
    got = philox(_words(counter), low | high << np.uint64(32))
    assert [hex(w) for w in got] == [hex(w) for w in _words(result)]


def _exact_box_muller(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Radius and the two normals by math library in float64."""
    u = ((a >> np.uint64(1)).astype(np.float64) + 0.5) / 2.0**31
    r = np.sqrt(-2 * np.log(u))
    angle = 2 * np.pi * b.astype(np.float64) / 2.0**32
    return r, r * np.cos(angle), r * np.sin(angle)


def test_kernel_turns_the_published_words_into_normals(isa: str) -> None:
    """Seed, step, stream and element 0 are the all-zero vector: the words pin the normals."""
    w = _words(KNOWN[0][2])
    got = randn([0], (4,))[0].double().numpy()
    r, z0, z1 = _exact_box_muller(w[0::2], w[1::2])
    expected = np.stack([z0, z1], 1).ravel()
    # the error bound of csrc/normal.h for r > 0.1
    assert (np.abs(got - expected) <= 3e-6 * np.repeat(r, 2)).all(), (got, expected)


def test_box_muller_keeps_its_stated_error_and_range() -> None:
    rng = np.random.default_rng(0)
    edges = np.array(
        [0, 1, 2, 3, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 2**29, 3 << 29], np.uint64
    )
    grid = np.stack(np.meshgrid(edges, edges), -1).reshape(-1, 2)
    words = np.concatenate([grid, rng.integers(0, 2**32, (2**20, 2), np.uint64)])
    z0, z1 = box_muller(words[:, 0], words[:, 1])
    r, e0, e1 = _exact_box_muller(words[:, 0], words[:, 1])
    error = np.maximum(np.abs(z0 - e0), np.abs(z1 - e1))
    assert (error[r > 0.1] <= 3e-6 * r[r > 0.1]).all()
    assert error.max() <= 7.1e-5
    assert max(np.abs(z0).max(), np.abs(z1).max()) <= np.float32(np.sqrt(64 * np.log(2)))


@pytest.fixture(scope="module")
def reference_chunks() -> list[tuple[int, int, int, torch.Tensor]]:
    """2^24 normals of the readable reference as (seed, step, stream, values)."""
    rng = np.random.default_rng(1)
    chunks = []
    for _ in range(64):
        seed = int(rng.integers(0, 2**64, dtype=np.uint64))
        step, stream = (int(i) for i in rng.integers(0, 2**32, 2))
        z = normals(np.array([seed], np.uint64), 2**18, step, stream)
        chunks.append((seed, step, stream, torch.from_numpy(z)))
    return chunks


def test_bits_of_the_reference(
    isa: str, reference_chunks: list[tuple[int, int, int, torch.Tensor]]
) -> None:
    for seed, step, stream, expected in reference_chunks:
        got = randn([seed], (expected.shape[1],), step=step, stream=stream)
        assert_same_bits(got, expected, f"seed {seed} step {step} stream {stream}")


def reference(seeds: list[int], shape: tuple[int, ...], step: int, stream: int) -> torch.Tensor:
    z = normals(np.array(seeds, np.uint64), int(np.prod(shape)), step, stream)
    return torch.from_numpy(z).view(len(seeds), *shape)


# 0; part of one block of 4; one batch of 64 and its neighbours; one chunk of 4,096 and its
# neighbours; 1,023 to 1,025 stand for any other multiple of 64
SIZES = (0, 1, 3, 4, 5, 63, 64, 65, 1023, 1024, 1025, 4095, 4096, 4097)
# the ends of each 32-bit counter and of the 64-bit key
COUNTERS = ((0, 0, 0), (2**64 - 1, 2**32 - 1, 2**32 - 1), (2**32, 1, 3))


@pytest.mark.parametrize("size", SIZES)
def test_odd_sizes_inside_misaligned_memory(isa: str, size: int) -> None:
    for seed, step, stream in COUNTERS:
        out = Guard((2, size))
        given = [seed, 5]
        got = randn(given, (size,), step=step, stream=stream, out=out.tensor)
        assert got.data_ptr() == out.tensor.data_ptr()
        out.check("out")
        assert_same_bits(got, reference(given, (size,), step, stream))


# a prime number of channels; channels more than a chunk has elements; one pixel; one channel
LAST = ((3, 5, 7), (17, 9, 16), (5000, 1, 3), (4, 64, 64), (2, 1, 1), (1, 8, 8), (3, 4, 5, 6))


@pytest.mark.parametrize("shape", LAST, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_memory_format_does_not_change_values(
    isa: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    fmt = torch.channels_last if len(shape) == 3 else torch.channels_last_3d
    out = Guard((3, *shape), fmt, dtype)
    randn([1, 2, 3], shape, step=4, stream=2, out=out.tensor)
    out.check("out")
    assert_same_bits(out.tensor, randn([1, 2, 3], shape, step=4, stream=2, dtype=dtype))


def test_out_of_any_strides() -> None:
    base = torch.full((2, 6, 10), 9.0)
    randn([3, 4], (6, 5), out=base[:, :, ::2])
    assert_same_bits(base[:, :, ::2], randn([3, 4], (6, 5)))
    assert bool((base[:, :, 1::2] == 9).all())


# the two that kernels store themselves, and the one that the reference converts
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_other_dtypes_are_the_float32_normals_converted(isa: str, dtype: torch.dtype) -> None:
    got = randn(range(3), (4097,), step=1, stream=1, dtype=dtype)
    assert_same_bits(got, randn(range(3), (4097,), step=1, stream=1).to(dtype))


def test_element_index_above_32_bits_of_blocks() -> None:
    """Elements from 2^34 on have a block whose high word is not zero."""
    seeds, first = np.array([11], np.uint64), 2**34 - 6
    z = normals(seeds, 12, 3, 1, first=first)
    counter = np.array([[2**32 - 2, 0, 3, 1], [2**32 - 1, 0, 3, 1], [0, 1, 3, 1], [1, 1, 3, 1]])
    words = philox(counter.astype(np.uint64), seeds)
    by_hand = np.stack(
        [*box_muller(words[:, 0], words[:, 1]), *box_muller(words[:, 2], words[:, 3])], 1
    ).ravel()
    assert (z[0] == by_hand[2:14]).all()


def test_batch_size_order_and_threads_do_not_change_a_sample() -> None:
    shape = (3, 113, 101)  # enough for two threads, and no multiple of a chunk
    torch.set_num_threads(2)
    all_of_them = randn(range(80), shape, step=9)
    for i in (0, 1, 41, 79):
        assert_same_bits(randn([i], shape, step=9)[0], all_of_them[i], f"seed {i} alone")
    order = np.random.default_rng(0).permutation(80)
    assert_same_bits(randn(order, shape, step=9), all_of_them[order], "permuted")
    torch.set_num_threads(1)
    assert_same_bits(randn(range(80), shape, step=9), all_of_them, "one thread")


# --- statistics -----------------------------------------------------------------------------

N = 2**23
# chance that a perfect generator fails one test; with some 60 comparisons below, 0.06 % in all
CHANCE = 1e-5
CRITICAL = float(stats.norm.isf(CHANCE / 2))


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    return randn(range(8), (N // 8,)).double().numpy()


def test_moments(sample: np.ndarray) -> None:
    """Mean, variance, skew and kurtosis, each as a deviate of its own standard error."""
    z = sample.ravel()
    z2 = z * z
    moments = {
        "mean": z.mean() * np.sqrt(N),
        "variance": (z2.mean() - 1) * np.sqrt(N / 2),
        "skew": (z2 @ z) / np.sqrt(15 * N),
        "kurtosis": ((z2 @ z2) / N - 3) * np.sqrt(N / 96),
    }
    assert {k: v for k, v in moments.items() if abs(v) > CRITICAL} == {}


def test_distribution(sample: np.ndarray) -> None:
    """Kolmogorov-Smirnov against the normal distribution."""
    cdf = special.ndtr(np.sort(sample.ravel()))
    steps = np.arange(N + 1) / N
    distance = max((cdf - steps[:-1]).max(), (steps[1:] - cdf).max())
    assert distance * np.sqrt(N) < special.kolmogi(CHANCE)


# 3 and 4: a wrong radius polynomial; 5: the last five of 2^23 draws, where a short word shows
@pytest.mark.parametrize("bound", (3.0, 4.0, 5.0))
def test_tails(sample: np.ndarray, bound: float) -> None:
    count, expected = int((np.abs(sample) > bound).sum()), 2 * N * stats.norm.sf(bound)
    low, high = stats.poisson.ppf([CHANCE / 2, 1 - CHANCE / 2], expected)
    assert low <= count <= high, (count, expected)


def _uncorrelated(a: np.ndarray, b: np.ndarray) -> None:
    """Values, and squares (Box-Muller pairs share a radius; so might related counters)."""
    a, b = a.ravel(), b.ravel()
    of_values = (a @ b) / np.sqrt(a.size)
    of_squares = ((a * a - 1) @ (b * b - 1)) / np.sqrt(4 * a.size)
    assert abs(of_values) < CRITICAL and abs(of_squares) < CRITICAL, (of_values, of_squares)


# 1 to 3: inside a block of four, 4: the next block; 5 to 8: the same pairs further apart
@pytest.mark.parametrize("lag", range(1, 9))
def test_elements_are_uncorrelated(sample: np.ndarray, lag: int) -> None:
    _uncorrelated(sample[:, lag:], sample[:, :-lag])


# one bit of each coordinate, both neighbours in number and the first bit of the high seed word
NEIGHBOURS = {
    "seed": {"seed": 1},
    "seed-high-word": {"seed": 2**32},
    "step": {"step": 1},
    "stream": {"stream": 1},
    "step-high-bit": {"step": 2**31},
    "stream-and-step": {"stream": 1, "step": 1},
}


@pytest.mark.parametrize("change", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_neighbouring_counters_are_uncorrelated(sample: np.ndarray, change: dict[str, int]) -> None:
    shift = change.get("seed", 0)
    other = {k: v for k, v in change.items() if k != "seed"}
    # even seeds against the changed ones, so that a shift of 1 shares no sample
    got = randn([2 * i + shift for i in range(4)], (N // 8,), **other).double().numpy()
    _uncorrelated(sample[0:8:2], got)


# --- arguments ------------------------------------------------------------------------------


def test_an_integer_seed_counts_up() -> None:
    assert as_seeds(7, 3).tolist() == [7, 8, 9]
    assert as_seeds(7).tolist() == [7]
    assert as_seeds([2**64 - 1, 0]).tolist() == [-1, 0]
    assert as_seeds(np.array([3, 4])).tolist() == [3, 4]


def test_a_seed_tensor_may_be_strided() -> None:
    seeds = torch.arange(8)[::2]
    assert_same_bits(randn(seeds, (5,)), randn([0, 2, 4, 6], (5,)))


# one case a rule of `as_seeds`
@pytest.mark.parametrize(
    ("seeds", "count", "error", "message"),
    [
        (1.5, None, TypeError, "seeds: seeds must be integers, got float"),
        (True, None, TypeError, "seeds: seeds must be integers, got bool"),
        ("12", None, TypeError, "seeds: seeds must be integers, got str"),
        ([1, 2.0], None, TypeError, "seeds: seeds must be integers, got float"),
        ([False], None, TypeError, "seeds: seeds must be integers, got bool"),
        ([-1], None, ValueError, "seeds: seeds must lie in [0, 2**64), got -1"),
        (2**64 - 1, 2, ValueError, f"seeds: seeds must lie in [0, 2**64), got {2**64}"),
        ([1, 2], 3, ValueError, "seeds: seeds must have one entry a sample (3), got 2"),
        (torch.zeros(2), None, TypeError, "seeds must be a 1-D int64 tensor, got 1-D torch.float"),
        (torch.zeros(2, 2, dtype=torch.int64), None, TypeError, "1-D int64 tensor, got 2-D"),
    ],
)
def test_seed_errors(
    seeds: object, count: int | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        as_seeds(seeds, count)


# one case a rule of `randn`
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step": -1}, ValueError, "randn: step must lie in [0, 2**32), got -1"),
        ({"step": 2**32}, ValueError, f"randn: step must lie in [0, 2**32), got {2**32}"),
        ({"stream": 1.0}, TypeError, "randn: stream must be an integer, got float"),
        ({"stream": True}, TypeError, "randn: stream must be an integer, got bool"),
        ({"shape": (-1, 2)}, ValueError, "randn: shape must lie in [0, 2**63), got (-1, 2)"),
        ({"dtype": torch.int32}, TypeError, "randn: dtype must be a floating-point type, got"),
        ({"out": torch.zeros(2, 3)}, ValueError, "randn: out must have shape (1, 4), got (2, 3)"),
        ({"seeds": [0.5]}, TypeError, "randn: seeds must be integers, got float"),
    ],
)
def test_randn_errors(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    call = {"seeds": [0], "shape": (4,), **arguments}
    with pytest.raises(error, match=re.escape(message)):
        randn(**call)  # type: ignore[arg-type]


def test_out_of_integers_is_refused() -> None:
    """Rounded to integers, normals are wrong without a sign of it."""
    out = torch.full((1, 4), 5)
    with pytest.raises(TypeError, match="randn: out must"):
        randn([0], (4,), out=out)
    assert out.tolist() == [[5] * 4]


def test_the_stream_is_frozen() -> None:
    """If this fails, pictures of released seeds change: take a new stream number instead."""
    assert [s.value for s in Stream] == [0, 1, 2, 3, 4, 5, 6]
    bits = randn(range(4), (1000,), step=7, stream=1).numpy().astype("<f4").tobytes()
    assert (
        hashlib.sha256(bits).hexdigest()
        == "0a50564f3c7065783a334af5e33b695e19f0fa43bb3f1430dfb2fe820776e74f"
    )
    assert fastdiff.randn is randn


def test_graphs_have_the_noise_as_an_operation() -> None:
    seeds = as_seeds([3, 2**64 - 1])
    expected = randn(seeds, (2, 5), step=7, stream=1)
    for op, step in (
        (torch.ops.fastdiff.randn, 7),
        (torch.ops.fastdiff.randn_at, torch.tensor(7)),  # a graph may not know the number
    ):
        assert torch.equal(op(seeds, (2, 5), step, 1), expected)
        torch.library.opcheck(op.default, (seeds, (2, 5), step, 1))
