"""torchsde's Brownian tree from our kernel, and from PyTorch's operations: torchsde's bits.

Every comparison of values is with torchsde itself. `how` runs a test by the kernel, on every
instruction set that has it, and without: what must have been the kernel is counted.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from tables import needs_extension

from fastdiff.integrations import _brownian_tree as trees
from fastdiff.integrations._brownian_tree import BrownianTree
from fastdiff.ops import _native

torchsde = pytest.importorskip("torchsde", reason="torchsde is what is compared with")

# ends of the tree, why
ENDS = {
    "stable": (0.029167533, 14.614644, "latent diffusion's levels"),
    "edm": (0.002, 80.0, "EDM's levels"),
    "audio": (0.3, 500.0, "Stable Audio's levels: a deep tree"),
    "log": (-2.71, 3.54, "levels in the logarithm: times below 0"),
    "far": (0.0, 9000.0, "keys of two words"),
    "short": (0.5, 0.50002, "a tree of twenty ticks"),
}
# one by one in torch; blocks and tails; pieces of 1,248, and a second and third; a field's
SIZES = (1, 15, 16, 17, 31, 33, 640, 1247, 1248, 1249, 1263, 1264, 1265, 2496, 3757, 16384)
SEEDS = (0, 5, 2**32 - 1, 2**63 - 2)


def theirs(name: str, shape: tuple[int, ...], seed: int, dtype: Any = torch.float32) -> Any:
    """torchsde's tree as diffusers makes it; k-diffusion's `BrownianTree` wraps the same."""
    t0, t1, _ = ENDS[name]
    return torchsde.BrownianInterval(
        t0, t1, size=shape, dtype=dtype, entropy=seed, tol=1e-6, pool_size=24, halfway_tree=True
    )


def ours(name: str, shape: tuple[int, ...], *seeds: int, dtype: Any = torch.float32) -> Any:
    return BrownianTree(*ENDS[name][:2], seeds, shape, dtype)


def spans(name: str, count: int, seed: int = 0) -> Iterator[tuple[float, float]]:
    """The whole, one from each end, and others inside; their ends never round alike, for which
    torchsde has no answer (test_no_time_no_increment)."""
    low, high = (round(t, 6) for t in ENDS[name][:2])
    rng = random.Random(f"{name} {seed}")
    yield low, high
    yield low, rng.uniform(low + 2e-6, high)
    yield rng.uniform(low, high - 2e-6), high
    for _ in range(count - 3):
        a = rng.uniform(low, high - 2e-6)
        yield a, rng.uniform(a + 2e-6, high)


@pytest.fixture
def fused(vector_isa: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes that the kernel filled, after the check of a process."""
    trees._agrees(vector_isa)
    sizes: list[int] = []
    fill = BrownianTree._fused

    def counting(self: Any, out: torch.Tensor, *args: Any) -> bool:
        sizes.append(out.numel())
        return fill(self, out, *args)

    monkeypatch.setattr(BrownianTree, "_fused", counting)
    return sizes


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BrownianTree, "_able", lambda *_: False)


# --- values ---------------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize("name", ENDS)
def test_every_size(name: str, fused: list[int]) -> None:
    for k, size in enumerate(SIZES):
        seed = SEEDS[k % len(SEEDS)]
        want, got = theirs(name, (size,), seed), ours(name, (size,), seed)
        for span in spans(name, 4, k):
            assert_same_bits(got(*span)[0], want(*span))
    assert fused == [size for size in SIZES if size >= 16 for _ in range(4)]


@needs_extension
@pytest.mark.parametrize("shape", [(2, 4, 64, 64), (1_000_003,)], ids=["latents", "million"])
def test_large(shape: tuple[int, ...], fused: list[int]) -> None:
    want, got = theirs("stable", shape, 7), ours("stable", shape, 7)
    for span in ((1.5, 2.25), (0.3, 1.5)):
        assert_same_bits(got(*span)[0], want(*span))
    assert len(fused) == 2


# bfloat16 and float16 are rounded after every operation, float64 draws two words a value
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("name", ENDS)
def test_pytorchs_operations(name: str, dtype: torch.dtype, plain: None) -> None:
    for shape in ((3,), (2, 3, 7), (33, 64)):
        want, got = theirs(name, shape, 5, dtype), ours(name, shape, 5, dtype=dtype)
        for span in spans(name, 4):
            assert_same_bits(got(*span)[0], want(*span))


