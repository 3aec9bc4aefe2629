"""The Brownian path: its law, proved on the weights and seen on draws, and its bits.

Everything is deterministic: a statistical test fails when the path is changed for the worse, and
cannot flake. Its confidence is stated.
"""

from __future__ import annotations

import hashlib
import math
import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from scipy import stats
from tables import Guard

from fastdiff import use_backend
from fastdiff.ops import Stream, brownian, randn
from fastdiff.path_noise import PATH
from fastdiff.reference.brownian import Tree, increment, weighted_normals
from fastdiff.reference.noise import normals

# linear and geometric splits; one level; the deepest; a wide range, as the sampler has it
TREES = {
    "linear": Tree(0.0, 1.0, 20, False),
    "one level": Tree(-1.0, 3.0, 1, False),
    "deepest": Tree(0.03, 14.6, 30, False),
    "geometric": Tree(0.03, 14.6, 20, True),
    "wide": Tree(2.0**-32, 2.0**32, 15, True, 64),
    "sampler": Tree(-64.0, 64.0, 16, False, 128),
    "cells": Tree(-1.0, 3.0, 6, False, 8),
    "cells alone": Tree(-1.0, 3.0, 4, False, 16),
}


def times_of(tree: Tree, count: int, seed: int = 0) -> list[float]:
    """Increasing times in leaves of their own, the ends and the first split among them."""
    if tree.depth == 1:
        return [tree.low, 0.5, 1.0, 2.25, tree.high]  # both leaves have one inside
    if tree.depth < 10:  # a time in each leaf or so, and ends of cells
        count = 2**tree.depth
        inner = [tree.low + 4 * (i + (0.3 if i % 3 else 0.0)) / count for i in range(0, count, 3)]
        return [*inner, tree.high]
    rng = np.random.default_rng(seed)
    u = np.sort(rng.random(count - 3))
    if tree.geometric:
        inner = tree.low * (tree.high / tree.low) ** u
        split = math.sqrt(tree.low) * math.sqrt(tree.high)
    else:
        inner, split = tree.low + (tree.high - tree.low) * u, (tree.low + tree.high) / 2
    return sorted([tree.low, split, tree.high, *(float(t) for t in inner)])


# --- the law, exactly -------------------------------------------------------------------------


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_covariance_of_all_increments_is_that_of_brownian_motion(tree: Tree) -> None:
    """Overlapping, nested and disjoint: cov = overlap / sqrt(product of the lengths). The normals
    are independent, so the covariance is the scalar product of the weights."""
    times = times_of(tree, 14)
    pairs = [(a, b) for a in times for b in times if a < b]
    parts = [
        dict(zip(*(v.tolist() for v in increment(tree, a, b, 0.0)), strict=True)) for a, b in pairs
    ]
    for (a, b), one in zip(pairs, parts, strict=True):
        for (c, d), other in zip(pairs, parts, strict=True):
            got = math.fsum(w * other.get(i, 0.0) for i, w in one.items())
            overlap = max(0.0, min(b, d) - max(a, c))
            # at most 62 products of weights that are right to some 2^-52 of their size
            assert abs(got - overlap / math.sqrt((b - a) * (d - c))) < 1e-12, (a, b, c, d)


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_what_is_left_out_is_small(tree: Tree) -> None:
    times = times_of(tree, 14)
    for a in times:
        for b in times:
            if a != b:
                kept, whole = (
                    dict(zip(*increment(tree, a, b, least), strict=True)) for least in (2**-25, 0)
                )
                assert {i: whole[i] for i in kept} == kept
                assert all(abs(w) <= 2**-25 for i, w in whole.items() if i not in kept)


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_an_increment_is_at_most_two_descents_and_the_cells_between(tree: Tree) -> None:
    times = times_of(tree, 14)
    for a in times:
        for b in times:
            if a != b:
                numbers, weights = increment(tree, a, b)
                levels = tree.depth - tree.cells.bit_length() + 1
                assert len(numbers) == len(weights) <= 2 * levels + 2 + tree.cells
                assert (np.diff(numbers) > 0).all() and numbers[0] >= 0
                assert numbers[-1] < 2 ** (tree.depth + 1)
                back = increment(tree, b, a)
                assert back[0].tolist() == numbers.tolist()
                np.testing.assert_array_equal(back[1], -weights)