@needs_extension
def test_a_thousand_queries_in_any_order(fused: list[int]) -> None:
    """Down the levels as samplers go, up again, and at random with repeats. torchsde's values
    do not hang on the order either."""
    levels = np.geomspace(14.6, 0.03, 301)
    steps = list(zip(levels[1:], levels[:-1], strict=True))
    rng = random.Random(3)
    queries = [*steps, *reversed(steps), *(rng.choice(steps) for _ in range(100))]
    queries += [(a, b) for a, b in (sorted(rng.choices(levels, k=2)) for _ in range(300)) if a < b]
    want, got = theirs("stable", (40,), 11), ours("stable", (40,), 11)
    for a, b in queries:
        assert_same_bits(got(float(a), float(b))[0], want(float(a), float(b)))
    assert len(fused) == len(queries) > 900


@needs_extension
@pytest.mark.parametrize("how", ["kernel", "plain"])
def test_each_seed_has_its_path(how: str, fused: list[int], request: pytest.FixtureRequest) -> None:
    if how == "plain":
        request.getfixturevalue("plain")
    seeds = (3, 0, 2**40, 3)
    got = ours("edm", (5, 77), *seeds)(0.7, 3.3)
    for path, seed in zip(got, seeds, strict=True):
        assert_same_bits(path, theirs("edm", (5, 77), seed)(0.7, 3.3))
    assert len(fused) == (how == "kernel")


# as many as there are, more than cores, and a number that divides nothing
@needs_extension
@pytest.mark.parametrize("threads", (1, 2, 3, 7))
def test_threads_share_the_pieces(threads: int, fused: list[int]) -> None:
    for size in (1248, 2497, 5000, 20_001, 65_536):
        torch.set_num_threads(1)
        want = ours("edm", (size,), 3)(0.7, 3.3)
        torch.set_num_threads(threads)
        assert_same_bits(ours("edm", (size,), 3)(0.7, 3.3), want)
    assert len(fused) == 10


@needs_extension
def test_nothing_beside_the_result_is_written(vector_isa: str) -> None:
    for size in (16, 17, 31, 1248, 1250, 1265):
        tree = ours("edm", (size,), 1, 2)
        memory = torch.full((2 * size + 128,), 3.0)
        tree._fused(memory[64:-64].view(2, size), *tree._plan(0.7, 3.3), 1.0, 1.0)
        assert_same_bits(memory[64:-64].view(2, size), tree(0.7, 3.3))
        assert (memory[:64] == 3).all()
        assert (memory[-64:] == 3).all()