def test_path_of_another_depth_agrees_at_the_leaves() -> None:
    for geometric, ends in ((False, [1.0, 1.5, 2.75, 9.0]), (True, [1.0, 3.0, 9.0])):
        shallow, deep = Tree(1.0, 9.0, 5, geometric), Tree(1.0, 9.0, 9, geometric)
        for a, b in pairwise(ends):
            one, other = increment(shallow, a, b), increment(deep, a, b)
            assert one[0].tolist() == other[0].tolist()
            np.testing.assert_array_equal(one[1], other[1])


def test_path_is_continuous_across_a_leaf() -> None:
    """W(t) - W(low) by its weights, at times on both sides of the end of a leaf."""
    tree = Tree(0.0, 1.0, 4, False)
    edge, near = 5 / 16, 1e-9
    parts = [increment(tree, 0.0, t) for t in (edge - near, edge, edge + near)]
    dense = np.zeros((3, 2**5))
    for row, (numbers, weights) in zip(dense, parts, strict=True):
        row[numbers] = weights
    # a bridge that is `near` its end deviates by sqrt(near)
    assert np.abs(dense[[0, 2]] - dense[1]).max() < 4 * math.sqrt(near / edge)


# --- the law, on draws ------------------------------------------------------------------------

DRAWS = 2**17
WIDE = {"low": 2.0**-32, "high": 2.0**32, "depth": 15, "geometric": True, "cells": 64}


def _path(t0: float, t1: float, **how: Any) -> np.ndarray:
    return brownian([5], (DRAWS,), t0, t1, **how)[0].double().numpy()


@pytest.mark.parametrize("how", ({}, WIDE), ids=("linear", "geometric"))
def test_increments_are_unit_normal(how: dict[str, Any]) -> None:
    """Kolmogorov-Smirnov and the second and fourth moments; five standard errors each."""
    for t0, t1 in ((0.0, 1.0), (0.1, 0.12), (0.49, 0.83), (0.7, 0.2)):
        z = _path(max(t0, how.get("low", 0.0)), t1, **how)
        assert stats.kstest(z, "norm").pvalue > 1e-4
        assert abs(z.mean()) < 5 / math.sqrt(DRAWS)
        assert abs((z**2).mean() - 1) < 5 * math.sqrt(2 / DRAWS)
        assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / DRAWS)


@pytest.mark.parametrize("how", ({}, WIDE), ids=("linear", "geometric"))
def test_correlation_of_increments(how: dict[str, Any]) -> None:
    """Disjoint, touching, overlapping, nested; within five standard errors, 1/sqrt(draws) each."""
    spans = [(0.05, 0.2), (0.2, 0.4), (0.3, 0.6), (0.33, 0.41), (0.7, 0.9)]
    values = [_path(*s, **how) for s in spans]
    for (a, b), one in zip(spans, values, strict=True):
        for (c, d), other in zip(spans, values, strict=True):
            overlap = max(0.0, min(b, d) - max(a, c)) / math.sqrt((b - a) * (d - c))
            assert abs((one * other).mean() - overlap) < 5 * math.sqrt((1 + overlap**2) / DRAWS)


def test_other_streams_and_seeds_are_independent() -> None:
    base = _path(0.25, 0.5)
    others = [
        brownian([6], (DRAWS,), 0.25, 0.5)[0],
        brownian([5], (DRAWS,), 0.25, 0.5, stream=Stream.STEP)[0],
        *(randn([5], (DRAWS,), step=i, stream=Stream.STEP)[0] for i in range(3)),
    ]
    for other in others:
        assert abs((base * other.double().numpy()).mean()) < 5 / math.sqrt(DRAWS)


@pytest.mark.parametrize("how", ({}, WIDE), ids=("linear", "geometric"))
def test_increments_add_up(how: dict[str, Any]) -> None:
    """W(c) - W(a) in one piece and in two or five, where the roundings of float32 allow it."""
    for cuts in ((0.1, 0.35, 0.8), (0.1, 0.1004, 0.2, 0.5, 0.53, 0.6)):
        whole = math.sqrt(cuts[-1] - cuts[0]) * _path(cuts[0], cuts[-1], **how)
        parts = [math.sqrt(b - a) * _path(a, b, **how) for a, b in pairwise(cuts)]
        # each piece: at most 42 products and sums of terms up to 7, rounded to 2^-24
        bound = 2 * 42 * 2.0**-24 * 7 * math.sqrt(cuts[-1] - cuts[0]) * math.sqrt(len(parts) + 1)
        assert np.abs(sum(parts) - whole).max() < bound