@needs_extension
def test_sign_and_divisor(fused: list[int]) -> None:
    """By the kernel as by torch: a float64 number counts as float32 beside a float32 tensor."""
    tree, moved = ours("edm", (5, 77), 4), theirs("edm", (5, 77), 4)(0.7, 3.3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        root = torch.tensor(2.6, dtype=dtype).sqrt()
        assert_same_bits(tree(0.7, 3.3, -1, root)[0], moved * -1 / root)
    assert len(fused) == 3
    wide = torch.tensor([2.6], dtype=torch.float64)  # not a number: the result is float64
    assert_same_bits(tree(0.7, 3.3, -1, wide)[0], moved * -1 / wide)
    root.requires_grad_()
    assert tree(0.7, 3.3, 1, root).requires_grad
    assert len(fused) == 5


@needs_extension
def test_threads_that_ask_one_tree(fused: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets what it would get alone, also while the tree forgets its nodes."""
    monkeypatch.setattr(trees, "_NODES", 300)
    queries = list(spans("stable", 60)) * 3
    alone = [ours("stable", (700,), 9)(*span) for span in queries]
    tree = ours("stable", (700,), 9)
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(lambda span: tree(*span), queries), alone, strict=True):
            assert_same_bits(got, want)
    assert len(fused) == 2 * len(queries)


# --- times ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["kernel", "plain"])
def test_times_at_and_beyond_the_ends(how: str, request: pytest.FixtureRequest) -> None:
    if how == "plain":
        request.getfixturevalue("plain")
    want, got = theirs("stable", (40,), 2), ours("stable", (40,), 2)
    rounded = (0.029167533, 1.0), (2.0, 14.6146441), (0.0291671, 14.6146449)
    beyond = (0.01, 1.0), (2.0, 15.0), (-math.inf, math.inf), (20.0, 30.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Should have")  # torchsde's own
        for span in rounded:
            assert_same_bits(got(*span)[0], want(*span))
        for span in beyond:
            with pytest.warns(UserWarning, match=r"ta and tb must lie in \[0.029168, 14.614644\]"):
                assert_same_bits(got(*span)[0], want(*span))


def test_no_time_no_increment() -> None:
    for dtype in (torch.float32, torch.float64):
        tree = ours("edm", (40,), 2, dtype=dtype)
        for span in ((1.0, 1.0), (1.0, 1.0 + 4e-7), (1.0000003, 1.0000004)):
            assert_same_bits(tree(*span), torch.zeros(1, 40, dtype=dtype))
        assert tree(1.0, 1.000002).abs().max() > 0


def test_arguments() -> None:
    tree = ours("edm", (40,), 2)
    with pytest.raises(ValueError, match=r"ta must not be above tb, got 2.0 and 1.0"):
        tree(2.0, 1.0)
    with pytest.raises(ValueError, match="ta must not be above tb, got nan"):
        tree(math.nan, 1.0)
    for ends in ((1.0, math.inf), (math.nan, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="t0 and t1 must be finite, t0 not above t1"):
            BrownianTree(*ends, [1], (3,))
    with pytest.raises(ValueError, match="non-negative"):
        BrownianTree(0.0, 1.0, [-1], (3,))


def test_a_tree_forgets_nodes_and_keeps_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "_NODES", 100)
    tree, whole = ours("stable", (40,), 9), []
    for k in range(30):
        tree(1.0 + 0.1 * k, 3.0 + 0.3 * k)
        whole.append(tree._split)
    assert max(whole) < 100 + 60
    assert_same_bits(tree(1.0, 3.0)[0], theirs("stable", (40,), 9)(1.0, 3.0))


# --- seeds ----------------------------------------------------------------------------------


def test_seeds_are_those_of_numpy() -> None:
    """Entropy of 1, 2 and 3 words, of as many as the pool has and of more; keys of 1 to 3 words."""
    keys = ((0, 0), (1, 1), (2**31 + 5, 31), (2**32, 33), (2**33 + 7, 40), (2**70, 71))
    for entropy in (0, 1, 2**32, 2**63 - 1, 2**64, 2**768 - 1, 2**768, 3**1000):
        own = trees._Entropy(entropy)
        (want,) = np.random.SeedSequence(entropy, pool_size=24).generate_state(1)
        assert own.seed(()) == want
        for key, depth in keys:
            sequence = np.random.SeedSequence(entropy, spawn_key=(key, depth), pool_size=24)
            (want,) = sequence.generate_state(1)
            assert own.seed([*trees._words(key), *trees._words(depth)]) == want


# --- the check of a process -----------------------------------------------------------------


# one value off by an ulp; refused by the instruction set; and, so that the two show, no fault
@needs_extension
@pytest.mark.parametrize("fault", ("value", "refused", "none"))
def test_a_kernel_that_differs_is_found_out(
    fault: str, monkeypatch: pytest.MonkeyPatch, vector_isa: str
) -> None:
    right = _native.extension

    def faulty(*args: Any) -> bool:
        if fault == "refused":
            return False
        if fault == "value":
            args = (*args[:4], args[4] * (1 + 2**-23), *args[5:])
        return bool(right.brownian_tree(*args))

    name = f"{vector_isa} with {fault}"
    stand_in = SimpleNamespace(
        isa=lambda: name, torch_noise=right.torch_noise, brownian_tree=faulty
    )
    with monkeypatch.context() as patched:
        patched.setattr(_native, "extension", stand_in)
        assert trees._agrees(name) is (fault == "none")
        got = ours("edm", (77,), 4)(0.7, 3.3)[0]
    assert_same_bits(got, theirs("edm", (77,), 4)(0.7, 3.3))


def test_without_an_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "extension", None)
    assert_same_bits(ours("edm", (77,), 4)(0.7, 3.3)[0], theirs("edm", (77,), 4)(0.7, 3.3))