# --- bits -------------------------------------------------------------------------------------

SEEDS = [1, 2**63 + 5, 2**64 - 1]
SPAN = {"t0": 0.3, "t1": 0.35, **WIDE}


def plain(shape: tuple[int, ...], **how: Any) -> torch.Tensor:
    """From the readable reference, by hand."""
    tree = Tree(how["low"], how["high"], how["depth"], how["geometric"], how["cells"])
    numbers, weights = increment(tree, how["t0"], how["t1"])
    seeds = np.array(SEEDS, np.uint64)
    z = weighted_normals(seeds, int(np.prod(shape)), numbers, weights, Stream.BROWNIAN)
    return torch.from_numpy(z).view(3, *shape)


def test_reference_is_the_sum_in_order() -> None:
    numbers, weights = np.array([0, 3, 9]), np.array([0.5, -0.25, 2.0])
    z = [normals(np.array([7], np.uint64), 10, int(i), 5)[0] for i in numbers]
    expected = (np.float32(0.5) * z[0] + np.float32(-0.25) * z[1]) + np.float32(2.0) * z[2]
    got = weighted_normals(np.array([7], np.uint64), 10, numbers, weights, 5)[0]
    np.testing.assert_array_equal(got, expected)


# 0; inside a block; around a batch, a piece and a second piece
@pytest.mark.parametrize("size", (0, 1, 3, 4, 5, 63, 64, 65, 1023, 1024, 1025, 4097))
def test_bits_of_the_reference(isa: str, size: int) -> None:
    out = Guard((3, size))
    brownian(SEEDS, (size,), **SPAN, out=out.tensor)
    out.check("out")
    assert_same_bits(out.tensor, plain((size,), **SPAN))


# a prime number of channels; more than a piece holds; one pixel; whole quads
@pytest.mark.parametrize("shape", ((3, 5, 7), (1500, 1, 3), (2, 1, 1), (4, 16, 16), (3, 4, 5, 6)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_memory_format_and_dtype(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    fmt = torch.channels_last if len(shape) == 3 else torch.channels_last_3d
    expected = plain(shape, **SPAN).to(dtype)
    for order in (torch.contiguous_format, fmt):
        out = Guard((3, *shape), order, dtype)
        brownian(SEEDS, shape, **SPAN, out=out.tensor)
        out.check("out")
        assert_same_bits(out.tensor, expected)


@pytest.mark.parametrize("fmt", (torch.contiguous_format, torch.channels_last), ids=str)
def test_addition(isa: str, fmt: torch.memory_format) -> None:
    shape = (5, 9, 31)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((3, *shape))).float()
    expected = x + 0.7 * plain(shape, **SPAN)
    given, out = x.clone(memory_format=fmt), Guard((3, *shape), fmt)
    brownian(SEEDS, shape, **SPAN, add_to=given, scale=0.7, out=out.tensor)
    out.check("out")
    assert_same_bits(out.tensor, expected)
    fresh = brownian(SEEDS, shape, **SPAN, add_to=given, scale=0.7)
    assert fresh.stride() == given.stride()
    assert_same_bits(fresh, expected)
    assert_same_bits(given, x)
    brownian(SEEDS, shape, **SPAN, add_to=given, scale=0.7, out=given)
    assert_same_bits(given, expected)
    with use_backend("reference"):
        assert_same_bits(brownian(SEEDS, shape, **SPAN, add_to=x, scale=0.7), expected)


def test_mixed_layouts_and_float64_go_to_the_reference() -> None:
    shape = (4, 3, 5)
    x = torch.zeros(3, *shape)
    out = torch.empty(3, *shape).contiguous(memory_format=torch.channels_last)
    brownian(SEEDS, shape, **SPAN, add_to=x, out=out)
    assert_same_bits(out, plain(shape, **SPAN))
    got = brownian(SEEDS, shape, **SPAN, dtype=torch.float64)
    assert_same_bits(got, plain(shape, **SPAN).double())


def test_a_sample_does_not_depend_on_its_batch_or_on_threads() -> None:
    shape = (3, 61, 67)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(brownian(SEEDS, shape, **SPAN))
    finally:
        torch.set_num_threads(before)
    for got in results[1:]:
        assert_same_bits(got, results[0])
    for i, seed in enumerate(SEEDS):
        assert_same_bits(brownian([seed], shape, **SPAN)[0], results[0][i])


@pytest.mark.parametrize(
    ("how", "digest"),
    (
        ({}, "0e9d84b8e3fa4547a5ddccc24418a899738376825d061c65fc444ffbf32ce2ee"),
        (PATH, "06edf861c7832705d237fe99a748fe846a034dfecd5e0b84fa77b48e5dbcf1d4"),
    ),
    ids=("default", "sampler"),
)
def test_the_path_is_frozen(how: dict[str, Any], digest: str) -> None:
    """If this fails, pictures of released seeds change: take a new stream number instead."""
    parts = [brownian(range(4), (1000,), a, b, **how) for a, b in ((0.0, 0.3), (0.3, 0.4))]
    bits = b"".join(part.numpy().astype("<f4").tobytes() for part in parts)
    assert hashlib.sha256(bits).hexdigest() == digest


def test_empty_batch() -> None:
    assert brownian([], (3, 4), 0.1, 0.2).shape == (0, 3, 4)
    assert brownian(SEEDS, (3, 0), 0.1, 0.2).shape == (3, 3, 0)


# --- errors -----------------------------------------------------------------------------------

X = torch.zeros(1, 4)
WRONG = {
    "equal": ({"t1": 0.25}, ValueError, "t0 and t1 must lie in two of the 2**20 leaves of"),
    "leaf": ({"t0": 0.3, "t1": 0.3 + 1e-8}, ValueError, "t0 and t1 must lie in two of the 2**20"),
    "outside": ({"t1": 1.5}, ValueError, "t1 must lie between low and high, 0.0 and 1.0, got 1.5"),
    "not finite": ({"t0": float("nan")}, ValueError, "t0 must be finite, got nan"),
    "a tensor": ({"t0": torch.zeros(2)}, TypeError, "t0 must be a number, got Tensor"),
    "ends": ({"low": 1.0}, ValueError, "high must be above low, got 1.0 for 1.0"),
    "ratio": ({"geometric": True}, ValueError, "low must be above 0 for a geometric tree, got 0"),
    "flag": ({"geometric": 1}, TypeError, "geometric must be a bool, got int"),
    "depth": ({"depth": 31}, ValueError, "depth must lie in range(1, 31), got 31"),
    "cells": ({"cells": 3}, ValueError, "cells must be a power of two, got 3"),
    "many cells": ({"depth": 2, "cells": 8}, ValueError, "cells must lie in range(1, 5), got 8"),
    "float depth": ({"depth": 8.0}, TypeError, "depth must be an integer, got float"),
    "stream": ({"stream": -1}, ValueError, "stream must lie in range(0, 4294967296), got -1"),
    "shape": ({"shape": 4}, TypeError, "shape must be a sequence of ints, got 4"),
    "negative": ({"shape": (-1,)}, ValueError, "shape must lie in [0, 2**63), got (-1,)"),
    "seeds": ({"seeds": [-1]}, ValueError, "seeds must lie in [0, 2**64), got -1"),
    "scale": ({"scale": 2.0}, ValueError, "scale must come with add_to, got 2.0 without it"),
    "dtype": ({"dtype": torch.int32}, TypeError, "dtype must be a floating-point type"),
    "x": ({"add_to": X.double()}, TypeError, "add_to must be a float32 tensor, got torch.float64"),
    "x shape": ({"add_to": X[:, 1:]}, ValueError, "add_to must have shape (1, 4), got (1, 3)"),
    "16 bits": (
        {"add_to": X, "out": X.bfloat16()}, TypeError, "out must be float32 like add_to, got torch"
    ),
    "out": ({"out": torch.zeros(2, 4)}, ValueError, "out must have shape (1, 4), got (2, 4)"),
    "out type": ({"out": X.int()}, TypeError, "out must be a floating-point tensor, got torch.int"),
    "device": ({"add_to": X.to("meta"), "out": X}, ValueError, "add_to must be on cpu, got meta"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "message"), WRONG.values(), ids=WRONG)
def test_errors(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"seeds": [0], "shape": (4,), "t0": 0.25, "t1": 0.5}
    with pytest.raises(kind, match=re.escape(f"brownian: {message}")):
        brownian(**{**given, **change})
    assert not X.any()
